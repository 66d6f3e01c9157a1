"""Intervals of means and of paired differences, against known distributions."""

from __future__ import annotations

import numpy as np
import pytest

from examples.study import compare


def test_t_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    result = [compare.paired(rng.normal(1.0, 0.3, size=(5, 2)), np.zeros((5, 2))).interval for _ in range(800)]
    assert np.mean([one is not None and one.low <= 1.0 <= one.high for one in result]) == pytest.approx(0.95, abs=0.025)
    assert compare.over_seeds(np.ones(1)).interval is None


@pytest.mark.parametrize("s", [3, 5])
def test_a_crossed_interval_of_seeds_alone_is_that_of_the_pairs(s: int) -> None:
    """Seeds vary, problems less than the noise of sampling does: nothing but the seeds' mean square is left."""
    a = np.random.default_rng(s).normal(size=(s, 40))
    a += np.arange(s)[:, None] - a.mean(axis=0)
    seeds, both = compare.paired(a, 0 * a), compare.crossed(a, 0 * a)
    assert seeds.interval is not None
    assert both.interval is not None
    assert (both.interval.low, both.interval.high) == pytest.approx((seeds.interval.low, seeds.interval.high))


@pytest.mark.parametrize(("s", "least", "widest"), [(3, 0.905, 2.25), (5, 0.93, 1.45)], ids=["3 seeds", "5 seeds"])
@pytest.mark.parametrize(
    ("seeds", "problems", "residual"),
    [(1.0, 0.0, 0.1), (0.0, 1.0, 0.1), (0.0, 0.0, 1.0), (0.1, 0.0, 1.0), (0.02, 0.3, 1.0), (0.5, 1.0, 1.0)],
    ids=["seeds", "problems", "residual", "few seeds' noise", "as measured", "all"],
)
def test_crossed_intervals_cover_the_mean_whatever_varies(
    seeds: float, problems: float, residual: float, s: int, least: float, widest: float
) -> None:
    """Known standard deviations, in a study of 60 problems."""
    rng = np.random.default_rng(2)
    draws, p = 1000, 60
    table = seeds * rng.normal(size=(draws, s, 1)) + problems * rng.normal(size=(draws, 1, p))
    table = table + residual * rng.normal(size=(draws, s, p))
    result = [compare.crossed(one, np.zeros((s, p))).interval for one in table]
    low, high = np.array([(one.low, one.high) for one in result if one is not None]).T
    assert least <= np.mean((low <= 0) & (high >= 0)) <= 0.985
    true = np.sqrt(seeds**2 / s + problems**2 / p + residual**2 / (s * p))
    # a bootstrap that draws both is 1.6 times as wide as the residual; S - 1 degrees of freedom cost a factor of
    # 1.4 (S = 5) or 2.2 (S = 3)
    assert 0.9 <= np.median(high - low) / 2 / (1.96 * true) <= (1.2 if seeds == 0 else widest)


def test_a_crossed_interval_is_never_below_the_noise_of_sampling() -> None:
    """Seeds whose means are equal by luck: the t interval over seeds is a point, the crossed one is not."""
    a = np.random.default_rng(1).normal(0.1, 1.0, size=(5, 400))
    a -= a.mean(axis=1, keepdims=True) - 0.1
    b = np.zeros_like(a)
    seeds, both = compare.paired(a, b).interval, compare.crossed(a, b).interval
    assert seeds is not None
    assert both is not None
    assert seeds.low == pytest.approx(seeds.high)
    assert (both.high - both.low) / 2 == pytest.approx(1.96 * a.std() / np.sqrt(2000), rel=0.1)
    same = compare.crossed(b, b)
    assert same.interval is not None
    assert (same.mean, same.interval.low, same.interval.high) == (0.0, 0.0, 0.0)
    assert compare.crossed(a[:2], b[:2]).interval is None
