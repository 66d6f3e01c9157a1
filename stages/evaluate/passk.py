"""Avg@k and the unbiased Pass@k. Letters: P problems, n samples a problem, c correct ones among them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that ``k`` of the ``n`` samples, drawn without replacement, include one of the ``c`` correct
    ones.

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
    """Return Pass@k of each problem for every k: [P, n], column k-1 is Pass@k."""
    table = {c: [pass_at_k(n, c, k) for k in range(1, n + 1)] for c in set(correct)}
    return np.asarray([table[c] for c in correct], dtype=np.float64).reshape(len(correct), n)
