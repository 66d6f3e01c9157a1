"""Pass@k against exact enumeration."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from eopd.stages.evaluate.summary import pass_at_all, pass_at_k


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
