"""Packing of integers into symbols and raw bits (``storage.codec``), by response; ``symbols.join`` is the inverse.

Letters: S responses, N numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eopd.storage.codec import Symbols
from eopd.storage.compiled import compiled
from eopd.storage.teacher_record import Int32, Int64


@compiled
def _raw_count(value: int, extra: int) -> int:
    # a float's exponent is the place of the leading one; up to 2^24 every whole number is a float32
    leading = int(np.float32(value).view(np.int32) >> 23) - 127
    return max(leading - extra, 0)


@compiled
def symbols_of(values: Int32, extra: int) -> Symbols:
    """[N]"""
    symbols = np.empty(len(values), np.uint8)
    for i in range(len(values)):
        count = _raw_count(values[i], extra)
        symbols[i] = (count << extra) + (values[i] >> count)
    return symbols


@compiled
def count(values: Int32, bounds: Int64, extra: int, bits: Int64) -> None:
    """Add to ``bits`` [S] the raw bits that each response's numbers need; arguments as for ``append``."""
    for s in range(len(bits)):
        total = 0
        for i in range(bounds[s], bounds[s + 1]):
            total += _raw_count(values[i], extra)
        bits[s] += total


@compiled
def append(
    values: Int32, bounds: Int64, extra: int, plane: Symbols, place: Int64, raw: NDArray[np.uint8], bit: Int64
) -> None:
    """Append the numbers of each response to its symbols and to its raw bits.

    Args:
        values: [N] numbers from 0 to below ``symbols.largest(extra)``.
        bounds: [S+1] the numbers of response s are values[bounds[s] : bounds[s + 1]].
        extra: bits after the leading one that join a symbol.
        plane: symbols; the next one of response s belongs to plane[place[s]].
        place: [S] moved on.
        raw: packed bits, lowest first, zero where nothing was appended; four bytes at its end belong to nobody.
        bit: [S] number of each response's next bit in ``raw``; moved on.
    """
    for s in range(len(place)):
        to, at = place[s], bit[s]
        for i in range(bounds[s], bounds[s + 1]):
            count = _raw_count(values[i], extra)
            plane[to] = (count << extra) + (values[i] >> count)
            shifted = (values[i] & ((1 << count) - 1)) << (at & 7)  # at most 24 + 7 bits
            for byte in range(4):
                raw[(at >> 3) + byte] |= (shifted >> (8 * byte)) & 255
            to, at = to + 1, at + count
        place[s], bit[s] = to, at
