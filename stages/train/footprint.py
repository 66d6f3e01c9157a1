"""The size of a checkpoint before any exists, from the shapes of the student's tensors.

Nothing here loads a model: shapes are in the headers of its safetensors files. Sizes are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eopd.stages.models.weight_files import read_tensors
from eopd.stages.train.settings import LoraSettings, TrainSettings

Shapes = Mapping[str, tuple[int, ...]]

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MOMENTS = 2  # of AdamW: means of the gradient and of its square
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_out")


@dataclass(frozen=True)
class CheckpointBytes:
    """Bytes of one round's checkpoint, by part, and of a resumable state while the round trains."""

    weights: int
    optimizer: int
    state: int


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model folder, by the headers of its weights. Raises ValueError
    (``weight_files``)."""
    return {name: tensor.shape for name, tensor in read_tensors(folder).items()}


def parameter_count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def adapter_count(shapes: Shapes, lora: LoraSettings) -> int:
    """Count the parameters of the low-rank adapters: rank * (in + out) of every matrix that gets one."""
    sizes = 0
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if len(shape) != 2 or any(part in EMBEDDINGS for part in layer.split(".")):
            continue
        if lora.target_modules == "all-linear" or layer.endswith(lora.target_modules):
            sizes += lora.rank * (shape[0] + shape[1])
    return sizes


def checkpoint_bytes(shapes: Shapes, train: TrainSettings) -> CheckpointBytes:
    """Return the bytes of a checkpoint's two parts and of a resumable state, without tokenizer files and stored
    log-probs."""
    size = BYTES[train.param_dtype]
    weights = parameter_count(shapes) * size
    trained = weights if train.lora is None else adapter_count(shapes, train.lora) * size
    average = 0 if train.ema is None else parameter_count(shapes) * BYTES["float32"]
    moments = MOMENTS * trained
    adapter = 0 if train.lora is None else trained
    return CheckpointBytes(weights, moments + average + adapter, trained + moments + average)
