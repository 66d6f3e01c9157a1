"""Evaluations problem by problem: the rounds that runs share, and what changed on the same problems.

Letters: S seeds, P problems.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from eopd.stages.intervals import Interval, bootstrap, group_means
from eopd.stages.report.data import Estimate, ProblemScores

Floats = NDArray[np.float64]


def after(scores: Sequence[ProblemScores], round_: int) -> ProblemScores | None:
    """The evaluation after a round."""
    return next((found for found in scores if found.round == round_), None)


def asked(scores: ProblemScores) -> Hashable:
    """Equal for evaluations on the same problems, by name and by the files that they are of."""
    return (*scores.names, *sorted(scores.sources.items()))


def shared_rounds(runs: Sequence[Sequence[ProblemScores]]) -> list[int]:
    """Rounds after which all runs were evaluated on the same problems, in order."""
    rounds = []
    for first in runs[0] if runs else ():
        found = [after(scores, first.round) for scores in runs]
        if all(other is not None and asked(other) == asked(first) for other in found):
            rounds.append(first.round)
    return sorted(rounds)


def average(scores: ProblemScores) -> Floats:
    """Share of right samples [S, P]."""
    return np.asarray(scores.correct, np.float64) / scores.samples


def passed(scores: ProblemScores, k: int) -> Floats:
    """Unbiased Pass@k [S, P] (Chen et al. 2021): 1 - C(n - c, k) / C(n, k)."""
    n = scores.samples
    by_count = np.asarray([1.0 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return np.asarray(by_count[np.asarray(scores.correct)])


def mean(values: Floats, scores: ProblemScores) -> float:
    """Of values [P] over the problems; benchmarks count the same."""
    return float(group_means(values[:, None], scores.benchmarks)[0])


def over_problems(differences: Floats, scores: ProblemScores, confidence: float = 0.95) -> Interval | None:
    """Of the mean of paired differences [P] of rates."""
    (found,) = bootstrap(differences[:, None], bounds=(-1.0, 1.0), groups=scores.benchmarks, confidence=confidence)
    return found


def gains(first: ProblemScores, last: ProblemScores, confidence: float = 0.95) -> tuple[Estimate, Estimate]:
    """Last minus first Avg@k and Pass@k (k: all samples) of one run, with intervals over the problems."""
    k = min(first.samples, last.samples)
    pairs = ((average(first), average(last)), (passed(first, k), passed(last, k)))
    avg, at_k = (_gain((after - before).mean(axis=0), first, confidence) for before, after in pairs)
    return avg, at_k


def _gain(differences: Floats, scores: ProblemScores, confidence: float) -> Estimate:
    found = over_problems(differences, scores, confidence)
    return Estimate(mean(differences, scores), *((found.low, found.high) if found else (None, None)))
