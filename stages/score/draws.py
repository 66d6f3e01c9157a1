"""Unbiased draws from a row's remaining distribution, by one fixed random number per row.

Systematic sampling lays the probabilities of a row end to end and takes what lies under the points
``c * (u + j)``, j = 0, 1, ...: id v is drawn ``p(v) / c`` times in expectation, and every draw weighs c. The
uniform u depends on (seed, response, position) alone, so neither chunking nor packing nor the order of work
changes a draw, except where float rounding moves a point across the border between two ids.

Letters: T tokens, C rows of a chunk, G groups of ids, N draws of a row.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eopd.stages.score.logit_blocks import LogitBlocks

UInt64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: UInt64) -> UInt64:
    """Apply SplitMix64's output function (Steele, Lea and Flood 2014) elementwise: neighbouring inputs, unrelated
    bits."""
    with np.errstate(over="ignore"):
        values = values + _GOLDEN
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def row_keys(seed: int, response: tuple[int, ...] | NDArray[np.int64], positions: NDArray[np.int64]) -> UInt64:
    """Return one key [T] for each position of a response that is named by integers which no other response has.

    Args:
        response: the N integers of all, or those of each position [T, N].
    """
    key = mix(np.asarray([seed], np.int64).view(np.uint64))
    for numbers in np.asarray(response, np.int64).reshape(-1, np.shape(response)[-1]).T:
        key = mix(key ^ numbers.astype(np.uint64))
    return mix(key ^ positions.astype(np.uint64))


def uniforms(keys: UInt64, count: int) -> NDArray[np.float64]:
    """Return independent uniforms in [0, 1) as a function of the keys: [T, count]."""
    with np.errstate(over="ignore"):
        streams = keys[:, None] + np.arange(count, dtype=np.uint64)[None, :] * np.uint64(0xD1342543DE82EF95)
    return (mix(streams) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def systematic_points(uniform: Tensor, total: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return points [C, N] ``weight * (uniform + j)`` and how many of each row lie below its total, [C].

    All in one unit: ``total`` is the remaining mass [C], ``weight`` the draw constant in that unit [C].
    """
    counts = torch.ceil(total / weight - uniform).clamp_(min=0).long()
    most = int(counts.max()) if len(counts) else 0
    steps = torch.arange(most, device=uniform.device, dtype=torch.float64)
    return weight[:, None] * (uniform[:, None] + steps), counts


def ids_at(blocks: LogitBlocks, group_mass: Tensor, points: Tensor, counts: Tensor) -> Tensor:
    """Return ids [sum(counts)] under the points of each row, row after row.

    Args:
        group_mass: [C, G] float64, sum of exp(z - m) of each group, ids that were taken out left out.
        points: [C, N] of which the first ``counts`` of a row are used; ascending or not.
    """
    ends = group_mass.cumsum(1)
    # rounding may put a point at the very end of its row, where no group begins
    total = ends[:, -1:]
    points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))
    groups = torch.searchsorted(ends, points, right=True).clamp_(max=ends.shape[1] - 1)
    wanted = torch.arange(points.shape[1], device=points.device) < counts[:, None]
    rows, places = wanted.nonzero(as_tuple=True)
    group = groups[rows, places]
    within = points[rows, places] - (ends[rows, group] - group_mass[rows, group])
    mass = (blocks.in_groups(rows, group) - blocks.maximum[rows, None]).exp_().double()
    filled = mass.cumsum(1)
    # and the same in its group
    place = torch.minimum((filled <= within[:, None]).sum(1), (filled < filled[:, -1:]).sum(1))
    return group * mass.shape[1] + place
