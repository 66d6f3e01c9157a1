"""A student and a teacher for real text: tiny, randomly initialised, sharing a tokenizer trained on GSM8K.

    python -m examples.gsm8k.make --data data/gsm8k/train.jsonl --out runs/gsm8k-models

The student is a Qwen3 that ends with ``<|endoftext|>`` and reads plain text; the teacher is a Llama with more
vocabulary rows than tokens, a chat template, and ``<|im_end|>`` as its stop token: the differences that a real pair
(a base student, a chat teacher) has. They show that every stage runs on one's own models; they know nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def read_problems(path: Path, limit: int | None = None) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return rows[:limit]


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE, deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_pair(tokenizer: Tokenizer, out: Path, seed: int) -> None:
    """Write ``out/student`` and ``out/teacher``, each a complete Hugging Face model folder."""
    rows = tokenizer.get_vocab_size()
    torch.manual_seed(seed)
    student = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=rows,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.token_to_id(END_OF_TEXT),
            bos_token_id=None,
        )
    )
    teacher = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=(rows // 64 + 1) * 64,  # padded, as large vocabularies are
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=32,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.token_to_id(END_OF_TURN),
            bos_token_id=None,
        )
    )
    for name, model, stop, template in (
        ("student", student, END_OF_TEXT, None),
        ("teacher", teacher, END_OF_TURN, CHAT_TEMPLATE),
    ):
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.token_to_id(stop), do_sample=True)
        model.save_pretrained(out / name)
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=stop, pad_token=END_OF_TEXT)
        wrapped.chat_template = template
        wrapped.save_pretrained(out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="gsm8k/train.jsonl: id, problem, solution, answer")
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k-models"))
    parser.add_argument("--vocabulary", type=int, default=2048, help="tokens of the tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    problems = read_problems(arguments.data)
    tokenizer = train_tokenizer([row["problem"] + "\n" + row["solution"] for row in problems], arguments.vocabulary)
    save_pair(tokenizer, arguments.out, arguments.seed)
    print(f"{arguments.out}/student and {arguments.out}/teacher: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
