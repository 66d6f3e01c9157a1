"""Checks of an engine's output: its first batch against the full model's own logits, and no uniform distribution.

A wrong head, a forgotten scale or lost weights are found before anything is stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eopd.stages.engines.hidden import HiddenEngine
from eopd.stages.models.packing import Sequence

MOST_SEQUENCES, MOST_TOKENS, MOST_INPUT = 4, 128, 512
"""Limits of the check: sequences, response tokens each, and tokens of any but the shortest (a CPU has to read them)."""
UNIFORM = 3e-5
"""Nats from the entropy of equally probable tokens: rounding of float32."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
"""Mean total variation distance (probability) by dtype of the forward pass. Two honest kernels differ by float
rounding; a forgotten soft-cap, scale, bias, mask or sliding window moves far more mass than that."""


class Head(Protocol):
    """An LM head."""

    def logits(self, hidden: Tensor) -> Tensor: ...


@torch.inference_mode()
def check_first_batch(engine: HiddenEngine, head: Head, sequences: SequenceOf[Sequence]) -> str:
    """Compare distributions of a few sequences read side by side with those of the full model, which reads each alone.

    Returns:
        A line that says what was compared.

    Raises:
        ValueError: they disagree; with the numbers.
    """
    chosen = _choose(sequences)
    reference = engine.own_logits(chosen)
    if reference is None:
        return "not checked against the full model's logits: it does not fit this machine's memory, or is quantised"
    # logits that are not finite are the model's own fault, and are reported by the part that holds them
    finite = [number for number, own in enumerate(reference.logits) if bool(torch.isfinite(own).all())]
    if not finite:
        return "not checked against the full model's logits: they are NaN or infinite"
    logits = _side_by_side(engine, head, [chosen[number] for number in finite])
    pairs = [
        (engine_logits, reference.logits[number].cpu()) for engine_logits, number in zip(logits, finite, strict=True)
    ]
    distance = torch.cat([_total_variation(engine_logits, own) for engine_logits, own in pairs])
    tolerance = TOLERANCE[engine.dtype]
    mean, largest = float(distance.mean()), float(distance.max())
    if not mean <= tolerance:
        gap = max(float((engine_logits - own).abs().max()) for engine_logits, own in pairs)
        raise ValueError(
            f"engine {engine.name} {engine.version} disagrees with the full model's own logits ({reference.source}) "
            f"on {len(distance)} tokens ({engine.dtype}): total variation distance {mean:.3g} on average and "
            f"{largest:.3g} at most, {tolerance:g} allowed; logits differ by up to {gap:.3g}. Nothing was stored. Try "
            "the other engine."
        )
    return (
        f"checked against the full model's logits ({reference.source}): total variation distance {mean:.1e} on "
        f"{len(distance)} tokens of {len(pairs)} sequences read side by side"
    )


def _choose(sequences: SequenceOf[Sequence]) -> list[Sequence]:
    """Choose the shortest sequence with a response and longer ones of other lengths; at least two, of which one may be
    a prefix of the other."""
    ordered = sorted((one for one in sequences if len(one.response_ids)), key=lambda sequence: sequence.input_length)
    shortest = ordered[0]
    first = Sequence(shortest.context_ids, shortest.response_ids[:MOST_TOKENS])
    others = [one for one in ordered[1:] if one.input_length <= MOST_INPUT]
    if not others:
        return [first, Sequence(first.context_ids, first.response_ids[: -(-len(first.response_ids) // 2)])]
    places = np.linspace(0, len(others) - 1, min(MOST_SEQUENCES - 1, len(others))).astype(int)
    return [first, *(_ending(others[place]) for place in places)]


def _ending(sequence: Sequence) -> Sequence:
    """Return the sequence with at most the last ``MOST_TOKENS`` ids as its response."""
    ids = [*sequence.context_ids, *sequence.response_ids]
    count = min(MOST_TOKENS, len(sequence.response_ids))
    return Sequence(ids[:-count], ids[-count:])


def _side_by_side(engine: HiddenEngine, head: Head, sequences: SequenceOf[Sequence]) -> list[Tensor]:
    """Return the engine's logits [T, V] of each sequence, on the CPU, read in as few batches as it makes."""
    logits: dict[int, Tensor] = {}
    for batch in engine.hidden(sequences):
        pieces = batch.hidden.tensor_split(np.cumsum(batch.lengths)[:-1].tolist())
        for number, hidden in zip(batch.order, pieces, strict=True):
            logits[number] = head.logits(hidden).cpu()
    return [logits[number] for number in range(len(sequences))]


def refuse_uniform(entropy: NDArray[Any], vocab_size: int, path: str, setting: str, merged: int = 0) -> None:
    """Refuse a teacher that gives every token of the vocabulary the same probability everywhere.

    Args:
        entropy: [T] nats.
        setting: which one names the engine, for the message.
        merged: how many ids the entropies count as one outcome.

    Raises:
        ValueError: all entropies are those of the uniform distribution, which no trained model has; names the folder.
    """
    uniform = math.log(vocab_size)
    expected = uniform - (merged * math.log(merged) / vocab_size if merged else 0.0)
    if len(entropy) and float(np.abs(entropy - expected).max()) < UNIFORM:
        raise ValueError(
            f"{path}: all {len(entropy)} tokens have the entropy ln {vocab_size} = {uniform:.4f} nats, as if the "
            f"teacher's weights were zero or lost. Check its files, or set {setting} to another engine."
        )


def _total_variation(engine_logits: Tensor, own: Tensor) -> Tensor:
    """Return half the sum of absolute differences of two softmaxes [T]; NaN logits give NaN."""
    p, q = (torch.softmax(logits.double(), 1) for logits in (engine_logits, own))
    return (p - q).abs().sum(1) / 2
