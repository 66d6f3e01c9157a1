"""Figures of scores by bin: means and z-scores, a permutation test, contrasts of query sets. Imports no torch.

Letters: D documents, K bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eopd.stages.attribute.documents import Bin
from eopd.stages.intervals import bootstrap

Floats = NDArray[np.float64]


def bin_table(scores: Floats, bins: Sequence[Bin]) -> list[dict[str, Any]]:
    """Return n, mean, sd and z of the scores [D] in each bin, in order of the bins' values.

    z is the bin's mean minus the mean of the K means, over the standard deviation of the K means (K - 1 in the
    denominator). A standard deviation of fewer than two values is None, and so is z if all means are equal.
    """
    names, places = _grouped(bins)
    of_bin = [scores[places == number] for number in range(len(names))]
    means = np.array([values.mean() for values in of_bin])
    spread = float(means.std(ddof=1)) if len(means) > 1 and np.ptp(means) else 0.0
    return [
        {
            "bin": list(name),
            "n": len(values),
            "mean": float(mean),
            "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
            "z": float((mean - means.mean()) / spread) if spread else None,
        }
        for name, values, mean in zip(names, of_bin, means, strict=True)
    ]


def permutation_test(scores: Floats, bins: Sequence[Bin], permutations: int, seed: int) -> dict[str, Any]:
    """Test whether bins differ more than random bins of their sizes.

    Returns:
        ``between``: share of the scores' variance that lies between bins. ``p``: share of the permutations, the one
        that was observed among them, in which it is at least as large.
    """
    names, places = _grouped(bins)
    sizes = np.bincount(places)
    centred = scores - scores.mean()
    total = float((centred**2).sum())

    def between(values: Floats) -> float:
        return float((np.bincount(places, weights=values, minlength=len(names)) ** 2 / sizes).sum())

    observed = between(centred)
    rng = np.random.default_rng(seed)
    # sums of the same numbers in another order differ in their last digits
    as_large = sum(between(rng.permutation(centred)) >= observed * (1 - 1e-9) for _ in range(permutations))
    return {
        "between": observed / total if total else 0.0,
        "p": (1 + as_large) / (1 + permutations),
        "permutations": permutations,
    }


def contrast(
    first: Floats, second: Floats, bins: Sequence[Bin], *, resamples: int, confidence: float
) -> list[dict[str, Any]]:
    """Return for each bin the mean difference of two query sets' scores [D], with a bootstrap interval over documents.

    Each set's scores are first standardised over all documents (mean 0, standard deviation 1), since their scale
    depends on how much the set's own samples agree.
    """
    names, places = _grouped(bins)
    difference = _standardised(first) - _standardised(second)
    rows = []
    for number, name in enumerate(names):
        values = difference[places == number]
        interval = bootstrap(values[:, None], resamples=resamples, confidence=confidence)[0]
        bounds = None if interval is None else [interval.low, interval.high]
        rows.append({"bin": list(name), "n": len(values), "mean": float(values.mean()), "interval": bounds})
    return rows


def _standardised(scores: Floats) -> Floats:
    spread = float(scores.std())
    return (scores - scores.mean()) / spread if spread else np.zeros_like(scores)


def _grouped(bins: Sequence[Bin]) -> tuple[list[Bin], NDArray[np.int64]]:
    """Return the bins in order of their values, and the number of each document's bin [D]."""
    names = sorted(set(bins))
    numbers = {name: number for number, name in enumerate(names)}
    return names, np.array([numbers[bin_] for bin_ in bins], dtype=np.int64)
