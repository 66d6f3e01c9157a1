"""Loops over the rows of a chunk, compiled: what NumPy could only say in many passes through memory.

Logits are relative to the largest of their row, which is +0.0; ``mass`` is their exponential. Of such numbers the bits,
read as an unsigned integer, grow as the logit falls: ``distances``.

Letters: C rows of a chunk, V vocabulary, K most entries of a head, K* entries of all heads, N draws of a row, N* draws
of all rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eopd.storage.compiled import compiled, compiled_sums

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt32 = NDArray[np.uint32]
UInt64 = NDArray[np.uint64]

FARTHEST = 0xFF7F_FFFF
"""Distance of the lowest finite float32."""
OCTAVE = 1 << 23
"""From a distance to that of twice the logit."""
NO_ENTRY = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
LAST = 1.0 - 2.0**-40
"""Points lie at most here in a row of mass 1: rounding may put one at the very end, where nothing begins. The margin is
wider than the difference of two sums of 4,096 masses."""


@compiled_sums
def sums(logits: Float32, mass: Float32) -> tuple[Float64, Float64]:
    """Of each row [C, V]: the sum of its mass, and of mass * logit, [C] each."""
    rows, vocabulary = logits.shape
    total, moment = np.empty(rows), np.empty(rows)
    for row in range(rows):
        of_mass = of_product = 0.0
        for v in range(vocabulary):
            of_mass += mass[row, v]
            of_product += mass[row, v] * logits[row, v]
        total[row], moment[row] = of_mass, of_product
    return total, moment


@compiled
def above(logits: Float32, values: Float32) -> Int32:
    """[C] how many logits of each row [C, V] exceed its value [C]."""
    rows, vocabulary = logits.shape
    counts = np.empty(rows, np.int32)
    for row in range(rows):
        count = np.int32(0)
        for v in range(vocabulary):
            count = np.int32(count + np.int32(logits[row, v] > values[row]))
        counts[row] = count
    return counts


@compiled
def largest(logits: Float32, counts: Int64, guesses: Int64, k: int) -> UInt64:
    """The ``counts`` [C] largest logits of each row [C, V], lower ids first among equals, as entries [C, k] unsorted.

    An entry is distance * 2**32 + id: sorted, they begin with the most probable. Places left over hold NO_ENTRY.
    ``guesses`` [C]: distances within which about so many lie; the search begins there.
    """
    rows, vocabulary = logits.shape
    entries = np.full((rows, k), NO_ENTRY)
    ids = np.empty(vocabulary + 1, np.int32)
    for row in range(rows):
        distances = logits[row].view(np.uint32)
        bound = _bound(distances, counts[row], guesses[row])
        found = _collect(distances, bound, ids)
        place, surplus = counts[row], found - counts[row]
        for i in range(found - 1, -1, -1):
            distance = distances[ids[i]]
            if surplus > 0 and distance == bound:  # of equals the last ones are too many
                surplus -= 1
            else:
                place -= 1
                entries[row, place] = (np.uint64(distance) << np.uint64(32)) | np.uint64(ids[i])
    return entries


@compiled
def _bound(distances: UInt32, wanted: int, guess: int) -> np.uint32:
    """The least distance within which at least ``wanted`` of [V] lie, or one within which exactly so many do."""
    low, high, middle, step = 0, FARTHEST, guess, OCTAVE
    while low < high:
        found = _within(distances, np.uint32(middle))
        if found == wanted:
            return np.uint32(middle)
        if found > wanted:
            high = middle
        else:
            low = middle + 1
        middle = min(max((low + high) // 2, middle - step), middle + step)
        step *= 2
    return np.uint32(low)


@compiled
def _within(distances: UInt32, bound: np.uint32) -> np.int32:
    """How many of [V] are at most ``bound``."""
    count = np.int32(0)
    for v in range(len(distances)):
        count = np.int32(count + np.int32(distances[v] <= bound))
    return count


@compiled
def _collect(distances: UInt32, bound: np.uint32, ids: Int32) -> int:
    """How many of [V] are at most ``bound``; their ids go to the front of ``ids`` [V + 1], ascending."""
    count = 0
    for v in range(len(distances)):
        ids[count] = v  # written over by the next, unless it counts: no branch to predict
        count += distances[v] <= bound
    return count


@compiled
def heads(entries: UInt64, counts: Int64, lse: Float64) -> tuple[Int32, Float64]:
    """(ids [K*], log-probs [K*]) of sorted entries [C, K], the first ``counts`` [C] of each row; ``lse`` [C]."""
    ids, distances, logprobs = np.empty(counts.sum(), np.int32), np.empty(1, np.uint32), np.empty(counts.sum())
    logit = distances.view(np.float32)
    place = 0
    for row in range(len(entries)):
        for i in range(counts[row]):
            ids[place] = np.int32(entries[row, i] & np.uint64(0xFFFF_FFFF))
            distances[0] = np.uint32(entries[row, i] >> np.uint64(32))
            logprobs[place] = logit[0] - lse[row]
            place += 1
    return ids, logprobs


@compiled_sums
def take_out(mass: Float32, counts: Int64, ids: Int32) -> Float64:
    """Take ``ids`` [K*], ``counts`` [C] of each row, out of ``mass`` [C, V], in place; what is left of each row [C].

    Summed from the rest's own: 1 minus the head's mass would be rounding noise where the teacher is sure.
    """
    left = np.empty(len(mass))
    place = 0
    for row in range(len(mass)):
        for _ in range(counts[row]):
            mass[row, ids[place]] = 0.0
            place += 1
        rest = 0.0
        for v in range(mass.shape[1]):
            rest += mass[row, v]
        left[row] = rest
    return left


@compiled
def systematic(mass: Float32, left: Float64, weights: Float64, uniforms: Float64, counts: Int64) -> Int32:
    """Ids [N*] under the points ``weight * (uniform + j)``, j < count, of each row [C, V] laid end to end (draws.py).

    All but ``mass`` are [C]; ``left`` is the sum of the row's mass.
    """
    ids = np.empty(counts.sum(), np.int32)
    place = 0
    for row in range(len(mass)):
        v, filled = -1, 0.0
        for j in range(counts[row]):
            point = min(weights[row] * (uniforms[row] + j), left[row] * LAST)
            while filled <= point:
                v += 1
                filled += mass[row, v]
            ids[place] = v
            place += 1
    return ids


@compiled
def independent(mass: Float32, uniforms: Float64) -> Int32:
    """Ids [C, N] under the points uniform [C, N] * total of each row [C, V] laid end to end."""
    ids, ends = np.empty(uniforms.shape, np.int32), np.empty(mass.shape[1])
    for row in range(len(mass)):
        filled = 0.0
        for v in range(len(ends)):
            filled += mass[row, v]
            ends[v] = filled
        for j in range(uniforms.shape[1]):
            ids[row, j] = _first_beyond(ends, min(uniforms[row, j], LAST) * filled)
    return ids


@compiled
def _first_beyond(ends: Float64, point: float) -> int:
    """The first of ascending [V] that exceeds ``point``. (NumPy's search would take 4 s to compile.)"""
    low, high = 0, len(ends)
    while low < high:
        middle = (low + high) // 2
        if ends[middle] <= point:
            low = middle + 1
        else:
            high = middle
    return low
