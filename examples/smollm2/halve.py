"""A student of half the depth: every second layer of a model, in an ordinary model folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def kept_layers(layers: int, keep: int) -> list[int]:
    """Numbers of ``keep`` layers, evenly spread, the first and the last among them."""
    return [round(place * (layers - 1) / (keep - 1)) for place in range(keep)]


def halve(teacher: Path, student: Path, keep: int | None = None) -> list[int]:
    """Write the model in ``teacher`` with ``keep`` of its layers (default: half) to ``student``. Returns which."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    layers = model.model.layers
    kept = kept_layers(len(layers), keep or len(layers) // 2)
    model.model.layers = torch.nn.ModuleList([layers[number] for number in kept])
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[number] for number in kept]
    model.save_pretrained(student)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(student)
    return kept
