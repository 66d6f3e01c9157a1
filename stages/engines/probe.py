"""Probe that an engine serves the right weights: log-probs of fixed sequences against the checkpoint's own.

After weights are replaced in place an engine may serve the old ones or a mixture, and its samples would not show it.
The reference is computed from the checkpoint by transformers on the CPU and shares nothing with the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from eopd.stages.engines.sampling import SamplingEngine
from eopd.stages.engines.sampling_transformers import sequence_logprobs
from eopd.stages.job import ModelRef
from eopd.stages.models.loading import load_model, model_folder
from eopd.stages.models.memory import free_memory, weight_bytes
from eopd.stages.models.model_config import read_config, resolve_dtype

SEQUENCES, TOKENS = 4, 16
TOLERANCE = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
"""Mean absolute difference of log-probs, nats, by dtype. Two honest float32 kernels differ by 1e-6 on tiny models and
1e-5 on large ones; half precision by its rounding (2^-11, 2^-8) times logits of about 10. What is left of old weights
below this would change no rollout by more than the choice of an engine does."""
MEMORY_FOR_PROBE = 1.5
"""The reference is loaded if this many times the weights' size is free."""

Logprobs = list[NDArray[np.float32]]


def probe_sequences(vocab_size: int, longest: int) -> list[list[int]]:
    """Return fixed pseudo-random ids: the same for every engine of one vocabulary, at most ``longest`` tokens each."""
    length = min(TOKENS, longest)
    raw = np.random.PCG64(0).random_raw(SEQUENCES * TOKENS).reshape(SEQUENCES, TOKENS)
    return [[int(word % vocab_size) for word in row[:length]] for row in raw]


def replace_weights(engine: SamplingEngine, old: ModelRef, new: ModelRef) -> None:
    """Give ``engine``, which serves ``old``, the weights of ``new`` in place, and prove that it serves them.

    Args:
        old, new: models of one shape, with the dtype they are served in.
    Raises:
        ValueError: it does not, or that cannot be told; the engine is to be closed and a new one opened.
    """
    sequences = probe_sequences(_vocab_size(new), engine.max_tokens - 1)
    reference = own_logprobs(new, sequences)
    before = engine.logprobs_of(sequences)
    engine.load(new)
    after = engine.logprobs_of(sequences)
    gap = difference(after, reference)
    allowed = TOLERANCE[new.dtype]
    if not gap <= allowed:
        raise ValueError(
            f"its log-probs differ from the checkpoint's own by {gap:.2g} nats on average ({allowed:g} allowed)"
        )
    # small steps can hide below the tolerance: then at least something must have moved, if it should
    if _equal(before, after) and not _equal(reference, own_logprobs(old, sequences)):
        raise ValueError("its log-probs did not change at all")


def own_logprobs(ref: ModelRef, sequences: Sequence[Sequence[int]]) -> Logprobs:
    """Compute log-probs by transformers on the CPU. Raises ValueError if the model does not fit the free memory."""
    folder = model_folder(ref.path, ref.revision)
    if weight_bytes(folder) * MEMORY_FOR_PROBE > free_memory():
        raise ValueError("there is not enough free memory to compute the checkpoint's own log-probs")
    with torch.inference_mode():
        model = load_model(ref, "cpu")
        return [sequence_logprobs(model, sequence, "cpu") for sequence in sequences]


def difference(served: Logprobs, reference: Logprobs) -> float:
    """Return the mean absolute difference in nats; NaN if either side has one."""
    return float(np.abs(np.concatenate(served) - np.concatenate(reference)).mean())


def _equal(first: Logprobs, second: Logprobs) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def _vocab_size(ref: ModelRef) -> int:
    config = read_config(model_folder(ref.path, ref.revision))
    return int(config.get("text_config", config)["vocab_size"])


def served(ref: ModelRef) -> ModelRef:
    """Return ``ref`` with its serving dtype: its own, or the checkpoint's."""
    folder = model_folder(ref.path, ref.revision)
    return replace(ref, dtype=resolve_dtype(folder, ref.dtype))
