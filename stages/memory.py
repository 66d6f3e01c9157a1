"""Peak memory of a stage before anything is loaded, from the shapes in config.json and the settings. Needs no torch.

    size = ModelSize.read(folder)
    training(size, settings.train, longest=5120, gpu_bytes=80 << 30).bytes

A sum of what is alive at the same time, in a decoder of the usual kind (attention and a gated MLP in every layer).
`python -m benchmarks.memory` compares it with measured peaks; so do tests, with fake tensors on `cuda`.

Letters: T tokens of a forward pass, L tokens of its longest row, D hidden size, I intermediate size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eopd.stages.engines.kept import resolve_engine
from eopd.stages.engines.sampling import EngineKind, EngineOptions
from eopd.stages.train.settings import TrainSettings

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 2**30
CONTEXT_BYTES = GIB
"""Memory that a process takes of a GPU before its first tensor, and that torch's allocator cannot use."""

HEAD_WORKSPACE_BYTES = 256 * 2**20
"""Logits of the student's head alive at once on a CPU, and on a GPU at least."""
LARGEST_HEAD_WORKSPACE_BYTES = GIB
HEAD_WORKSPACE_SHARE = 1 / 64
"""Share of a GPU's memory for the logits of a chunk, each of which reads and writes the whole gradient [V, D]."""
GPU_GROUP_BYTES = 128 * 2**20
GROUP_BYTES = 16 * 2**20
"""Rows handled together between reading and writing the workspace: on a CPU few enough to stay in its cache, many
enough that threads do not wait for each other more than they work."""
DRAW_BYTES = 34 * 64 * 20
"""Bytes of a row with draws from its tail: a draw for each 0.03 of its mass, and the 64 ids near each in float64."""
SCORE_CHUNK_BYTES = {"cuda": 512 * 2**20, "cpu": 320 * 2**20}


def head_rows(vocabulary: int, itemsize: int = 4, gpu_bytes: int = 0) -> int:
    """Return the rows of a chunk in the student's head, a multiple of 32, on a GPU with ``gpu_bytes`` (0: a CPU)."""
    workspace = min(max(HEAD_WORKSPACE_BYTES, int(gpu_bytes * HEAD_WORKSPACE_SHARE)), LARGEST_HEAD_WORKSPACE_BYTES)
    return max(32, workspace // (vocabulary * itemsize) // 32 * 32)


@dataclass(frozen=True)
class ModelSize:
    """The shapes of a decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # the LM head is the embedding
    norms_heads: bool  # queries and keys are normalised, as in Qwen3
    dtype: str = "float32"  # of the stored weights

    @classmethod
    def read(cls, folder: Path) -> ModelSize | None:
        """Return the shapes of a model folder; None if they cannot be read, or are of another kind of model."""
        try:
            return cls.of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelSize | None:
        text = {**config, **(config.get("text_config") or {})}
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if not all(isinstance(text.get(name), int) for name in needed) or any("expert" in name for name in text):
            return None
        heads = text["num_attention_heads"]
        return cls(
            hidden=text["hidden_size"],
            intermediate=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            heads=heads,
            kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or text["hidden_size"] // heads,
            vocabulary=text["vocab_size"],
            tied=bool(text.get("tie_word_embeddings", False)),
            norms_heads=str(text.get("model_type", "")).startswith(("qwen3", "gemma3")),
            dtype=str(text.get("dtype") or text.get("torch_dtype") or "float32").removeprefix("torch."),
        )

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """Parameters of the LM head, and of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        attention = 2 * self.hidden * self.queries + 2 * self.hidden * self.keys
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + (1 if self.tied else 2) * self.embedding + self.hidden

    def adapters(self, rank: int) -> int:
        """Parameters of low-rank adapters on every linear layer."""
        attention = 2 * (self.hidden + self.queries) + 2 * (self.hidden + self.keys)
        return rank * self.layers * (attention + 3 * (self.hidden + self.intermediate))

    def cache(self, tokens: int, width: int) -> int:
        """Bytes of the keys and values of ``tokens`` tokens."""
        return 2 * self.layers * self.keys * tokens * width


@dataclass(frozen=True)
class Memory:
    """Bytes that are alive at the worst moment of a stage, by what they are."""

    parts: Mapping[str, int]
    taken: float | None = None  # the share of a GPU that vLLM takes, whatever it needs

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


# Bytes a token and layer that are kept for the backward pass, as multiples of (D, queries, keys, I), by arithmetic and
# whether adapters are trained; measured on fake tensors. Queries and keys that are normalised take more.
_KEPT = {
    ("autocast", False): (26.0, 8.0, 0.0, 8.0),
    ("autocast", True): (18.0, 8.0, 0.0, 8.0),
    ("bfloat16", False): (16.0, 8.0, 0.0, 8.0),
    ("bfloat16", True): (28.0, 10.0, 0.0, 10.0),
    ("float32", False): (24.0, 16.0, 0.0, 16.0),
    ("float32", True): (16.0, 12.0, 0.0, 16.0),
}
_KEPT_BY_NORMS = {2: (6.0, 6.0), 4: (8.0, 8.0)}  # of queries and keys, by the bytes of the arithmetic
_KEPT_BY_HEAD = 9.4


def training(
    size: ModelSize,
    settings: TrainSettings,
    *,
    longest: int,
    gpu_bytes: int,
    step_tokens: int | None = None,
) -> Memory:
    """Return the memory of one process of the train stage.

    Args:
        longest: tokens of the longest prompt and response; such a sequence has a row of its own.
        gpu_bytes: of the GPU; 0: a CPU.
        step_tokens: tokens of an optimiser step at most; None: of as many responses as the settings say.
    """
    on_gpu, lora = gpu_bytes > 0, settings.lora
    row = max(settings.row_tokens, longest)
    tokens = max(settings.micro_batch_tokens, row)
    step = step_tokens or settings.batch_responses * longest
    tokens, row = min(tokens, step), min(row, step)
    width = BYTES[settings.param_dtype]
    autocast = settings.autocast == "bf16"
    kind = "autocast" if autocast and width == 4 else settings.param_dtype
    arithmetic = 2 if autocast or width == 2 else 4
    trained = size.parameters if lora is None else size.adapters(lora.rank)
    adapters = 0 if lora is None else trained
    shards = settings.processes if settings.sharding == "fsdp" else 1
    by_d, by_queries, by_keys, by_i = _KEPT[kind, lora is not None]
    if size.norms_heads:
        by_queries += _KEPT_BY_NORMS[arithmetic][0]
        by_keys += _KEPT_BY_NORMS[arithmetic][1]
    kept = tokens * round(
        by_d * size.hidden
        + by_queries * size.queries
        + by_keys * size.keys
        + by_i * size.intermediate
        + _KEPT_BY_HEAD * size.heads
        + arithmetic * row  # the mask of packed rows, in the dtype of the scores
    )
    checkpointing = settings.gradient_checkpointing
    inputs = size.layers * tokens * size.hidden * width
    saved = inputs if checkpointing else size.layers * kept
    casts = 2 * size.layers * size.layer if kind == "autocast" else 0
    ends = 4 * tokens * size.hidden * width
    gradients = trained * width // shards if step > tokens else 0  # of the micro-batches before
    gathered = 0 if shards == 1 else (size.embedding + 2 * size.layer) * width
    parts = {
        "weights": (size.parameters + adapters) * width // shards,
        "moments": 2 * trained * width // shards,
        "average": 0 if settings.ema is None else 4 * trained // shards,
    }
    weight_gradient = 0 if lora is not None else 4 * size.embedding
    head = weight_gradient + _head_bytes(size, settings, min(tokens, step), gpu_bytes, low=arithmetic == 2)
    backward = kept + _backward_bytes(size, tokens, arithmetic) + (2 * size.layer if kind == "autocast" else 0)
    moments_of = {  # what is alive beside the weights, their moments and averages
        "loss": gradients + saved + ends + head + (casts if lora is None or not checkpointing else 0) + gathered,
        "backward": gradients
        + saved
        + ends
        + weight_gradient
        + (backward if checkpointing else casts + _backward_bytes(size, tokens, arithmetic))
        + gathered,
        "update": trained * width // shards
        + (2 * size.embedding * 4 if size.tied and lora is None else weight_gradient)
        + ends
        + gathered,
    }
    worst = max(moments_of, key=lambda name: moments_of[name])
    parts |= {f"gradients and activations ({worst})": moments_of[worst]}
    if on_gpu:
        parts["context"] = CONTEXT_BYTES
    return Memory({name: taken for name, taken in parts.items() if taken})


def _head_bytes(size: ModelSize, settings: TrainSettings, tokens: int, gpu_bytes: int, *, low: bool) -> int:
    """Return what the student's head takes beside the gradient of its weight."""
    most = settings.head_chunk_tokens or head_rows(size.vocabulary, 4, gpu_bytes)
    chunks = -(-tokens // most)
    rows = -(-tokens // chunks)
    logits = 4 * rows * size.vocabulary
    group = min(GPU_GROUP_BYTES if gpu_bytes else GROUP_BYTES, logits)
    if not low:
        return logits + group
    if not gpu_bytes:
        return logits + group + 4 * size.hidden * 8192
    weight = 2 * size.embedding if settings.param_dtype == "float32" else 0
    return logits + max(group, logits // 2) + weight


def _backward_bytes(size: ModelSize, tokens: int, arithmetic: int) -> int:
    """Return the gradients of activations inside one layer."""
    return tokens * arithmetic * (3 * size.intermediate + 2 * size.hidden)


def reading(
    size: ModelSize,
    dtype: str,
    kind: EngineKind,
    options: EngineOptions,
    *,
    tokens: int,
    row_tokens: int,
    longest: int,
    gpu_bytes: int,
    statistics: bool = True,
) -> Memory:
    """Return the memory of an engine that reads, on one GPU, and of the statistics of its hidden states.

    Args:
        dtype: of the weights; auto: as they are stored.
        tokens: of one forward pass, about; at least one row.
        statistics: whether every token's distribution is reduced (the score stage).
    """
    width, on_gpu = BYTES[size.dtype if dtype == "auto" else dtype], gpu_bytes > 0
    by_vllm = resolve_engine(kind) == "vllm"
    row = max(row_tokens, longest)
    tokens = max(tokens, row)
    mask = tokens * row * (1 + width)
    layer = max(3 * size.intermediate * width, 4 * size.queries * 4) + size.hidden * (2 * width + 4)
    parts = {
        "weights": size.parameters * width // (options.tensor_parallel if by_vllm else 1),
        "activations": tokens * layer + (0 if by_vllm else mask),
        "hidden states": tokens * size.hidden * width,
    }
    if statistics:
        rows = score_rows(size.vocabulary, on_gpu=on_gpu)
        logits = 4 * rows * size.vocabulary
        own = 0 if on_gpu or width == 4 else 4 * size.embedding
        parts["logits"] = (2 * logits if on_gpu else round(1.1 * logits)) + own + rows * DRAW_BYTES
    if on_gpu:
        parts["context"] = CONTEXT_BYTES
    return Memory(parts, options.gpu_memory_utilization if by_vllm and on_gpu else None)


def score_rows(vocabulary: int, *, on_gpu: bool) -> int:
    """Return the rows of a chunk of the statistics head."""
    padded = -(-vocabulary // 64) * 64
    return max(16, min(1024, SCORE_CHUNK_BYTES["cuda" if on_gpu else "cpu"] // (4 * padded) // 64 * 64))


def sampling(
    size: ModelSize,
    dtype: str,
    kind: EngineKind,
    options: EngineOptions,
    *,
    longest: int,
    gpu_bytes: int,
    contexts: int = 1,
) -> Memory:
    """Return the least memory that an engine which samples can work in, on one GPU: with one sequence at a time.

    Args:
        dtype: of the weights; auto: as they are stored.
        longest: tokens of the longest prompt and response.
        contexts: how many a response follows, each with keys and values of its own.
    """
    width, shards = BYTES[size.dtype if dtype == "auto" else dtype], options.tensor_parallel
    by_vllm = resolve_engine(kind) == "vllm"
    parts = {
        "weights": size.parameters * width // (shards if by_vllm else 1),
        "keys and values": contexts * size.cache(longest, width) // (shards if by_vllm else 1),
        "logits": 4 * 4 * size.vocabulary,
    }
    if gpu_bytes:
        parts["context"] = CONTEXT_BYTES
    elif by_vllm:
        parts["keys and values"] = round(options.cpu_kv_cache_gib * GIB)
    return Memory(parts, options.gpu_memory_utilization if by_vllm and gpu_bytes else None)
