"""Integers as a byte-sized symbol, which compresses, and raw bits, which do not.

A number's leading one, and the ``extra`` bits after it, are its symbol; zstd finds their statistics. The bits below
are as good as random: they are kept raw, packed, and never compressed. Numbers below 2^(extra + 1) are their own
symbol and have no raw bits. So

    raw    = max(bit_length(v) - 1 - extra, 0)
    symbol = v                            where raw = 0
             (raw << extra) + (v >> raw)  elsewhere

and back: raw = max((symbol >> extra) - 1, 0); v = ((symbol - (raw << extra)) << raw) + raw bits.

``storage.packing`` goes there, this module back.

Letters: N numbers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eopd.storage.teacher_record import Int64

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
