"""Intervals: bootstrap over problems, Student's t over seeds. Needs numpy only; shared by evaluation, report and study.

Letters: P problems, M columns (figures), B bootstrap resamples, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_SAME = 1e-12  # values this close, relatively, are one value


@dataclass(frozen=True)
class Interval:
    """A confidence interval, in the unit of what it is of (probabilities, not percent)."""

    low: float
    high: float


def group_means(values: Floats, groups: Sequence[str] | None = None) -> Floats:
    """Return means of the columns of ``values`` [P, M] per group, averaged over the groups whatever their size."""
    return np.asarray(np.mean([rows.mean(axis=0) for rows in _grouped(values, groups)], axis=0))


def resampled_means(
    values: Floats, *, resamples: int = 2000, seed: int = 0, groups: Sequence[str] | None = None
) -> Floats:
    """Return means of the columns of ``values`` [P, M] over bootstrap resamples of the problems: [B, M].

    All columns share the resampled problems. Pass differences of two runs on the same problems for a paired test.

    Args:
        groups: of each problem [P], such as its benchmark. Problems are drawn within their group, so that each keeps
            its size, and groups count the same (default: one group).

    Raises:
        ValueError: no problem.
    """
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"a bootstrap needs values [P, M] of at least one problem, got shape {values.shape}")
    rng = np.random.default_rng(seed)
    means = []
    for rows in _grouped(values, groups):
        problems = len(rows)
        counts = rng.multinomial(problems, np.full(problems, 1.0 / problems), size=resamples)
        means.append(counts @ rows / problems)
    return np.asarray(np.mean(means, axis=0))


def bootstrap(
    values: Floats,
    *,
    bounds: tuple[float, float] | None = None,
    groups: Sequence[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> list[Interval | None]:
    """Return bootstrap intervals, over problems, of the means of the columns of ``values`` [P, M] (``group_means``).

    Percentile bootstrap within the groups. Resamples of a group whose problems all have one value never differ, so the
    mean of such a group gets other ends: a value not seen among P problems may still have the share that Clopper and
    Pearson give 0 of P, 1 - (tail) ** (1 / P), and lie at either of the ``bounds``. Ends of such groups and of the
    resamples are put together by their squares (Zou and Donner 2008).

    Args:
        bounds: the least and the largest value that a problem can have, such as (0, 1), or (-1, 1) of differences.

    Returns:
        None for a column of fewer than two problems, or with such a group where ``bounds`` are not given.

    Raises:
        ValueError: no problem; a confidence outside (0, 1).
    """
    resampled = intervals(resampled_means(values, resamples=resamples, seed=seed, groups=groups), confidence)
    if len(values) < 2:
        return [None] * values.shape[1]
    parts = _grouped(values, groups)
    means = group_means(values, groups)
    return [
        _with_unseen(float(mean), interval, [rows[:, column] for rows in parts], bounds, (1.0 - confidence) / 2.0)
        for column, (mean, interval) in enumerate(zip(means, resampled, strict=True))
    ]


def _with_unseen(
    mean: float, resampled: Interval, parts: Sequence[Floats], bounds: tuple[float, float] | None, tail: float
) -> Interval | None:
    alike = [values for values in parts if all_alike(values)]
    if not alike:
        return resampled
    if bounds is None:
        return None
    below, above = max(0.0, mean - resampled.low) ** 2, max(0.0, resampled.high - mean) ** 2
    for values in alike:
        unseen = (1.0 - tail ** (1.0 / len(values))) / len(parts)
        below += (unseen * (float(values[0]) - bounds[0])) ** 2
        above += (unseen * (bounds[1] - float(values[0]))) ** 2
    return Interval(mean - math.sqrt(below), mean + math.sqrt(above))


def all_alike(values: Floats) -> bool:
    """True if all ``values`` are equal up to rounding."""
    return bool(np.ptp(values) <= _SAME * max(1.0, abs(float(values[0]))))


def _grouped(values: Floats, groups: Sequence[str] | None) -> list[Floats]:
    """Return the rows of each group, in order of the names."""
    if groups is None:
        return [values]
    names, places = np.unique(np.asarray(groups), return_inverse=True)
    return [values[places == number] for number in range(len(names))]


def intervals(means: Floats, confidence: float = 0.95) -> list[Interval]:
    """Return percentile intervals of the M columns of resampled means [B, M].

    Raises:
        ValueError: a confidence outside (0, 1).
    """
    _check(confidence)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(means, [tail, 100.0 - tail], axis=0)
    return [Interval(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Return Student's t interval of the mean of independent values, such as one figure or paired difference per seed.

    Exact for normal values. None with fewer than two values, as one value shows no spread.
    """
    _check(confidence)
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = t_quantile(0.5 + confidence / 2.0, len(values) - 1) * error
    return Interval(mean - half, mean + half)


def welch_interval(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Return Welch's interval (1947) of mean(second) - mean(first) for independent values of unequal variance; degrees
    of freedom are rounded down. None if either has fewer than two values."""
    _check(confidence)
    if min(len(first), len(second)) < 2:
        return None
    parts = [float(np.var(values, ddof=1)) / len(values) for values in (first, second)]
    difference, error = float(np.mean(second) - np.mean(first)), math.sqrt(sum(parts))
    if error == 0.0:
        return Interval(difference, difference)
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (first, second), strict=True))
    half = t_quantile(0.5 + confidence / 2.0, max(1, int(freedom))) * error
    return Interval(difference - half, difference + half)


def t_quantile(probability: float, freedom: int) -> float:
    """Return a quantile of Student's t with a whole number of degrees of freedom, for probabilities in [0.5, 1)."""
    assert 0.5 <= probability < 1.0, probability
    assert freedom >= 1, freedom
    low, high = 0.0, math.pi / 2.0  # of the angle whose tangent is t / sqrt(freedom)
    for _ in range(80):
        middle = (low + high) / 2.0
        if _mass_within(middle, freedom) < 2.0 * probability - 1.0:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(freedom)


def _mass_within(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) * tan(angle)): Abramowitz and Stegun 26.7.3 and 26.7.4, finite sums."""
    odd = freedom % 2
    cosine = math.cos(angle)
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    inside = total * math.sin(angle)
    return 2.0 / math.pi * (angle + inside) if odd else inside


def _check(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
