"""Pass@k against exact enumeration, intervals against known distributions."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from eopd.stages.evaluate.passk import Interval, intervals, pass_at_all, pass_at_k, resampled_means


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_pass_at_k_is_the_enumerated_share_of_subsets(n: int) -> None:
    for c in range(n + 1):
        outcomes = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(combinations(outcomes, k))
            exact = Fraction(sum(any(subset) for subset in subsets), len(subsets))
            assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-14)


@pytest.mark.parametrize(("n", "c", "k"), [(10_000, 1, 5000), (10_000, 3, 1), (100_000, 40_000, 50), (2000, 1, 1)])
def test_pass_at_k_is_stable_where_binomials_overflow(n: int, c: int, k: int) -> None:
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-11)


def test_pass_at_k_is_unbiased() -> None:
    """Averaged over binomial outcomes it is 1 - (1 - p)^k, whatever n."""
    n, p = 8, 0.23
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    for k in range(1, n + 1):
        mean = math.fsum(w * pass_at_k(n, c, k) for c, w in enumerate(weights))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-13)


def test_pass_at_all_agrees_with_the_single_ones_and_grows_with_k() -> None:
    table = pass_at_all(8, [0, 3, 8])
    assert table.shape == (3, 8)
    assert np.all(table[0] == 0)
    assert np.all(table[2] == 1)
    assert table[1].tolist() == [pass_at_k(8, 3, k) for k in range(1, 9)]
    assert np.all(np.diff(table[1]) >= 0)
    assert table[1, 0] == pytest.approx(3 / 8)


@pytest.mark.parametrize(("n", "c", "k"), [(8, 9, 1), (8, -1, 1), (8, 2, 0), (8, 2, 9)])
def test_impossible_counts_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"in \["):
        pass_at_k(n, c, k)


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
