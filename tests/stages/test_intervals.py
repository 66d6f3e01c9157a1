"""Intervals against known distributions: widths, coverage on simulated data, tables of Student's t."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from eopd.stages.intervals import (
    Interval,
    bootstrap,
    group_means,
    intervals,
    resampled_means,
    t_interval,
    t_quantile,
    welch_interval,
)


def test_interval_of_a_normal_mean_has_the_known_width() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(5.0, 2.0, size=(900, 1))
    (result,) = intervals(resampled_means(values, resamples=4000, seed=1), 0.95)
    half = 1.96 * values.std() / math.sqrt(900)
    assert result.low == pytest.approx(values.mean() - half, abs=0.02)
    assert result.high == pytest.approx(values.mean() + half, abs=0.02)


def test_interval_covers_the_truth_about_as_often_as_promised() -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for trial in range(300):
        values = rng.binomial(8, 0.3, size=(120, 1)) / 8
        (result,) = intervals(resampled_means(values, resamples=400, seed=trial), 0.9)
        covered += result.low <= 0.3 <= result.high
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


def test_resampling_is_seeded() -> None:
    values = np.random.default_rng(0).random((50, 3))
    assert np.array_equal(resampled_means(values, seed=4), resampled_means(values, seed=4))
    assert not np.array_equal(resampled_means(values, seed=4), resampled_means(values, seed=5))
    with pytest.raises(ValueError, match="at least one problem"):
        resampled_means(np.zeros((0, 2)))
    with pytest.raises(ValueError, match=r"got 1\.5"):
        intervals(values, 1.5)


def test_problems_are_drawn_within_their_benchmark_and_benchmarks_count_the_same() -> None:
    """Constant differences of 0.2 in 30 problems and of 0.0 in 500: no resample says anything but 0.1."""
    values = np.concatenate([np.full((30, 1), 0.2), np.zeros((500, 1))])
    groups = ["small"] * 30 + ["large"] * 500
    assert resampled_means(values, groups=groups) == pytest.approx(0.1, abs=1e-12)
    assert group_means(values, groups) == pytest.approx(0.1)
    assert group_means(values) == pytest.approx(0.2 * 30 / 530)
    mixed = np.random.default_rng(1).random((530, 1))
    parts = [resampled_means(mixed[:30], resamples=4000), resampled_means(mixed[30:], resamples=4000)]
    spread = math.sqrt(sum(float(part.var()) for part in parts)) / 2
    assert resampled_means(mixed, groups=groups, resamples=4000).std() == pytest.approx(spread, rel=0.05)
    scattered = np.random.default_rng(2).permutation(530)
    assert resampled_means(mixed[scattered], groups=[groups[i] for i in scattered]).mean() == pytest.approx(
        float(group_means(mixed, groups)[0]), abs=0.005
    )


def bootstrap_one(values: np.ndarray, **changes: Any) -> Interval | None:
    (result,) = bootstrap(values[:, None], **{"bounds": (0.0, 1.0), "resamples": 400, **changes})
    return result


def test_where_problems_differ_the_interval_is_that_of_the_resamples() -> None:
    values = np.random.default_rng(0).random((50, 3))
    assert bootstrap(values, bounds=(0.0, 1.0)) == intervals(resampled_means(values))
    assert bootstrap(values) == intervals(resampled_means(values))


def test_problems_that_are_all_alike_leave_room_for_those_not_seen() -> None:
    """0 of 30: what Clopper and Pearson say. Other values: the same share may lie at either bound."""
    none = bootstrap_one(np.zeros(30))
    assert none is not None
    assert (none.low, none.high) == pytest.approx(
        (0.0, 0.1157), abs=1e-5
    )  # scipy.stats.binomtest(0, 30).proportion_ci()
    every = bootstrap_one(np.ones(30))
    assert every is not None
    assert (every.low, every.high) == pytest.approx((1 - 0.11570, 1.0), abs=1e-5)
    quarter = bootstrap_one(np.full(30, 0.25))
    assert quarter is not None
    assert (quarter.low, quarter.high) == pytest.approx((0.25 - 0.25 * 0.1157, 0.25 + 0.75 * 0.1157), abs=1e-4)
    equal = bootstrap_one(np.zeros(30), bounds=(-1.0, 1.0))  # paired differences of two runs that agree everywhere
    assert equal is not None
    assert (equal.low, equal.high) == pytest.approx((-0.1157, 0.1157), abs=1e-4)
    assert bootstrap_one(np.full(30, 7.0), bounds=None) is None
    assert bootstrap_one(np.ones(1)) is None


def test_a_benchmark_whose_problems_are_all_alike_widens_the_mean_over_benchmarks() -> None:
    rng = np.random.default_rng(0)
    varied = rng.random(200)
    values, groups = np.concatenate([np.zeros(30), varied]), ["aime"] * 30 + ["math"] * 200
    result, alone = (bootstrap_one(v, groups=g, resamples=8000) for v, g in ((values, groups), (varied, None)))
    assert result is not None
    assert alone is not None
    mean = varied.mean() / 2
    upper = math.hypot(0.1157 / 2, (alone.high - varied.mean()) / 2)
    assert result.high - mean == pytest.approx(upper, rel=0.05)
    assert mean - result.low == pytest.approx((varied.mean() - alone.low) / 2, rel=0.1)


@pytest.mark.parametrize(("p", "least"), [(0.02, 0.99), (0.05, 0.99), (0.12, 0.86), (0.3, 0.92), (0.98, 0.99)])
def test_coverage_with_thirty_problems(p: float, least: float) -> None:
    """Of 95 % intervals, each problem solved or not. Percentiles alone would cover 0.02 in 0.45 of the cases (0 of 30
    gave [0, 0]); what is left is the known fault of percentiles at a few successes of 30, worst about 0.12.
    """
    covered = 0
    for trial in range(1500):
        result = bootstrap_one(np.random.default_rng(trial).binomial(1, p, 30).astype(float), seed=trial)
        assert result is not None
        covered += result.low <= p <= result.high
    assert covered / 1500 >= least


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
        interval = t_interval(rng.normal(0.3, 0.02, 5).tolist())
        assert interval is not None
        covered += interval.low <= 0.3 <= interval.high
    assert covered / trials == pytest.approx(0.95, abs=0.012)  # three standard errors


@pytest.mark.parametrize(("seeds", "most"), [(3, 0.78), (5, 0.87)])
def test_a_bootstrap_over_few_seeds_would_promise_too_much(seeds: int, most: float) -> None:
    """Why intervals over seeds are Student's: percentiles of resampled seeds cover 0.73 and 0.83 of the time."""
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(1000):
        values = rng.normal(0.3, 0.02, (seeds, 1))
        (result,) = intervals(resampled_means(values, resamples=500, seed=trial))
        covered += result.low <= 0.3 <= result.high
    assert covered / 1000 < most


def test_welch_intervals_cover_the_difference_of_unequal_spreads() -> None:
    rng = np.random.default_rng(4)
    trials = 2000
    covered = 0
    for _ in range(trials):
        interval = welch_interval(rng.normal(0.3, 0.01, 5).tolist(), rng.normal(0.35, 0.05, 8).tolist())
        assert interval is not None
        covered += interval.low <= 0.05 <= interval.high
    assert 0.94 <= covered / trials <= 0.975  # freedom is rounded down: rather too wide


def test_few_or_equal_seeds() -> None:
    assert t_interval([0.4]) is None
    assert welch_interval([0.4], [0.1, 0.2]) is None
    assert t_interval([0.5, 0.5]) == Interval(0.5, 0.5)
    assert welch_interval([0.5, 0.5], [0.75, 0.75]) == Interval(0.25, 0.25)
    assert t_interval([0.2, 0.4], 0.5) == Interval(pytest.approx(0.2), pytest.approx(0.4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got 1\.0"):
        t_interval([0.1, 0.2], 1.0)
