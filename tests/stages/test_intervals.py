"""Intervals against known distributions: widths, coverage on simulated data, tables of Student's t."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eopd.stages.intervals import Interval, intervals, resampled_means, t_interval, t_quantile, welch_interval


def test_interval_of_a_normal_mean_has_the_known_width() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(5.0, 2.0, size=(900, 1))
    (found,) = intervals(resampled_means(values, resamples=4000, seed=1), 0.95)
    half = 1.96 * values.std() / math.sqrt(900)
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_interval_covers_the_truth_about_as_often_as_promised() -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for trial in range(300):
        values = rng.binomial(8, 0.3, size=(120, 1)) / 8
        (found,) = intervals(resampled_means(values, resamples=400, seed=trial), 0.9)
        covered += found.low <= 0.3 <= found.high
    assert 0.84 <= covered / 300 <= 0.95  # 0.9 with a standard error of 0.017


def test_paired_differences_are_narrower_than_independent_ones() -> None:
    rng = np.random.default_rng(5)
    difficulty = rng.random((400, 1))
    better = np.clip(difficulty + 0.05 + 0.01 * rng.normal(size=(400, 1)), 0, 1)
    (paired,) = intervals(resampled_means(better - difficulty))
    first, second = intervals(resampled_means(np.hstack([difficulty, better])))
    assert paired.high - paired.low < 0.2 * (first.high - first.low)
    assert paired.low > 0.0
    assert first.high > second.low  # unpaired, the gain would not show


def test_bootstrap_is_seeded_and_degenerate_cases_are_exact() -> None:
    values = np.random.default_rng(0).random((50, 3))
    assert np.array_equal(resampled_means(values, seed=4), resampled_means(values, seed=4))
    assert not np.array_equal(resampled_means(values, seed=4), resampled_means(values, seed=5))
    assert intervals(resampled_means(np.full((7, 1), 0.25))) == [Interval(0.25, 0.25)]
    with pytest.raises(ValueError, match="at least one problem"):
        resampled_means(np.zeros((0, 2)))
    with pytest.raises(ValueError, match=r"got 1\.5"):
        intervals(values, 1.5)


def test_weighted_means_are_those_of_repeated_problems() -> None:
    """Two benchmarks of unequal size count the same when their problems are weighted by one over the size."""
    values = np.concatenate([np.full((10, 1), 1.0), np.full((30, 1), 0.0)])
    means = resampled_means(values, weights=[3.0] * 10 + [1.0] * 30, resamples=4000)
    assert means.mean() == pytest.approx(0.5, abs=0.01)
    equal = resampled_means(values, weights=[2.0] * 40, seed=3)
    assert equal == pytest.approx(resampled_means(values, seed=3))


@pytest.mark.parametrize(
    ("freedom", "probability", "table"),
    [
        (1, 0.975, 12.7062),
        (2, 0.975, 4.3027),
        (3, 0.95, 2.3534),
        (4, 0.975, 2.7764),
        (5, 0.995, 4.0321),
        (9, 0.975, 2.2622),
        (30, 0.975, 2.0423),
        (120, 0.9, 1.2886),
        (4, 0.5, 0.0),
    ],
)
def test_quantiles_of_student_are_those_of_the_tables(freedom: int, probability: float, table: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(table, abs=6e-5)


def test_t_intervals_over_seeds_cover_the_truth_exactly_as_often_as_promised() -> None:
    """With five seeds; an interval of 1.96 standard errors would cover 0.877 of the time."""
    rng = np.random.default_rng(2)
    trials = 3000
    covered = 0
    for _ in range(trials):
        found = t_interval(rng.normal(0.3, 0.02, 5).tolist())
        assert found is not None
        covered += found.low <= 0.3 <= found.high
    assert covered / trials == pytest.approx(0.95, abs=0.012)  # three standard errors


def test_welch_intervals_cover_the_difference_of_unequal_spreads() -> None:
    rng = np.random.default_rng(4)
    trials = 2000
    covered = 0
    for _ in range(trials):
        found = welch_interval(rng.normal(0.3, 0.01, 5).tolist(), rng.normal(0.35, 0.05, 8).tolist())
        assert found is not None
        covered += found.low <= 0.05 <= found.high
    assert 0.94 <= covered / trials <= 0.975  # freedom is rounded down: rather too wide


def test_few_or_equal_seeds() -> None:
    assert t_interval([0.4]) is None
    assert welch_interval([0.4], [0.1, 0.2]) is None
    assert t_interval([0.5, 0.5]) == Interval(0.5, 0.5)
    assert welch_interval([0.5, 0.5], [0.75, 0.75]) == Interval(0.25, 0.25)
    assert t_interval([0.2, 0.4], 0.5) == Interval(pytest.approx(0.2), pytest.approx(0.4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got 1\.0"):
        t_interval([0.1, 0.2], 1.0)
