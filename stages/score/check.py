"""The first batch against the full model's own logits: a wrong head or engine is found before anything is stored."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from eopd.stages.engines.hidden import HiddenEngine
from eopd.stages.models.packing import Sequence

MOST_TOKENS = 128
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
"""Mean total variation distance (probability) by dtype of the forward pass. Two honest kernels differ by float
rounding; a forgotten soft-cap, scale, bias, mask or sliding window moves far more mass than that."""


def check_first_batch(engine: HiddenEngine, sequences: SequenceOf[Sequence]) -> str:
    """Compare distributions on the shortest sequence; returns a line saying what was found.

    Raises:
        ValueError: they disagree; with the numbers.
    """
    candidates = [sequence for sequence in sequences if len(sequence.response_ids)]
    if not candidates:
        return "no response to check on"
    shortest = min(candidates, key=lambda sequence: sequence.input_length)
    shortest = Sequence(shortest.context_ids, shortest.response_ids[:MOST_TOKENS])
    own = engine.own_logits(shortest)
    if own is None:
        return "not checked against the full model's logits: it does not fit this machine's memory, or is quantised"
    [batch] = list(engine.hidden([shortest]))
    found = engine.head.logits(batch.hidden.to(engine.head.weight.device))
    distance = _total_variation(found, own)
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


def _total_variation(found: Tensor, own: Tensor) -> Tensor:
    """[T] half the sum of absolute differences of two softmaxes; NaN logits give NaN."""
    p, q = (torch.softmax(logits.double().cpu(), 1) for logits in (found, own))
    return (p - q).abs().sum(1) / 2
