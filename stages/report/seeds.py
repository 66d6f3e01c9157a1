"""Runs that differ in nothing but their seed, as one: means over the seeds with Student's t intervals."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from eopd.stages.intervals import t_interval
from eopd.stages.report import words
from eopd.stages.report.data import (
    BinnedMean,
    CostRow,
    Estimate,
    Histogram,
    Interval,
    ProblemScores,
    RoundData,
    RunData,
    StepRow,
)
from eopd.stages.report.scores import after, asked, gains, shared_rounds

_NOT_FIGURES = ("round", "measured", "benchmarks", "intervals")
_RATES = ("avg_at_k", "pass_at_k", "avg_interval", "pass_interval")
_OF_ROUNDS = [item.name for item in fields(RoundData) if item.name not in (*_NOT_FIGURES, *_RATES)]
_OF_STEPS = [item.name for item in fields(StepRow) if item.name not in ("round", "step", "further")]
_WHOLE = ("tokens",)  # counts
_SUMMED = ("ungraded", "left_out")


def grouped(runs: Sequence[RunData]) -> list[RunData]:
    """Each set of runs of equal ``kin`` and different seeds as one run, in the order of their first members."""
    groups: list[list[RunData]] = []
    for run in runs:
        home = next((group for group in groups if run.kin and _belongs(run, group)), None)
        if home is None:
            groups.append([run])
        else:
            home.append(run)
    return [group[0] if len(group) == 1 else merged(group) for group in groups]


def _belongs(run: RunData, group: Sequence[RunData]) -> bool:
    return group[0].kin == run.kin and run.seed not in [member.seed for member in group]


def merged(runs: Sequence[RunData]) -> RunData:
    """At least two runs as one. A figure of a round is the mean over all of them, or is left out where one lacks it;
    gains and scores are of the rounds that all were evaluated at.
    """
    first = runs[0]
    seeds = ", ".join(str(run.seed) for run in runs)
    numbers = sorted({item.round for run in runs for item in run.rounds})
    rounds = [{item.round: item for item in run.rounds} for run in runs]
    shared = shared_rounds([run.scores for run in runs])
    avg, passed = _gains(runs, shared)
    return RunData(
        name=_name([run.name for run in runs]),
        settings={**first.settings, "name": ", ".join(run.name for run in runs), "seed": seeds},
        rounds=[_round([found.get(number, RoundData(number)) for found in rounds]) for number in numbers],
        training=_training(runs),
        entropy_histogram_teacher=_histogram([run.entropy_histogram_teacher for run in runs]),
        entropy_histogram_student=_histogram([run.entropy_histogram_student for run in runs]),
        by_entropy_bin=_binned([run.by_entropy_bin for run in runs]),
        first_by_entropy_bin=_binned([run.first_by_entropy_bin for run in runs]),
        read_with=_shared([run.read_with for run in runs if run.read_with]),
        rollouts=first.rollouts,
        cost=_costs(runs),
        threshold=first.threshold,
        interval=f"95 % Student t over {len(runs)} seeds",
        avg_gain=avg,
        pass_gain=passed,
        scores=[_scores(runs, number) for number in shared],
        kin=first.kin,
        graders=sorted({name for run in runs for name in run.graders}),
        head=words.joined(sorted({run.head for run in runs if run.head})),
        warnings=[f"Seed {run.seed}: {warning}" for run in runs for warning in run.warnings],
        notes=[
            f"Means over {len(runs)} seeds ({seeds}); rollouts are of seed {first.seed}.",
            *_unequal(runs),
            *(f"Seed {run.seed}: {note}" for run in runs for note in run.notes),
        ],
    )


def _unequal(runs: Sequence[RunData]) -> list[str]:
    """What is said where not every seed was evaluated after the same rounds."""
    found = {run.seed: [item.round for item in run.rounds if item.avg_at_k] for run in runs}
    shared = sorted(set.intersection(*map(set, found.values())))
    differing = sorted(set().union(*found.values()) - set(shared))
    if not differing:
        return []
    whose = [f"seed {seed} after {_list(set(rounds) & set(differing))}" for seed, rounds in found.items()]
    rest = "means, gains and pairs leave them out" if shared else "there is no round to take means of"
    return [f"Not every seed was evaluated after round {_list(differing)} ({'; '.join(whose)}): {rest}."]


def _list(rounds: Iterable[int]) -> str:
    return words.joined([str(number) for number in sorted(rounds)]) or "none of these"


def _name(names: Sequence[str]) -> str:
    """What the names share before a number at their end, such as eopd of eopd-s0 and eopd-s1; else the first."""
    stems = {re.sub(r"([-_. ]+(s|seed)?[-_. ]*)?\d+$", "", name) for name in names}
    (stem,) = stems if len(stems) == 1 else (names[0],)
    return f"{stem or names[0]} ({len(names)} seeds)"


def _mean(values: Iterable[float | None]) -> tuple[float | None, Interval | None]:
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    found = t_interval(known)
    return float(np.mean(known)), None if found is None else (found.low, found.high)


def _of_all(values: Sequence[float | None]) -> tuple[float | None, Interval | None]:
    """None where one lacks it: a mean of some seeds beside means of all would show a step that is none."""
    return (None, None) if None in values else _mean(values)


def _round(items: Sequence[RoundData]) -> RoundData:
    made: dict[str, Any] = {"round": items[0].round, "intervals": {}, "measured": all(item.measured for item in items)}
    for name in _OF_ROUNDS:
        if name in _SUMMED:
            counts = [getattr(item, name) for item in items]
            made[name] = None if None in counts else sum(counts)
            continue
        value, interval = _of_all([getattr(item, name) for item in items])
        made[name] = round(value) if value is not None and name in _WHOLE else value
        if interval is not None:
            made["intervals"][name] = interval
    for which in ("avg", "pass"):
        values, bounds = {}, {}
        for k in sorted({k for item in items for k in getattr(item, f"{which}_at_k")}):
            value, interval = _of_all([getattr(item, f"{which}_at_k").get(k) for item in items])
            if value is not None:
                values[k] = value
            if interval is not None:
                bounds[k] = interval
        made[f"{which}_at_k"], made[f"{which}_interval"] = values, bounds
    made["benchmarks"] = {
        name: _round([item.benchmarks[name] for item in items])
        for name in items[0].benchmarks
        if all(name in item.benchmarks for item in items)
    }
    return RoundData(**made)


def _training(runs: Sequence[RunData]) -> list[StepRow]:
    """Steps of the rounds that all of them trained."""
    steps: dict[tuple[int, int], list[StepRow]] = {}
    trained = set.intersection(*({row.round for row in run.training} for run in runs))
    for run in runs:
        for row in (row for row in run.training if row.round in trained):
            steps.setdefault((row.round, row.step), []).append(row)
    found = []
    for (round_, step), rows in sorted(steps.items()):
        names = sorted({name for row in rows for name in row.further})
        further = {name: _mean(row.further.get(name) for row in rows)[0] for name in names}
        means = {name: _mean(getattr(row, name) for row in rows)[0] for name in _OF_STEPS}
        known = {name: value for name, value in further.items() if value is not None}
        found.append(StepRow(round_, step, **means, further=known))
    return found


def _histogram(found: Sequence[Histogram | None]) -> Histogram | None:
    """Counts added up; a seed with rarer, larger entropies has a last bin that the others do not."""
    known = [histogram for histogram in found if histogram is not None]
    if not known:
        return None
    edges = max((histogram.edges for histogram in known), key=len)
    if any(histogram.edges != edges[: len(histogram.edges)] for histogram in known):
        return None
    counts = np.zeros(len(edges) - 1, np.int64)
    for histogram in known:
        counts[: len(histogram.counts)] += histogram.counts
    return Histogram(edges, counts.tolist())


def _binned(runs: Sequence[dict[str, BinnedMean]]) -> dict[str, BinnedMean]:
    """Means over the seeds that have them, of each title."""
    titles = list(dict.fromkeys(title for found in runs for title in found))
    means = {title: _bin_by_bin([found[title] for found in runs if title in found]) for title in titles}
    return {title: mean for title, mean in means.items() if mean is not None}


def _bin_by_bin(known: Sequence[BinnedMean]) -> BinnedMean | None:
    """Counts are of all seeds; no interval where all have one value, such as an agreement of 1."""
    if any(binned.edges != known[0].edges for binned in known):
        return None
    means, intervals = zip(
        *(_mean(column) for column in zip(*(each.means for each in known), strict=True)), strict=True
    )
    intervals = tuple(found if found and found[0] < found[1] else None for found in intervals)
    counts = None
    if all(binned.counts is not None for binned in known):
        counts = [sum(column) for column in zip(*(each.counts or [] for each in known), strict=True)]
    return BinnedMean(known[0].edges, list(means), counts, list(intervals))


def _shared(found: Sequence[dict[str, str]]) -> dict[str, str]:
    """What is the same in all: each seed has, for instance, a fixed set of its own."""
    return {name: text for name, text in (found[0] if found else {}).items() if all(o.get(name) == text for o in found)}


def _gains(runs: Sequence[RunData], shared: Sequence[int]) -> tuple[Estimate | None, Estimate | None]:
    """Between the first and the last round that all seeds were evaluated at."""
    if len(shared) < 2:
        return None, None
    ends = [(_known(run, shared[0]), _known(run, shared[-1])) for run in runs]
    found = [gains(first, last) for first, last in ends if asked(first) == asked(last)]
    if len(found) < len(runs):
        return None, None
    avg, passed = (_mean(gain.value for gain in column) for column in zip(*found, strict=True))
    return _estimate(*avg), _estimate(*passed)


def _estimate(value: float | None, interval: Interval | None) -> Estimate | None:
    return None if value is None else Estimate(value, *(interval or (None, None)))


def _known(run: RunData, round_: int) -> ProblemScores:
    found = after(run.scores, round_)
    assert found is not None, (run.name, round_)
    return found


def _scores(runs: Sequence[RunData], round_: int) -> ProblemScores:
    known = [_known(run, round_) for run in runs]
    rows = sorted((seed, row) for scores in known for seed, row in zip(scores.seeds, scores.correct, strict=True))
    return replace(known[0], seeds=[seed for seed, _ in rows], correct=[row for _, row in rows])


def _costs(runs: Sequence[RunData]) -> list[CostRow]:
    """What all seeds took together; what several of them read counts once."""
    rows: dict[str, CostRow] = {}
    for number, run in enumerate(runs):
        for place, row in enumerate(run.cost):
            rows.setdefault(row.key or f"{number} {place}", row)
    return sorted(rows.values(), key=lambda row: row.round if row.round is not None else -1)
