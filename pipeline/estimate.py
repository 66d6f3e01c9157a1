"""What a run takes on disk, before any of it is there: checkpoints from the model's shapes, data from what is known.

    sizes = checkpoint_bytes(read_shapes(folder), settings.train)
    peak = peak_bytes(sizes, data, Keep(weights=2, optimizer=1))

Nothing here loads a model: shapes are in the headers of its safetensors files. Sizes are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eopd.pipeline.config import ConfigError
from eopd.stages.models.weight_files import read_tensors
from eopd.stages.score.settings import HeadSettings
from eopd.stages.train.settings import LoraSettings, TrainSettings

Shapes = Mapping[str, tuple[int, ...]]

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MOMENTS = 2  # of AdamW: means of the gradient and of its square

ROLLOUT_TOKEN = 12.0  # id, log-prob and text of a token in Parquet, before compression; prompts are left out
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_out")


@dataclass(frozen=True)
class CheckpointBytes:
    """Of one round's checkpoint, and of a resumable state while the round trains."""

    weights: int
    optimizer: int
    state: int


@dataclass(frozen=True)
class Keep:
    """How many of the newest checkpoints keep their weights and their optimiser state; None: all do.

    The newest one is never pruned: the next round trains from it.
    """

    weights: int | None = None
    optimizer: int | None = None

    def __post_init__(self) -> None:
        assert self.weights is None or self.weights >= 1, self
        assert self.optimizer is None or self.optimizer >= 1, self


KEEP_ALL = Keep()


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model folder, from the headers of its weights.

    Raises:
        ConfigError: its weight files are refused by ``weight_files``, or are no safetensors files.
    """
    try:
        return {name: tensor.shape for name, tensor in read_tensors(folder).items()}
    except ValueError as error:
        raise ConfigError(str(error)) from error


def parameter_count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def adapter_count(shapes: Shapes, lora: LoraSettings) -> int:
    """Parameters of the low-rank adapters: rank * (in + out) of every matrix that gets one."""
    sizes = 0
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if len(shape) != 2 or any(part in EMBEDDINGS for part in layer.split(".")):
            continue
        if lora.target_modules == "all-linear" or layer.endswith(lora.target_modules):
            sizes += lora.rank * (shape[0] + shape[1])
    return sizes


def checkpoint_bytes(shapes: Shapes, train: TrainSettings) -> CheckpointBytes:
    """Bytes of a checkpoint's two parts and of a resumable state; the tokenizer and log-probs in it are left out."""
    size = BYTES[train.param_dtype]
    weights = parameter_count(shapes) * size
    trained = weights if train.lora is None else adapter_count(shapes, train.lora) * size
    average = 0 if train.ema is None else parameter_count(shapes) * BYTES["float32"]
    moments = MOMENTS * trained
    adapter = 0 if train.lora is None else trained
    return CheckpointBytes(weights, moments + average + adapter, trained + moments + average)


def peak_bytes(
    checkpoint: CheckpointBytes, data: Sequence[int], keep: Keep = KEEP_ALL, states: int = 1, trained: int = 0
) -> int:
    """Bytes of a run's own artifacts at their worst moment: a round's checkpoint committed, nothing pruned yet.

    Args:
        data: of each round, its rollouts, scores and evaluations when they are complete.
        keep: what pruning leaves.
        states: resumable states kept while a round trains; the next one is written before the oldest goes.
        trained: rounds whose checkpoints are there (or pruned) already; the peak is that of the rounds after them.
    """
    peak = so_far = 0
    for round_, added in enumerate(data):
        so_far += added
        before = _kept(round_, keep.weights) * checkpoint.weights + _kept(round_, keep.optimizer) * checkpoint.optimizer
        writing = checkpoint.weights + checkpoint.optimizer + states * checkpoint.state
        while_training = max(writing, (states + 1) * checkpoint.state)
        if round_ >= trained:
            peak = max(peak, so_far + before + while_training)
    return max(
        peak,
        so_far
        + _kept(len(data), keep.weights) * checkpoint.weights
        + _kept(len(data), keep.optimizer) * checkpoint.optimizer,
    )


def _kept(made: int, limit: int | None) -> int:
    return made if limit is None else min(made, limit)


def score_token_bytes(head: HeadSettings, vocabulary: int) -> float:
    """Bytes of one scored token, about; ``storage.size_bound`` has what no teacher can exceed.

    Heads that follow the entropy: of a model that is hardly ever sure (`python -m benchmarks.cache --only real`), 48.0,
    74.9 and 130.6 at k_max 16, 32 and 64 with 11 bits an id, and 65.7 at k_max 16 with 17. Fixed heads: uniform ids.
    """
    if head.full_head_above < 0:
        return 15.0 + 2.9 * head.k_max + 3.0 * head.n_draws
    bits = math.log2(max(vocabulary, 2)) - 11.0
    return 20.0 + (1.75 + 0.175 * bits) * head.k_max + 3.0 * head.n_draws
