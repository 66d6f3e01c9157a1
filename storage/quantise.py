"""Log-probs, entropies and ids as small integers, and back, with stated errors.

A log-prob x (nats, -50 <= x <= 0) is a multiple of ``STEP`` = 1/130 nat below zero. A token's head and tail are one
distribution and are quantised together, so that what is decoded sums to one *and* is within ``MAX_ERROR`` = 1/256:

* ``p_0 >= DERIVED_ABOVE``: the first entry is not stored; it is 1 minus the rest. Its error is the rest's times
  (1 - p_0) / p_0 < 1, so a sure token's log-prob is nearly exact and costs nothing.
* otherwise the decoder divides by the sum of what it decoded. Rounding errors e_i would then come back as e_i minus
  their p-weighted mean, up to one whole step. So the encoder adds an offset o to the row before it rounds, chosen so
  that this mean is zero: as o grows by a step the mean falls with slope -1 and jumps up wherever an entry changes
  its code, and is periodic, so it has a zero. The decoder needs not know o.

Letters: T tokens, K* head entries of all tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eopd.storage.teacher_record import LOGPROB_FLOOR, Float32, Int64

STEPS_PER_NAT = 130
MAX_ERROR = 1.0 / 256.0
"""Bound on the error of every decoded log-prob above the floor, nats."""
MAX_CODE = int(-LOGPROB_FLOOR * STEPS_PER_NAT)
DERIVED_ABOVE = 0.55
NORMALISATION_TOLERANCE = 2e-3

ENTROPY_STEPS_PER_NAT = 2600
MAX_ENTROPY_ERROR = 2e-4

Codes = NDArray[np.int32]

_PROBABILITY = np.exp(-np.arange(MAX_CODE + 1) / STEPS_PER_NAT)
_PROBABILITY[MAX_CODE] = 0.0  # at the floor there is no mass


def encode_logprob(logprob: NDArray[Any]) -> Codes:
    """[N] nats -> codes 0 .. MAX_CODE; below the floor is the floor."""
    codes = np.rint(np.asarray(logprob, np.float64) * -STEPS_PER_NAT)
    return np.clip(codes, 0, MAX_CODE).astype(np.int32)


def decode_logprob(codes: NDArray[Any]) -> Float32:
    return (codes * np.float32(-1.0 / STEPS_PER_NAT)).astype(np.float32)


def encode_entropy(entropy: NDArray[Any]) -> NDArray[np.uint16]:
    """[T] nats -> codes; error at most MAX_ENTROPY_ERROR. Raises ValueError where it is no entropy."""
    if entropy.size and not (np.isfinite(entropy).all() and entropy.min() > -1e-3 and entropy.max() < 25.0):
        raise ValueError(f"entropy must be in [0, 25) nats, got {entropy.min()} .. {entropy.max()}")
    return np.rint(np.maximum(entropy, 0.0).astype(np.float64) * ENTROPY_STEPS_PER_NAT).astype(np.uint16)


def decode_entropy(codes: NDArray[Any]) -> Float32:
    return (codes * np.float32(1.0 / ENTROPY_STEPS_PER_NAT)).astype(np.float32)


def _segment_sums(values: NDArray[np.float64], offsets: Int64) -> NDArray[np.float64]:
    return np.add.reduceat(values, offsets[:-1]) if len(offsets) > 1 else np.zeros(0)


def balancing_offset(scaled: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Per row the o in [0, 1) for which sum_i w_i (round(x_i + o) - x_i - o) = 0.

    Args:
        scaled: [N, M] log-probs in steps, padded anyhow where the weight is 0.
        weights: [N, M] probabilities; each row sums to 1.
    """
    # entry i changes its code at o_i; just after the j-th change the mean error is base + sum_{i<=j} w_i - o_j
    changes = np.mod(np.rint(scaled) + 0.5 - scaled, 1.0)
    order = np.argsort(changes, axis=1)
    changes = np.take_along_axis(changes, order, axis=1)
    gained = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)
    base = (weights * (np.rint(scaled) - scaled)).sum(axis=1)
    starts = np.concatenate([np.zeros((len(scaled), 1)), changes], axis=1)
    ends = np.concatenate([changes, np.ones((len(scaled), 1))], axis=1)
    zeros = base[:, None] + np.concatenate([np.zeros((len(scaled), 1)), gained], axis=1)
    best = np.argmin(np.maximum(starts - zeros, zeros - ends), axis=1)[:, None]
    zero = np.take_along_axis(np.clip(zeros, starts, ends), best, axis=1)
    return zero[:, 0]


def encode_rows(head: Float32, offsets: Int64, tail: Float32) -> tuple[Codes, Codes]:
    """Quantise heads [K*] of rows ``offsets`` [T+1] together with their tail masses [T].

    Returns:
        codes [K*] (0 as a row's first: derived) and tail codes [T].

    Raises:
        ValueError: a row is empty, not sorted, above zero, or does not sum to one.
    """
    sizes = np.diff(offsets)
    _check_rows(head, offsets, tail)
    if not len(sizes):
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    first = offsets[:-1]
    derived = head[first] >= np.log(DERIVED_ABOVE)
    shift = np.zeros(len(sizes))
    rows = np.flatnonzero(~derived)
    for low in range(0, len(rows), 16_384):
        some = rows[low : low + 16_384]
        shift[some] = _row_offsets(head, offsets, tail, some)
    scaled = head.astype(np.float64) * STEPS_PER_NAT + np.repeat(shift, sizes)
    codes = np.clip(-np.rint(scaled), 0, MAX_CODE).astype(np.int32)
    codes[first[derived]] = 0
    tail_codes = np.clip(-np.rint(tail * np.float64(STEPS_PER_NAT) + shift), 0, MAX_CODE).astype(np.int32)
    tail_codes[tail <= LOGPROB_FLOOR] = MAX_CODE
    return codes, tail_codes


def _row_offsets(head: Float32, offsets: Int64, tail: Float32, rows: Int64) -> NDArray[np.float64]:
    width = int((offsets[rows + 1] - offsets[rows]).max())
    columns = offsets[rows][:, None] + np.arange(width)
    inside = columns < offsets[rows + 1][:, None]
    values = np.full((len(rows), width + 1), LOGPROB_FLOOR, np.float64)
    values[:, :width] = np.where(inside, head[np.minimum(columns, len(head) - 1)], LOGPROB_FLOOR)
    values[:, width] = tail[rows]
    weights = np.where(values > LOGPROB_FLOOR, np.exp(values), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    return balancing_offset(values * STEPS_PER_NAT, weights)


def decode_rows(codes: NDArray[Any], offsets: Int64, tail_codes: NDArray[Any]) -> tuple[Float32, Float32]:
    """The inverse: head log-probs [K*] and tail log-masses [T], jointly normalised in every row."""
    if len(offsets) < 2:
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    first = offsets[:-1]
    derived = codes[first] == 0
    probability = _PROBABILITY[codes]
    probability[first[derived]] = 0.0
    tail_mass = _PROBABILITY[tail_codes]
    total = _segment_sums(probability, offsets) + tail_mass
    log_total = np.where(derived, 0.0, np.log(np.where(derived, 1.0, total))).astype(np.float32)
    head = decode_logprob(codes) - np.repeat(log_total, np.diff(offsets))
    head[first[derived]] = np.log1p(-np.minimum(total[derived], 0.5)).astype(np.float32)
    tail = np.where(tail_codes == MAX_CODE, np.float32(LOGPROB_FLOOR), decode_logprob(tail_codes) - log_total)
    return head, tail.astype(np.float32)


def _check_rows(head: Float32, offsets: Int64, tail: Float32) -> None:
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
    total = _segment_sums(np.exp(head.astype(np.float64)), offsets) + np.exp(tail.astype(np.float64))
    wrong = np.abs(total - 1.0) > NORMALISATION_TOLERANCE
    if wrong.any():
        token = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"head and tail of token {token} sum to {total[token]:.6f}, not 1")
