"""Avg@k, the unbiased Pass@k, and bootstrap intervals over problems.

Letters: P problems, n samples a problem, c correct ones among them, B bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval of a mean over problems (probabilities, not percent)."""

    low: float
    high: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of ``k`` of the ``n`` samples, drawn without replacement, is among the ``c`` correct.

    ``1 - C(n-c, k) / C(n, k)`` (Chen et al. 2021, arXiv 2107.03374), as a product, so that it neither overflows
    nor cancels: the ratio is the product over i in (n-c, n] of (1 - k/i).

    Raises:
        ValueError: not 0 <= c <= n or not 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"correct samples must be in [0, n], got c = {c}, n = {n}")
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, n], got k = {k}, n = {n}")
    if n - c < k:
        return 1.0
    if c == 0:
        return 0.0
    return -math.expm1(math.fsum(math.log1p(-k / i) for i in range(n - c + 1, n + 1)))


def pass_at_all(n: int, correct: Sequence[int]) -> Floats:
    """Pass@k of each problem for every k: [P, n], column k-1 is Pass@k."""
    table = {c: [pass_at_k(n, c, k) for k in range(1, n + 1)] for c in set(correct)}
    return np.asarray([table[c] for c in correct], dtype=np.float64).reshape(len(correct), n)


def resampled_means(values: Floats, *, resamples: int = 2000, seed: int = 0) -> Floats:
    """Means of the columns of ``values`` [P, M] over bootstrap resamples of the problems: [B, M].

    All columns share the resampled problems. Pass differences of two runs on the same problems for a paired test.

    Raises:
        ValueError: no problem.
    """
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"a bootstrap needs values [P, M] of at least one problem, got shape {values.shape}")
    rng = np.random.default_rng(seed)
    problems = len(values)
    weights = rng.multinomial(problems, np.full(problems, 1.0 / problems), size=resamples)
    means: Floats = weights @ values / problems
    return means


def intervals(means: Floats, confidence: float = 0.95) -> list[Interval]:
    """Percentile intervals of the M columns of resampled means [B, M].

    Raises:
        ValueError: a confidence outside (0, 1).
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(means, [tail, 100.0 - tail], axis=0)
    return [Interval(float(a), float(b)) for a, b in zip(low, high, strict=True)]
