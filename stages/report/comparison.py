"""Runs in pairs: differences of Avg@k and Pass@k on the same problems, to the first run on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eopd.stages.intervals import Interval, intervals, resampled_means, t_interval, welch_interval
from eopd.stages.report import words
from eopd.stages.report.data import ProblemScores, RunData
from eopd.stages.report.figure import Rows

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """``name`` minus the baseline, of ``metric``. ``over_seeds`` is None where one of them has a single seed."""

    name: str
    metric: str
    value: float
    over_problems: Interval
    over_seeds: Interval | None
    paired_seeds: bool


def differences(runs: Sequence[RunData]) -> list[Difference]:
    """Of every further run to the first, where both were evaluated on the same problems.

    ``over_problems``: bootstrap over the problems of the paired differences, each the mean over its seeds.
    ``over_seeds``: Student's t of the differences seed by seed where the seeds are the same ones, else Welch's.
    """
    found: list[Difference] = []
    base = runs[0].scores
    for run in runs[1:]:
        other = run.scores
        if base is None or other is None or base.names != other.names:
            continue
        k = min(base.samples, other.samples)
        for metric, values in (
            (f"Avg@{k}", [_average(scores) for scores in (base, other)]),
            (f"Pass@{k}", [_passed(scores, k) for scores in (base, other)]),
        ):
            found.append(_difference(run.name, metric, values[0], values[1], base, other))
    return found


def table(runs: Sequence[RunData]) -> Rows:
    """The differences as text; no row where nothing can be compared."""
    body = tuple(
        (
            one.name,
            one.metric,
            words.change(one.value),
            _bounds(one.over_problems),
            _bounds(one.over_seeds) if one.over_seeds else "one seed",
            _word(one),
        )
        for one in differences(runs)
    )
    head = ("run", "metric", "difference", "95 % over problems", "95 % over seeds", "zero is")
    return Rows(head, body)


def _difference(
    name: str, metric: str, first: Floats, second: Floats, base: ProblemScores, other: ProblemScores
) -> Difference:
    """``first`` and ``second``: [seeds, problems]."""
    weights = np.asarray(base.weights)
    paired = second.mean(axis=0) - first.mean(axis=0)
    (over_problems,) = intervals(resampled_means(paired[:, None], weights=base.weights))
    seeds = [np.average(values, axis=1, weights=weights) for values in (first, second)]
    same = len(base.seeds) > 1 and base.seeds == other.seeds
    over_seeds = t_interval((seeds[1] - seeds[0]).tolist()) if same else welch_interval(*(s.tolist() for s in seeds))
    return Difference(name, metric, float(np.average(paired, weights=weights)), over_problems, over_seeds, same)


def _average(scores: ProblemScores) -> Floats:
    return np.asarray(scores.correct, np.float64) / scores.samples


def _passed(scores: ProblemScores, k: int) -> Floats:
    """Unbiased Pass@k of each problem (Chen et al. 2021): 1 - C(n - c, k) / C(n, k)."""
    n = scores.samples
    by_count = np.asarray([1.0 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return np.asarray(by_count[np.asarray(scores.correct)])


def _bounds(interval: Interval) -> str:
    return f"{words.change(interval.low)} to {words.change(interval.high)}"


def _word(one: Difference) -> str:
    """Whether the widest interval holds zero."""
    bounds = [one.over_problems] + ([one.over_seeds] if one.over_seeds else [])
    return "excluded" if all(found.low > 0 or found.high < 0 for found in bounds) else "included"
