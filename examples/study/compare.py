"""Statistics of the study: means and paired differences with intervals. No files.

Seeds are the unit of repetition: a setting's mean has a t interval over seeds, and so has the paired difference of two
settings, taken seed by seed on the same problems with the same sampling seeds. The crossed bootstrap resamples seeds
and problems at once and so speaks about other problems too. Letters: S seeds, P problems, B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eopd.stages.intervals import Interval, intervals, t_interval

Floats = NDArray[np.float64]

RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; None with fewer than two seeds."""

    mean: float
    interval: Interval | None
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        return self.interval is not None and (self.interval.low > 0 or self.interval.high < 0)


def over_seeds(values: Floats) -> Estimate:
    """Mean of ``values`` [S] with a Student t interval."""
    return Estimate(float(np.mean(values)), t_interval(values.tolist()), len(values))


def paired(a: Floats, b: Floats) -> Estimate:
    """Mean of a - b with a t interval over seeds; ``a``, ``b`` [S, P] have equal seeds and problems in equal order."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return over_seeds((a - b).mean(axis=1))


def crossed(a: Floats, b: Floats, seed: int = 0) -> Estimate:
    """Mean of a - b with a percentile interval of a bootstrap that draws seeds and problems independently.

    With few seeds it is too narrow (a bootstrap of S seeds has (S - 1)/S of their variance, and no t): it stands beside
    ``paired``, never in its place.
    """
    difference = a - b
    seeds, problems = difference.shape
    mean = float(difference.mean())
    if seeds < 2:
        return Estimate(mean, None, seeds)
    rng = np.random.default_rng(seed)
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds  # [B, S]
    by_problem = rng.multinomial(problems, np.full(problems, 1 / problems), size=RESAMPLES) / problems  # [B, P]
    means = np.einsum("bs,bs->b", by_seed, by_problem @ difference.T)
    (found,) = intervals(means[:, None])
    return Estimate(mean, found, seeds)
