"""Ragged rows as flat arrays and offsets.

Letters: N rows, M values of all rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eopd.storage.teacher_record import Int64


def offsets_of(counts: NDArray[Any]) -> Int64:
    """Turn counts [N] into offsets [N+1]."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(np.asarray(counts, np.int64), out=offsets[1:])  # cast first: a sum that casts is three times slower
    return offsets


def sums(deltas: NDArray[Any], offsets: Int64) -> Int64:
    """Return, within each row, the running sum of the deltas: [M]."""
    total = np.cumsum(deltas, dtype=np.int64)
    starts = offsets[:-1]
    before = np.where(starts > 0, total[starts - 1], 0) if len(total) else np.zeros(len(starts), np.int64)
    return total - np.repeat(before, np.diff(offsets))


def take_ranges(starts: Int64, counts: NDArray[Any]) -> Int64:
    """Return the indices of the ranges [start, start + count), one after the other."""
    ends = offsets_of(counts)
    return np.arange(ends[-1]) + np.repeat(starts - ends[:-1], counts)
