"""The first batch against the full model's own logits: a wrong head or engine is found before anything is stored."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from eopd.stages.engines.hidden import HiddenEngine
from eopd.stages.models.packing import Sequence
from eopd.stages.score.statistics import StatisticsHead
from eopd.stages.score.token_batch import NotFinite, TokenBatch

MOST_TOKENS = 128
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
"""Mean total variation distance (probability) by dtype of the forward pass. Two honest kernels differ by float
rounding; a forgotten soft-cap, scale, bias, mask or sliding window moves far more mass than that."""


@torch.inference_mode()
def check_first_batch(engine: HiddenEngine, head: StatisticsHead, sequences: SequenceOf[Sequence]) -> str:
    """Compare distributions on the shortest sequence; returns a line saying what was found.

    Raises:
        ValueError: they disagree; with the numbers.
    """
    shortest = min((one for one in sequences if len(one.response_ids)), key=lambda sequence: sequence.input_length)
    shortest = Sequence(shortest.context_ids, shortest.response_ids[:MOST_TOKENS])
    own = engine.own_logits(shortest)
    if own is None:
        return "not checked against the full model's logits: it does not fit this machine's memory, or is quantised"
    [batch] = list(engine.hidden([shortest]))
    found = head.logits(batch.hidden)
    # what is not finite in both is the model's own fault, and is reported by the part that holds it
    finite = torch.isfinite(found.cpu()).all(1) | torch.isfinite(own.cpu()).all(1)
    if not finite.any():
        return "not checked against the full model's logits: both are NaN or infinite"
    distance = _total_variation(found.cpu()[finite], own.cpu()[finite])
    tolerance = TOLERANCE[engine.dtype]
    mean, largest = float(distance.mean()), float(distance.max())
    if not mean <= tolerance:
        gap = float((found.cpu() - own.cpu()).abs().max())
        raise ValueError(
            f"engine {engine.name} {engine.version} disagrees with the full model's own logits on {len(distance)} "
            f"tokens ({engine.dtype}): total variation distance {mean:.3g} on average and {largest:.3g} at most, "
            f"{tolerance:g} allowed; logits differ by up to {gap:.3g}. Nothing was scored. Try the other score.engine."
        )
    return f"checked against the full model's logits: total variation distance {mean:.1e} on {len(distance)} tokens"


def first_not_finite(
    engine: HiddenEngine, head: StatisticsHead, sequences: SequenceOf[Sequence], suspects: SequenceOf[int]
) -> tuple[int, int]:
    """Which of ``suspects``, read together with NaN or infinite logits, is the cause: (its number, response token).

    Attention multiplies what it masks by 0, and 0 * NaN is NaN: one bad token spoils its whole row, neighbours and
    earlier tokens too. So each is read alone, and the first bad position found by reading ever closer prefixes.
    """
    for number in suspects:
        length = len(sequences[number].response_ids)
        if not _is_finite(engine, head, sequences[number], length):
            good, bad = 0, length
            while bad - good > 1:
                middle = (good + bad) // 2
                good, bad = (middle, bad) if _is_finite(engine, head, sequences[number], middle) else (good, middle)
            return number, bad - 1
    return suspects[0], 0  # gone when read alone: named by the first of them


def _is_finite(engine: HiddenEngine, head: StatisticsHead, sequence: Sequence, length: int) -> bool:
    prefix = Sequence(sequence.context_ids, sequence.response_ids[:length])
    [batch] = list(engine.hidden([prefix]))
    ids = np.asarray(prefix.response_ids, np.int64)
    try:
        head(batch.hidden, TokenBatch(ids, ids.astype(np.uint64)))
    except NotFinite:
        return False
    return True


def _total_variation(found: Tensor, own: Tensor) -> Tensor:
    """[T] half the sum of absolute differences of two softmaxes; NaN logits give NaN."""
    p, q = (torch.softmax(logits.double(), 1) for logits in (found, own))
    return (p - q).abs().sum(1) / 2
