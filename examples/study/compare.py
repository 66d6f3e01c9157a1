"""Statistics of the study: means and paired differences with intervals. Pure numpy, no files.

Seeds are the unit of repetition: a setting's mean has a t interval over seeds, and so has the paired difference of two
settings, taken seed by seed on the same problems with the same sampling seeds. The crossed bootstrap resamples seeds
and problems at once and so speaks about other problems too. Letters: S seeds, P problems.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; the interval is NaN where there are fewer than two seeds."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def over_seeds(values: Floats) -> Estimate:
    """Mean of ``values`` [S] with a Student t interval."""
    seeds = len(values)
    mean = float(np.mean(values))
    if seeds < 2:
        return Estimate(mean, math.nan, math.nan, seeds)
    half = t_quantile(0.5 + CONFIDENCE / 2, seeds - 1) * float(np.std(values, ddof=1)) / math.sqrt(seeds)
    return Estimate(mean, mean - half, mean + half, seeds)


def paired(a: Floats, b: Floats) -> Estimate:
    """Mean of a - b with a t interval over seeds; ``a``, ``b`` [S, P] have equal seeds and problems in equal order."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return over_seeds((a - b).mean(axis=1))


def crossed(a: Floats, b: Floats, seed: int = 0) -> Estimate:
    """Mean of a - b with a percentile interval of a bootstrap that draws seeds and problems independently."""
    difference = a - b
    seeds, problems = difference.shape
    mean = float(difference.mean())
    if seeds < 2:
        return Estimate(mean, math.nan, math.nan, seeds)
    rng = np.random.default_rng(seed)
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds  # [B, S]
    by_problem = rng.multinomial(problems, np.full(problems, 1 / problems), size=RESAMPLES) / problems  # [B, P]
    means = np.einsum("bs,bs->b", by_seed, by_problem @ difference.T)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    return Estimate(mean, float(low), float(high), seeds)


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile in (0.5, 1) of Student's t, by bisection on its numerically integrated density."""
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)

    def mass_up_to(t: float) -> float:
        x = np.linspace(0.0, t, 4001)
        density = constant * (1 + x * x / degrees) ** (-(degrees + 1) / 2)
        return 0.5 + float(np.trapezoid(density, x))

    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mass_up_to(middle) < probability else (low, middle)
    return (low + high) / 2
