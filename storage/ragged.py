"""Ragged rows as flat arrays and offsets.

Letters: N rows, M values of all rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eopd.storage.teacher_record import Int64


def offsets_of(counts: NDArray[Any]) -> Int64:
    """[N] counts -> [N+1] offsets"""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(np.asarray(counts, np.int64), out=offsets[1:])  # cast first: a sum that casts is three times slower
    return offsets


def differences(values: NDArray[Any], offsets: Int64) -> Int64:
    """[M] within each row: the first as it is, every other minus the one before."""
    out = np.diff(values.astype(np.int64), prepend=0)
    first = offsets[:-1][np.diff(offsets) > 0]
    out[first] = values[first]
    return out


def sums(deltas: NDArray[Any], offsets: Int64) -> Int64:
    """Inverse of ``differences``."""
    total = np.cumsum(deltas, dtype=np.int64)
    starts = offsets[:-1]
    before = np.where(starts > 0, total[starts - 1], 0) if len(total) else np.zeros(len(starts), np.int64)
    return total - np.repeat(before, np.diff(offsets))


def sort_rows(values: NDArray[Any], offsets: Int64) -> NDArray[Any]:
    """[M] sorted within each row, ascending."""
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return values[np.argsort(rows * (1 << 32) + values, kind="stable")]


def take_ranges(starts: Int64, counts: NDArray[Any]) -> Int64:
    """Indices of the ranges [start, start + count), one after the other."""
    ends = offsets_of(counts)
    return np.arange(ends[-1]) + np.repeat(starts - ends[:-1], counts)


def interleave(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """a0 b0 a1 b1 ..."""
    return np.stack([first, second], axis=1).reshape(-1)
