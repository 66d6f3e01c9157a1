"""The bytes of a part: format version 1 (docs/format.md).

Every number is a byte-sized symbol and some raw bits (``storage.symbols``). A part is three arrays:

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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eopd.storage import quantise, symbols
from eopd.storage.ragged import offsets_of
from eopd.storage.teacher_record import HeadRule, Int64

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


def tail_guess(entropy: symbols.Symbols, top: Integers) -> Integers:
    """Guess the tail's code [T] from the entropy's symbol if the first entry is derived; 0 for other tokens."""
    return np.where(top == 0, _TAIL_GUESS[entropy], 0)


def _tail_guesses() -> NDArray[np.int32]:
    """Guesses by the symbol of the entropy H: if the head is nearly all, H = t (2 - log t) for a tail of mass t."""
    codes = symbols.join(np.arange(256).astype(np.uint8), ENTROPY_EXTRA, np.zeros(8, np.uint8), np.zeros(256, np.int64))
    entropy = np.minimum((codes + 0.5) / quantise.ENTROPY_STEPS_PER_NAT, 1.5)
    tail = entropy.copy()
    for _ in range(60):
        tail = entropy / (2.0 - np.log(tail))
    return np.rint(-quantise.STEPS_PER_NAT * np.log(tail)).astype(np.int32)


_TAIL_GUESS = _tail_guesses()


def draw_guess(tail_codes: Integers, weight: float) -> Integers:
    """Guess how many systematic draws of ``weight`` the tail's mass makes [T], within one; 0 for weight 0."""
    if weight == 0.0:
        return np.zeros(len(tail_codes), np.int64)
    return np.floor(np.exp(-tail_codes / quantise.STEPS_PER_NAT) / weight + 1e-6).astype(np.int64)
