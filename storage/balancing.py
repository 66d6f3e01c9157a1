"""Heads and tails of tokens as codes (``storage.quantise``): checked, and rounded so that their errors cancel.

Letters: T tokens, K* head entries of all tokens, M entries of one row: its head and its tail.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eopd.storage.compiled import compiled
from eopd.storage.quantise import DERIVED_ABOVE, MAX_CODE, NORMALISATION_TOLERANCE, STEPS_PER_NAT, Codes
from eopd.storage.teacher_record import LOGPROB_FLOOR, Float32, Int64

Float64 = NDArray[np.float64]


def encode_rows(head: Float32, offsets: Int64, tail: Float32) -> tuple[Codes, Codes]:
    """Quantise heads [K*] of rows ``offsets`` [T+1] together with their tail masses [T].

    Returns:
        codes [K*] (0 as a row's first: derived) and tail codes [T].

    Raises:
        ValueError: a row is empty, not sorted, above zero, or does not sum to one.
    """
    _check_heads(head, offsets)
    mass, tail_mass = _mass(head), _mass(tail)
    _check_sums(mass, offsets, tail_mass)
    codes, tail_codes = np.empty(len(head), np.int32), np.empty(len(tail), np.int32)
    room = np.empty((4, int(np.diff(offsets).max(initial=0)) + 1))
    _encode_rows(head, mass, offsets, tail, tail_mass, codes, tail_codes, room)
    return codes, tail_codes


def _mass(logprob: Float32) -> Float64:
    return np.where(logprob > LOGPROB_FLOOR, np.exp(logprob.astype(np.float64)), 0.0)


def _check_heads(head: Float32, offsets: Int64) -> None:
    sizes = np.diff(offsets)
    if len(sizes) and sizes.min() < 1:
        raise ValueError(f"token {int(np.argmin(sizes))} has an empty head; every token keeps at least one entry")
    if head.size and not (np.isfinite(head).all() and head.max() < 1e-4):
        raise ValueError(f"head log-probs must be finite and at most 0, got {head.min()} .. {head.max()}")
    rising = np.diff(head) > 1e-6
    rising[offsets[1:-1] - 1] = False
    if rising.any():
        token = int(np.searchsorted(offsets, np.flatnonzero(rising)[0], "right")) - 1
        raise ValueError(f"the head of token {token} is not sorted, most probable first")


def _check_sums(mass: Float64, offsets: Int64, tail_mass: Float64) -> None:
    total = np.add.reduceat(mass, offsets[:-1]) + tail_mass if len(tail_mass) else tail_mass
    wrong = np.abs(total - 1.0) > NORMALISATION_TOLERANCE
    if wrong.any():
        token = int(np.argmax(wrong))
        raise ValueError(f"head and tail of token {token} sum to {total[token]:.6f}, not 1")


@compiled
def _encode_rows(
    head: Float32,
    mass: Float64,
    offsets: Int64,
    tail: Float32,
    tail_mass: Float64,
    codes: Codes,
    tail_codes: Codes,
    room: Float64,
) -> None:
    """Fill ``codes`` [K*] and ``tail_codes`` [T]; the masses are those of the log-probs, ``room`` is [4, largest M]."""
    scaled, weights, changes, gains = room[0], room[1], room[2], room[3]
    for t in range(len(tail)):
        low, high = offsets[t], offsets[t + 1]
        entries = high - low + 1
        derived = mass[low] >= DERIVED_ABOVE
        shift = 0.0
        if not derived:
            total = tail_mass[t]
            for i in range(low, high):
                total += mass[i]
            for i in range(low, high):
                scaled[i - low] = np.float64(head[i]) * STEPS_PER_NAT
                weights[i - low] = mass[i] / total
            scaled[entries - 1] = np.float64(tail[t]) * STEPS_PER_NAT
            weights[entries - 1] = tail_mass[t] / total
            shift = balancing_offset(scaled[:entries], weights[:entries], changes, gains)
        for i in range(low, high):
            codes[i] = _code(head[i], shift)
        if derived:
            codes[low] = 0
        tail_codes[t] = _code(tail[t], shift) if tail_mass[t] > 0.0 else MAX_CODE


@compiled
def _code(logprob: float, shift: float) -> int:
    return int(min(max(-np.rint(np.float64(logprob) * STEPS_PER_NAT + shift), 0.0), MAX_CODE))


@compiled
def balancing_offset(scaled: Float64, weights: Float64, changes: Float64, gains: Float64) -> float:
    """Return the o in [0, 1] for which sum_i w_i (round(x_i + o) - x_i - o) = 0.

    Args:
        scaled: [M] log-probs x in steps; overwritten.
        weights: [M] probabilities w that sum to 1.
        changes, gains: room for M numbers each: the offsets at which entries change their code, ascending, and the
            weight of each.
    """
    base = 0.0
    for i in range(len(scaled)):
        rounded = np.rint(scaled[i])
        base += weights[i] * (rounded - scaled[i])
        change = rounded + 0.5 - scaled[i]
        scaled[i] = change if change < 1.0 else 0.0
    for i in range(len(scaled)):
        place = 0  # rows are short: counting what comes before is faster than sorting
        for j in range(i):
            place += scaled[j] <= scaled[i]
        for j in range(i + 1, len(scaled)):
            place += scaled[j] < scaled[i]
        changes[place], gains[place] = scaled[i], weights[i]
    # from one change to the next the mean error is base + gained - o: of its zeros, take the one furthest inside
    best, outside = 0.0, np.inf
    start, gained = 0.0, 0.0
    for i in range(len(scaled) + 1):
        end = changes[i] if i < len(scaled) else 1.0
        zero = base + gained
        if max(start - zero, zero - end) < outside:
            outside = max(start - zero, zero - end)
            best = min(max(zero, start), end)
        start = end
        gained += gains[i] if i < len(scaled) else 0.0
    return best
