"""Tiny GGUF files, written with the ``gguf`` package as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from tests.stages.tiny_models import tiny_model, tiny_tokenizer

NORMAL, CONTROL = 1, 3  # token types
TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"


def write_gguf(
    path: Path,
    model: PreTrainedModel | None = None,
    quantised: str | None = None,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
    leave_out: str = "",
) -> PreTrainedModel:
    """Write a tiny Llama with the tokenizer of ``tiny_models``; returns the model.

    Args:
        quantised: type of the matrices, such as "Q8_0"; float32 without.
        metadata: strings and numbers to add.
        extra: tensors to add.
        leave_out: a tensor that is not written.
    """
    import gguf

    model = model or tiny_model("llama", vocab_size=300)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, path)
    for name, value in (metadata or {}).items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == leave_out:
            continue
        array = _permuted(name, value, config).numpy()
        if quantised and array.ndim > 1 and array.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType[quantised]
            writer.add_tensor(_name(names, name), gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_name(names, name), array)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _name(names: Any, name: str) -> str:
    stem, _, end = name.rpartition(".")
    return f"{names.get_name(stem)}.{end}"


def _permuted(name: str, value: torch.Tensor, config: Any) -> torch.Tensor:
    """Rows of queries and keys in the order that llama.cpp's rotary embedding expects."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((count for kind, count in heads.items() if kind in name), None)
    if count is None:
        return value.contiguous()
    rows = value.reshape(count, 2, value.shape[0] // count // 2, *value.shape[1:])
    return rows.transpose(1, 2).reshape(value.shape).contiguous()


def _add_tokenizer(writer: Any, path: Path) -> None:
    folder = path.with_suffix(".tokenizer")
    tiny_tokenizer(folder)
    stored = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(stored["vocab"], key=stored["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if number < 3 else NORMAL for number in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in stored["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
