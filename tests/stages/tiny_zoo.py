"""Tiny random models of the further architectures that transformers has: name -> (config prefix, arguments, layout).

``PACKED`` are read several sequences a row, ``UNPACKED`` one a row, because their state, their attention or their
positions run on from one packed sequence to the next. ``MULTIMODAL`` are text towers inside multimodal models.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from tests.stages.tiny_models import COMMON, MOE, VOCAB, WINDOW, enlarge

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1}
GROUPS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
NO_HEAD_DIM = {key: value for key, value in COMMON.items() if key != "head_dim"}
LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "mamba_expand": 2,
}
OLD = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "eos_token_id": 2}
GEMMA4 = COMMON | WINDOW | {
    "final_logit_softcapping": 2.0,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
    "layer_types": ["sliding_attention", "full_attention"],
    "attention_k_eq_v": False,
    "num_global_key_value_heads": 1,
}  # fmt: skip

PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("Apertus", COMMON),
    "arcee": ("Arcee", COMMON),
    "bitnet": ("BitNet", COMMON),
    "cohere2_moe": ("Cohere2Moe", COMMON | EXPERTS | {"logit_scale": 0.25}),
    "cwm": ("Cwm", COMMON),
    "deepseek_v2": ("DeepseekV2", COMMON | ROUTED | LATENT | {"first_k_dense_replace": 1}),
    "deepseek_v3": ("DeepseekV3", COMMON | ROUTED | GROUPS | LATENT),
    "dots1": ("Dots1", COMMON | ROUTED | GROUPS),
    "ernie4_5": ("Ernie4_5", COMMON),
    "ernie4_5_moe": ("Ernie4_5_Moe", COMMON | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 48}),
    "exaone4": ("Exaone4", COMMON | WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "gemma3n_text": (
        "Gemma3nText",
        COMMON
        | WINDOW
        | {
            "final_logit_softcapping": 2.0,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCAB,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "activation_sparsity_pattern": [0.0, 0.0],
            "laurel_rank": 8,
        },
    ),
    "gemma4_text": ("Gemma4Text", GEMMA4),
    "glm": ("Glm", COMMON),
    "glm4": ("Glm4", COMMON),
    "glm4_moe": ("Glm4Moe", COMMON | ROUTED | GROUPS),
    "glm4_moe_lite": ("Glm4MoeLite", COMMON | ROUTED | GROUPS | LATENT),
    "gpt_neo": (
        "GPTNeo",
        COMMON | {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "gpt_neox": ("GPTNeoX", COMMON),
    "gptj": ("GPTJ", OLD | {"rotary_dim": 16}),
    "granitemoeshared": (
        "GraniteMoeShared",
        COMMON
        | {"logits_scaling": 4.0, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48},
    ),
    "helium": ("Helium", COMMON),
    "hunyuan_dense": ("HunYuanDenseV1", COMMON),
    "hunyuan_moe": ("HunYuanMoEV1", COMMON | {"num_experts": 4, "moe_topk": 2}),
    "hyperclovax": ("HyperCLOVAX", COMMON | {"logits_scaling": 4.0}),
    "llama4_text": (
        "Llama4Text",
        COMMON | {"num_local_experts": 4, "intermediate_size_mlp": 96, "attention_chunk_size": 32},
    ),
    "minicpm3": ("MiniCPM3", COMMON | LATENT | {"dim_model_base": 16}),
    "minimax_m2": ("MiniMaxM2", COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "ministral": ("Ministral", COMMON | WINDOW),
    "ministral3": ("Ministral3", COMMON),
    "nanochat": ("NanoChat", COMMON | {"final_logit_softcapping": 2.0}),
    "nemotron": ("Nemotron", COMMON),
    "olmo": ("Olmo", COMMON),
    "olmo3": ("Olmo3", COMMON | WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "olmoe": ("Olmoe", COMMON | {"num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("Phimoe", COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "seed_oss": ("SeedOss", COMMON),
    "solar_open": ("SolarOpen", COMMON | ROUTED | GROUPS),
    "stablelm": ("StableLm", COMMON),
    "starcoder2": ("Starcoder2", COMMON | WINDOW),
}
SERVED_BY_VLLM = (  # read by vLLM's own classes as by transformers
    "ernie4_5",
    "exaone4",
    "glm4",
    "glm4_moe",
    "gptj",
    "gpt_oss",
    "ministral3",
    "nemotron",
    "olmoe",
    "stablelm",
)
UNPACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("Afmoe", COMMON | EXPERTS | WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "bamba": ("Bamba", COMMON | MAMBA | {"attn_layer_indices": [1]}),
    "bloom": ("Bloom", {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 2}),
    "falcon_alibi": ("Falcon", NO_HEAD_DIM | {"alibi": True, "num_kv_heads": 1}),
    "falcon_rotary": ("Falcon", NO_HEAD_DIM | {"alibi": False, "num_kv_heads": 1}),
    "falcon_h1": ("FalconH1", COMMON | MAMBA | {"mamba_d_ssm": 128, "lm_head_multiplier": 0.25}),
    "falcon_mamba": ("FalconMamba", {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "gpt_oss": (
        "GptOss",
        COMMON | WINDOW | {"num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        COMMON
        | MAMBA
        | {"logits_scaling": 4.0, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48}
        | {"layer_types": ["mamba", "attention"]},
    ),
    "jamba": (
        "Jamba",
        COMMON
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
    ),
    "lfm2": ("Lfm2", COMMON | {"layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": ("Lfm2Moe", COMMON | EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "mamba": ("Mamba", {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": (
        "Mamba2",
        {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 32}
        | {"state_size": 16, "n_groups": 1, "chunk_size": 16},
    ),
    "minimax": (
        "MiniMax",
        COMMON | {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    ),
    "mpt": ("Mpt", {"vocab_size": VOCAB, "d_model": 64, "n_heads": 2, "n_layers": 2, "logit_scale": 0.25}),
    "nemotron_h": (
        "NemotronH",
        COMMON
        | {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16}
        | {"layers_block_type": ["mamba", "attention"], "num_hidden_layers": 2},
    ),
    "olmo_hybrid": ("OlmoHybrid", COMMON | LINEAR),
    "opt": (
        "OPT",
        {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 96}
        | {"max_position_embeddings": 256, "word_embed_proj_dim": 64},
    ),
    "qwen3_5": ("Qwen3_5Text", COMMON | LINEAR),
    "qwen3_5_moe": ("Qwen3_5MoeText", COMMON | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 48}),
    "qwen3_next": ("Qwen3Next", COMMON | LINEAR | MOE | {"shared_expert_intermediate_size": 48}),
    "recurrent_gemma": (
        "RecurrentGemma",
        COMMON
        | {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"], "lru_width": 64}
        | {"attention_window_size": 8, "logits_soft_cap": 2.0},
    ),
    "zamba2": (
        "Zamba2",
        {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "num_key_value_heads": 2, "n_mamba_heads": 4, "mamba_d_state": 16}
        | {"chunk_size": 16, "layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
    ),
}

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = {"image_size": 16, "patch_size": 8, "num_channels": 3}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}}
IMAGE = {"image_token_id": 299, "video_token_id": 298, "vision_start_token_id": 297, "vision_end_token_id": 296}
# name -> (config prefix, text arguments, vision arguments, further arguments)
MULTIMODAL: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3_vision": (
        "Gemma3",
        COMMON | WINDOW | {"final_logit_softcapping": 2.0, "layer_types": ["sliding_attention", "full_attention"]},
        VISION | PATCHES,
        {"image_token_index": 299, "boi_token_index": 298, "eoi_token_index": 297, "mm_tokens_per_image": 4},
    ),
    "gemma4_vision": ("Gemma4", GEMMA4, VISION | {"head_dim": 16, "num_key_value_heads": 2}, {"audio_config": None}),
    "llama4_vision": (
        "Llama4",
        COMMON | {"num_local_experts": 4, "intermediate_size_mlp": 96},
        VISION | PATCHES | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        {"image_token_index": 299},
    ),
    "mistral3_vision": (
        "Mistral3",
        COMMON | {"model_type": "mistral"},
        VISION | PATCHES | {"model_type": "pixtral", "head_dim": 16},
        {"image_token_index": 299},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        COMMON | ROTARY,
        QWEN_VISION | {"fullatt_block_indexes": [0]},
        IMAGE,
    ),
    "qwen3_vl": ("Qwen3VL", COMMON | ROTARY, QWEN_VISION | {"deepstack_visual_indexes": [0]}, IMAGE),
    "qwen3_5_vision": ("Qwen3_5", COMMON | LINEAR, QWEN_VISION, IMAGE),
}
UNPACKED_TOWERS = {"qwen2_5_vl", "qwen3_5_vision"}


def zoo_config(name: str, **changes: Any) -> Any:
    """The tiny config of a name in this file; None if the installed transformers lacks it."""
    prefix, arguments, *parts = {**PACKED, **UNPACKED, **MULTIMODAL}[name]
    config = getattr(hf, f"{prefix}Config", None)
    if config is None:
        return None
    if not parts:
        return config(**(arguments | changes))
    vision, further = parts
    return config(text_config=arguments | changes, vision_config=vision, **further)


def zoo_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel | None:
    """A random float32 model in evaluation mode; None if the installed transformers lacks it."""
    config = zoo_config(name, **changes)
    if config is None:
        return None
    torch.manual_seed(seed)
    auto = hf.AutoModelForImageTextToText if name in MULTIMODAL else hf.AutoModelForCausalLM
    return enlarge(auto.from_config(config))
