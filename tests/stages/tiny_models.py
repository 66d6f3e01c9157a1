"""Tiny random models of every architecture under test, with the traits that change logits switched on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel

VOCAB = 320  # 300 used by the tokenizer of some tests, the rest padding

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}
WINDOW = {"sliding_window": 8}
CAPS = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 0.5}
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "eos_token_id": 2}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", COMMON | {"tie_word_embeddings": True}),
    "qwen2_moe": ("Qwen2Moe", COMMON | MOE | {"shared_expert_intermediate_size": 48}),
    "qwen3": ("Qwen3", COMMON),
    "qwen3_moe": ("Qwen3Moe", COMMON | MOE),
    "llama": ("Llama", COMMON),
    "gemma": ("Gemma", COMMON),
    "gemma2": ("Gemma2", COMMON | WINDOW | CAPS | {"query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3Text", COMMON | WINDOW | {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 32}),
    "gpt2": ("GPT2", GPT2),
    "mistral": ("Mistral", COMMON | WINDOW),
    "mixtral": ("Mixtral", COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("Granite", COMMON | {"logits_scaling": 4.0, "embedding_multiplier": 6.0}),
    "granitemoe": ("GraniteMoe", COMMON | {"logits_scaling": 4.0, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("Cohere", COMMON | {"logit_scale": 0.25}),
    "cohere2": ("Cohere2", COMMON | WINDOW | {"logit_scale": 0.25}),
    "olmo2": ("Olmo2", COMMON),
    "phi": ("Phi", COMMON),
    "phi3": ("Phi3", COMMON),
    "smollm3": ("SmolLM3", COMMON),
}
REQUIRED = ("qwen2", "qwen3", "qwen3_moe", "llama", "gemma2", "gpt2", "mistral", "granite", "cohere")


def tiny_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model whose distributions are neither flat nor one-hot (every parameter made larger)."""
    prefix, arguments = CONFIGS[name]
    config = getattr(hf, f"{prefix}Config")(**(arguments | changes))
    torch.manual_seed(seed)
    attention = "eager" if "attn_logit_softcapping" in arguments else None  # as load_model chooses
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return enlarge(model)


def enlarge(model: PreTrainedModel) -> PreTrainedModel:
    """Every parameter made larger, so that distributions are neither flat nor one-hot and a forgotten bias shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "A_log" not in name:  # of Mamba: decay rates
                parameter.mul_(12.0 if name.startswith(("lm_head", "embed_out")) else 4.0)
    return model.eval()


def save_tiny(name: str, folder: Path, seed: int = 0, **changes: Any) -> PreTrainedModel:
    model = tiny_model(name, seed, **changes)
    model.save_pretrained(folder)
    return model


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


def tiny_tokenizer(folder: Path, *, swapped: bool = False, template: str | None = CHAT_TEMPLATE) -> None:
    """Save a byte-level tokenizer of 3 special tokens, 256 bytes and 41 merges: exactly 300 ids."""
    alphabet = sorted(ByteLevel.alphabet())
    special = ["<pad>", "<bos>", "<|end|>"]
    pairs = [(a, b) for a in "etaoins" for b in "etaoins"][:41]
    words = [a + b for a, b in pairs]
    if swapped:
        words[0], words[1] = words[1], words[0]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet, *words])}
    tokenizer = Tokenizer(BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<|end|>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


def save_teacher(name: str, folder: Path, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model with its tokenizer, as a folder that every engine can read."""
    model = save_tiny(name, folder, seed, **changes)
    tiny_tokenizer(folder)
    return model
