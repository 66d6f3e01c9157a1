"""Log-probs, entropies and ids as small integers, and back, with stated errors.

A log-prob x (nats, -50 <= x <= 0) is a multiple of ``STEP`` = 1/130 nat below zero. A token's head and tail are one
distribution and are quantised together, so that what is decoded sums to one *and* is within ``MAX_ERROR`` = 1/256:

* ``p_0 >= DERIVED_ABOVE``: the first entry is not stored; it is 1 minus the rest. Its error is the rest's times
  (1 - p_0) / p_0 < 1, so a sure token's log-prob is nearly exact and costs nothing.
* otherwise the decoder divides by the sum of what it decoded. Rounding errors e_i would then come back as e_i minus
  their p-weighted mean, up to one whole step. So the encoder adds an offset o to the row before it rounds, chosen so
  that this mean is zero: as o grows by a step the mean falls with slope -1 and jumps up wherever an entry changes
  its code, and is periodic, so it has a zero. The decoder needs not know o.

Rows are encoded by ``storage.balancing``.

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
LARGEST_ENTROPY = 25.0
"""Nats; a vocabulary of 2^24 ids has at most 16.7."""

Codes = NDArray[np.int32]

_PROBABILITY = np.exp(-np.arange(MAX_CODE + 1) / STEPS_PER_NAT)
_PROBABILITY[MAX_CODE] = 0.0  # at the floor there is no mass


def encode_logprob(logprob: NDArray[Any]) -> Codes:
    """Encode log-probs [N] in nats as codes 0 .. MAX_CODE; values below the floor become the floor."""
    codes = np.rint(np.asarray(logprob, np.float64) * -STEPS_PER_NAT)
    return np.clip(codes, 0, MAX_CODE).astype(np.int32)


def decode_logprob(codes: NDArray[Any]) -> Float32:
    return (codes * np.float32(-1.0 / STEPS_PER_NAT)).astype(np.float32)


def encode_entropy(entropy: NDArray[Any]) -> Codes:
    """Encode entropies [T] in nats; error at most MAX_ENTROPY_ERROR. Raises ValueError for an impossible entropy."""
    if entropy.size and not (np.isfinite(entropy).all() and entropy.min() > -1e-3 and entropy.max() < LARGEST_ENTROPY):
        raise ValueError(f"entropy must be in [0, 25) nats, got {entropy.min()} .. {entropy.max()}")
    return np.rint(np.maximum(entropy, 0.0).astype(np.float64) * ENTROPY_STEPS_PER_NAT).astype(np.int32)


def decode_entropy(codes: NDArray[Any]) -> Float32:
    return (codes * np.float32(1.0 / ENTROPY_STEPS_PER_NAT)).astype(np.float32)


def _segment_sums(values: NDArray[np.float64], offsets: Int64) -> NDArray[np.float64]:
    return np.add.reduceat(values, offsets[:-1]) if len(offsets) > 1 else np.zeros(0)


def decode_rows(codes: NDArray[Any], offsets: Int64, tail_codes: NDArray[Any]) -> tuple[Float32, Float32]:
    """Decode head log-probs [K*] and tail log-masses [T], jointly normalised in every row."""
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
