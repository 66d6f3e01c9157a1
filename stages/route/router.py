"""Descriptors of a probe's entropies, and the rule that chooses a mode by them. Imports no torch.

Letters: R responses, M modes, N tokens of a probe.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eopd.stages.route.settings import SHORTEST, RuleSettings

Floats = NDArray[np.float64]
GRID = 10
"""Shares of the calibration responses, in tenths, at which thresholds are tried."""


def descriptors(entropy: Sequence[float]) -> tuple[float, float, float] | None:
    """Return sum, trend and roughness of a probe's entropies H_1 .. H_N; None if N < 3.

    The trend is Spearman's rank correlation of i and H_i; the roughness is the von Neumann ratio
    sum (H_{i+1} - H_i)^2 / sum (H_i - mean H)^2. Both are 0 if all entropies are equal.
    """
    values = np.asarray(entropy, dtype=np.float64)
    if len(values) < SHORTEST:
        return None
    spread = float(((values - values.mean()) ** 2).sum())
    if not np.ptp(values) or not spread:
        return float(values.sum()), 0.0, 0.0
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # ties share their mean rank
    trend = float(np.corrcoef(np.arange(len(values)), ranks)[0, 1])
    return float(values.sum()), trend, float((np.diff(values) ** 2).sum()) / spread


def regions(described: Floats, entropy: float, trend: float, roughness: float) -> NDArray[np.int64]:
    """Return the place of each response of ``described`` [R, 3] among ``RuleSettings.modes``.

    A response without descriptors has NaN, and the place after the last.
    """
    sums, trends, ratios = described.T
    rest = np.where((trends > trend) | (ratios > roughness), 1, 2)
    return np.where(np.isnan(sums), 3, np.where(sums < entropy, 0, rest))


def routed(described: Floats, rule: RuleSettings, modes: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of the mode of each response; the first mode where the probe is too short."""
    bounds = -math.inf if rule.entropy is None else rule.entropy, *map(_above, (rule.trend, rule.roughness))
    chosen = np.array([*map(modes.index, rule.modes), 0])
    return np.asarray(chosen[regions(described, *bounds)])


def fit(described: Floats, right: Floats, tokens: Floats, modes: Sequence[str]) -> RuleSettings:
    """Return the rule that is right most often on these responses, and among equals takes the fewest tokens.

    Thresholds are tried at every tenth of the responses' own descriptors, each also as never reached; each region gets
    the mode that does best in it.

    Args:
        right, tokens: [R, M] of each response in each mode; tokens with those of the probe.
    """
    known = described[~np.isnan(described[:, 0])]
    grids = [_grid(column) for column in known.T]
    best: tuple[float, float] = (-math.inf, -math.inf)
    rule = RuleSettings()
    for low, trend, rough in itertools.product(*grids):
        places = regions(described, -math.inf if low is None else low, _above(trend), _above(rough))
        member = np.stack([places == place for place in range(3)]).astype(np.float64)  # [3, R]
        hits, cost = member @ right, member @ tokens  # [3, M]
        order = [max(range(len(modes)), key=lambda mode: (hits[place, mode], -cost[place, mode])) for place in range(3)]
        value = sum(hits[place, mode] for place, mode in enumerate(order))
        spent = sum(cost[place, mode] for place, mode in enumerate(order))
        if (value, -spent) > best:
            best = (value, -spent)
            certain, unsettled, otherwise = (modes[mode] for mode in order)
            rule = RuleSettings(
                entropy=low, trend=trend, roughness=rough, certain=certain, unsettled=unsettled, otherwise=otherwise
            )
    return rule


def _above(threshold: float | None) -> float:
    return math.inf if threshold is None else threshold


def _grid(values: Floats) -> list[float | None]:
    shares = np.arange(1, GRID) / GRID
    return [None, *(sorted({float(value) for value in np.quantile(values, shares)}) if len(values) else [])]
