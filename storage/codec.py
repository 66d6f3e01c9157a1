"""The bytes of a part: format version 1 (docs/format.md).

Every number is a byte-sized symbol and some raw bits (``storage.codec``). A part is three arrays:

* ``responses`` [S, 2] uint32: tokens and entries of each response.
* ``tokens`` [columns, T] uint8: symbols of the columns of ``Layout.columns``, the same for every token.
* ``entries`` [4, M] uint8: everything ragged, and all raw bits. Plane 0: symbols of ids; plane 1: symbols of codes;
  planes 2 and 3, one after the other: the response's raw bits.

The ids of a response: heads of its tokens; misses (two for a token whose sampled id is not in its head: the id and
its rank); draws; extra ids. Its codes: heads without each token's first; misses (log-prob); extra ids. Its raw bits:
those of each column, of its ids, of its codes. It has as many entries as its ids, or as its raw bits need.

``storage.encode`` and ``storage.decode`` go from TeacherRows to these arrays and back.

Letters: S responses, T tokens, M entries, N numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eopd.storage.teacher_record import LOGPROB_FLOOR, Float32, HeadRule, Int64, offsets_of

# -- quantise ---------------------------------------------------------------------------------------------------------

# Log-probs, entropies and ids as small integers, and back, with stated errors.
#
# A log-prob x (nats, -50 <= x <= 0) is a multiple of ``STEP`` = 1/130 nat below zero. A token's head and tail are one
# distribution and are quantised together, so that what is decoded sums to one *and* is within ``MAX_ERROR`` = 1/256:
#
# * ``p_0 >= DERIVED_ABOVE``: the first entry is not stored; it is 1 minus the rest. Its error is the rest's times
#   (1 - p_0) / p_0 < 1, so a sure token's log-prob is nearly exact and costs nothing.
# * otherwise the decoder divides by the sum of what it decoded. Rounding errors e_i would then come back as e_i minus
#   their p-weighted mean, up to one whole step. So the encoder adds an offset o to the row before it rounds, chosen so
#   that this mean is zero: as o grows by a step the mean falls with slope -1 and jumps up wherever an entry changes
#   its code, and is periodic, so it has a zero. The decoder needs not know o.
#
# Rows are encoded by ``storage.encode``.
#
# Letters: T tokens, K* head entries of all tokens.


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


# -- symbols ----------------------------------------------------------------------------------------------------------

# Integers as a byte-sized symbol, which compresses, and raw bits, which do not.
#
# A number's leading one, and the ``extra`` bits after it, are its symbol; zstd finds their statistics. The bits below
# are as good as random: they are kept raw, packed, and never compressed. Numbers below 2^(extra + 1) are their own
# symbol and have no raw bits. So
#
#     raw    = max(bit_length(v) - 1 - extra, 0)
#     symbol = v                            where raw = 0
#              (raw << extra) + (v >> raw)  elsewhere
#
# and back: raw = max((symbol >> extra) - 1, 0); v = ((symbol - (raw << extra)) << raw) + raw bits.
#
# ``storage.packing`` goes there, this module back.
#
# Letters: N numbers.


Symbols = NDArray[np.uint8]
MAX_RAW = 24


@lru_cache(maxsize=8)
def _tables(extra: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Raw bits [256] and value with raw bits 0 [256] of every symbol."""
    symbol = np.arange(256, dtype=np.int64)
    raw = np.maximum((symbol >> extra) - 1, 0)
    usable = np.minimum(raw, MAX_RAW)
    value = (symbol - (raw << extra)) << usable
    return usable.astype(np.uint8), np.minimum(value, np.iinfo(np.int32).max).astype(np.int32)


def largest(extra: int) -> int:
    """Return the bound below which every number has a symbol."""
    return 1 << min(MAX_RAW, (256 >> extra) - 2 + extra)


def check(name: str, values: NDArray[Any], extra: int) -> None:
    """Raise ValueError if a number of the field ``name`` has no symbol."""
    if values.size and (values.min() < 0 or values.max() >= largest(extra)):
        raise ValueError(f"{name}: numbers must be in 0 .. {largest(extra) - 1}, got {values.min()} .. {values.max()}")


def raw_counts(symbols: Symbols, extra: int) -> NDArray[np.uint8]:
    return _tables(extra)[0][symbols]


def join(symbols: Symbols, extra: int, bits: NDArray[np.uint8], at: Int64) -> NDArray[np.int32]:
    """Return numbers [N] from their symbols and the positions ``at`` [N] (bits) of their raw bits in ``bits``.

    ``bits`` ends with four bytes of padding, so that a window of four bytes starts at every byte.
    """
    raw, base = _tables(extra)
    values = base[symbols]
    counts = raw[symbols]
    if not counts.any():
        return values
    windows = np.ndarray((len(bits) - 3,), "<u4", buffer=bits.data, strides=(1,))
    words = windows[at >> 3] >> (at & 7).astype(np.uint32)
    masks = _MASKS[counts]
    return values | (words & masks).astype(np.int32)


_MASKS = ((1 << np.arange(MAX_RAW + 1, dtype=np.int64)) - 1).astype(np.uint32)


def zigzag(values: NDArray[Any]) -> NDArray[Any]:
    """Map 0, -1, 1, -2, ... to 0, 1, 2, 3, ..."""
    return np.where(values < 0, -2 * values - 1, 2 * values)


def unzigzag(values: NDArray[Any]) -> NDArray[Any]:
    return np.where(values & 1, -((values + 1) >> 1), values >> 1)


# -- layout -----------------------------------------------------------------------------------------------------------

FORMAT_VERSION = 1
STOP_FLOOR = -16.0
"""Stop log-probs below this (nats) are stored as the floor, except at a response's last token."""
MAX_ID = 1 << 24

Planes = NDArray[np.uint8]
Integers = NDArray[Any]

# bits after the leading one that join a symbol (storage.symbols), by stream
ID_EXTRA, CODE_EXTRA, STOP_EXTRA, ENTROPY_EXTRA = 3, 3, 2, 3
COLUMNS = (
    ("head_size", 4),
    ("sampled", 3),  # 1 + place of the sampled token in the head; 0: a miss
    ("draws", 3),
    ("extras", 3),
    ("entropy", ENTROPY_EXTRA),
    ("top", 2),  # code of the head's first entry; 0: derived
    ("tail", 3),
)
ENTROPY = [name for name, _ in COLUMNS].index("entropy")
RAW_PLANES = 2


@dataclass(frozen=True)
class Layout:
    """The layout that a decoder needs besides the bytes; follows from a part's header."""

    stop_ids: tuple[int, ...]
    draw_weight: float  # of draws beyond the head; 0 where there are none

    @property
    def columns(self) -> tuple[tuple[str, int], ...]:
        """Name and ``extra`` of each plane of ``tokens``, in order."""
        return COLUMNS + tuple((f"stop_{e}", STOP_EXTRA) for e in range(len(self.stop_ids)))

    @classmethod
    def of(cls, head: HeadRule, stop_ids: Sequence[int]) -> Layout:
        return cls(tuple(stop_ids), head.min_prob if head.draws == "beyond_head" else 0.0)


@dataclass(frozen=True)
class PartArrays:
    responses: NDArray[np.uint32]  # [S, 2]
    tokens: Planes  # [columns, T]
    entries: Planes  # [2 + RAW_PLANES, M]


class RawBits:
    """Positions of raw bits: those of a response are contiguous, stream by stream, from its first entry on."""

    def __init__(self, entries: NDArray[Any]) -> None:
        """entries: [S] of each response"""
        self._next = 8 * RAW_PLANES * offsets_of(entries)[:-1]

    def place(self, counts: NDArray[np.uint8], numbers: Int64) -> Int64:
        """Return bit positions [N] of the next stream, from raw bits of each number [N] and numbers per response
        [S]."""
        total, starts = offsets_of(counts), offsets_of(numbers)
        places = total[:-1] + np.repeat(self._next - total[starts[:-1]], numbers)
        self._next = self._next + np.diff(total[starts])
        return places


def tail_guess(entropy: Symbols, top: Integers) -> Integers:
    """Guess the tail's code [T] from the entropy's symbol if the first entry is derived; 0 for other tokens."""
    return np.where(top == 0, _TAIL_GUESS[entropy], 0)


def _tail_guesses() -> NDArray[np.int32]:
    """Guesses by the symbol of the entropy H: if the head is nearly all, H = t (2 - log t) for a tail of mass t."""
    codes = join(np.arange(256).astype(np.uint8), ENTROPY_EXTRA, np.zeros(8, np.uint8), np.zeros(256, np.int64))
    entropy = np.minimum((codes + 0.5) / ENTROPY_STEPS_PER_NAT, 1.5)
    tail = entropy.copy()
    for _ in range(60):
        tail = entropy / (2.0 - np.log(tail))
    return np.rint(-STEPS_PER_NAT * np.log(tail)).astype(np.int32)


_TAIL_GUESS = _tail_guesses()


def draw_guess(tail_codes: Integers, weight: float) -> Integers:
    """Guess how many systematic draws of ``weight`` the tail's mass makes [T], within one; 0 for weight 0."""
    if weight == 0.0:
        return np.zeros(len(tail_codes), np.int64)
    return np.floor(np.exp(-tail_codes / STEPS_PER_NAT) / weight + 1e-6).astype(np.int64)


# -- size bound -------------------------------------------------------------------------------------------------------

# Upper bound on the bytes of a scores artifact for any teacher, from the head rule and the codec.
#
# Letters: T tokens, S responses, P parts.


TOKEN_CHUNK, ENTRY_CHUNK = 4_096, 16_384  # of storage.zarr_part, which imports zarr; a test compares them
_MOST_ENTROPY = 25 * ENTROPY_STEPS_PER_NAT  # `quantise.encode_entropy` refuses more
_CHUNK_OVERHEAD = 2 * (16 + 4 + 16)  # Blosc's header, CRC32C and an entry of the shard's index, which has spare ones
_METADATA = 24_000  # four zarr.json files, 5 kB in practice


def most_bytes(
    head: HeadRule, *, stops: int, vocabulary: int, extra_k: int, tokens: int, responses: int, parts: int
) -> int:
    """Return a bound on the bytes of scores with so many tokens, responses and parts.

    Args:
        stops: stop ids.
        vocabulary: ids of the teacher; 0 if it is not known.
        extra_k: ids of the student's own top-k, a token.
    """
    columns, entries = _token(head, stops, min(vocabulary or MAX_ID, MAX_ID), extra_k)
    # a response's entries are rounded up; the bound is concave in T and S, so equal parts are the worst case
    t, s = tokens / parts, responses / parts
    planes = columns * _padded(t, TOKEN_CHUNK) + (2 + RAW_PLANES) * _padded(entries * t + s, ENTRY_CHUNK)
    chunks = 3 + t / TOKEN_CHUNK + (entries * t + s) / ENTRY_CHUNK
    return math.ceil(parts * (planes + 8 * s + _CHUNK_OVERHEAD * chunks + _METADATA + 200 * stops))


def _padded(length: float, chunk: int) -> float:
    """Bound the padded length: the last of several chunks is filled with zeros; a single one has at least 128."""
    return length + 128 + min(length, chunk)


def _token(head: HeadRule, stops: int, vocabulary: int, extra_k: int) -> tuple[int, float]:
    """Return bytes per token in ``tokens``, and entries per token: as many as its ids, or as its raw bits need."""
    k = min(head.k_max, vocabulary)
    draws = {"none": 0, "full": head.n_draws, "beyond_head": _most_draws(k, vocabulary, head.min_prob)}[head.draws]
    largest = {
        "head_size": k,
        "sampled": k,
        "draws": 2 * draws,
        "extras": extra_k,
        "entropy": _MOST_ENTROPY,
        "top": MAX_CODE,
        "tail": 2 * MAX_CODE + 1,
    }
    bits = sum(_raw_bits(largest[name], extra) for name, extra in COLUMNS)
    bits += stops * _raw_bits(MAX_CODE + 1, STOP_EXTRA)
    ids = k + 2 + draws + extra_k  # a sampled token outside the head stores its id and its rank
    codes = k - 1 + 1 + extra_k
    bits += ids * _raw_bits(vocabulary - 1, ID_EXTRA) + codes * _raw_bits(MAX_CODE, CODE_EXTRA)
    return len(COLUMNS) + stops, max(ids, bits / (8 * RAW_PLANES))


def _most_draws(k: int, vocabulary: int, weight: float) -> int:
    """Return the most systematic draws of ``weight`` beyond a head of at most ``k`` ids; repeats are stored.

    Beyond a head of k ids lies the mass of the V - k least probable ones: at most 1 - k/V. A shorter head holds every
    id of probability ``weight``, so each of the others makes less than one draw.
    """
    beyond_whole_head = (1.0 - k / vocabulary) / weight
    beyond_shorter_head = min(vocabulary - 1, 1.0 / weight) if k > 1 else 0.0
    # the rest is for rounding: one draw more by the place of the first, and sums of float32
    return math.floor(1.001 * max(beyond_whole_head, beyond_shorter_head)) + 2


def _raw_bits(largest: int, extra: int) -> int:
    """Return the raw bits of a number up to ``largest`` (``storage.codec``)."""
    return max(largest.bit_length() - 1 - extra, 0)
