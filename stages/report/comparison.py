"""Runs in pairs: differences of Avg@k and Pass@k on the same problems, to the first run on the page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from eopd.stages.intervals import Interval, t_interval, welch_interval
from eopd.stages.report import words
from eopd.stages.report.data import ProblemScores, RunData
from eopd.stages.report.figure import Rows
from eopd.stages.report.scores import Floats, after, asked, average, mean, over_problems, passed, shared_rounds

_OF_NO_FIGURE = {  # of `evaluate`: what changes no figure, what the problems' names tell already, and the sample count
    *("alignment", "every", "engine", "engine_options", "verifier_workers", "rows_per_part", "confidence", "resamples"),
    *("benchmarks", "max_prompt_tokens", "too_long", "samples"),
}


@dataclass(frozen=True)
class Difference:
    """``name`` minus the baseline after ``round``, of Avg@k or Pass@k; ``k`` None: Avg@k of all samples of each of the
    two, which have different numbers of them.

    ``over_problems`` is None where there is one problem, ``over_seeds`` where one of the two has a single seed;
    ``pairs``: the seeds that were compared one by one, none where too few are the same.
    """

    name: str
    which: str  # avg or pass
    k: int | None
    round: int
    value: float
    over_problems: Interval | None
    over_seeds: Interval | None
    pairs: tuple[int, ...]

    @property
    def metric(self) -> str:
        return f"{'Avg' if self.which == 'avg' else 'Pass'}@{self.k or 'k'}"


@dataclass(frozen=True)
class Comparison:
    """``notes``: what is not compared, or not as expected."""

    differences: tuple[Difference, ...]
    notes: tuple[str, ...]


def compare(runs: Sequence[RunData]) -> Comparison:
    """Every further run with the first, after the last round that the two were evaluated at, on the same problems.

    ``over_problems``: bootstrap over the problems, within each benchmark, of the paired differences, each the mean over
    its seeds. ``over_seeds``: Student's t of the differences seed by seed where at least two seeds are in both (the
    others are left out), else Welch's.
    """
    base, notes, found, ends = runs[0], [], [], []
    for run in runs[1:]:
        if not base.scores or not run.scores:
            continue
        rounds = shared_rounds([base.scores, run.scores])
        if not rounds:
            notes.append(_why_not(base, run))
            continue
        last = rounds[-1]
        if any(each.scores[-1].round != last for each in (base, run)):
            ends.append(_up_to(run))
        one, other = after(base.scores, last), after(run.scores, last)
        assert one is not None
        assert other is not None
        pairs = tuple(sorted(set(one.seeds) & set(other.seeds)))
        if len(pairs) < 2:
            pairs = ()
        if base.graders and run.graders and base.graders != run.graders:
            graders = [f"{each.name} by {words.joined(each.graders)}" for each in (base, run)]
            notes.append(f"Graded by different verifiers, which may be all of a difference: {'; '.join(graders)}.")
        notes += _of_settings(base, run)
        notes += _of_seeds(base.name, run.name, one, other, pairs)
        k = min(one.samples, other.samples)
        one, other = (_of(scores, pairs or scores.seeds) for scores in (one, other))
        for which, at, first, second in (
            ("avg", k if one.samples == other.samples else None, average(one), average(other)),
            ("pass", k, passed(one, k), passed(other, k)),
        ):
            found.append(Difference(run.name, which, at, last, *_figures(first, second, one, pairs), pairs))
    if ends:
        notes.append(
            f"Runs were evaluated up to different rounds: {words.joined([*ends, _up_to(base)])}. Each is compared with "
            f"{base.name} after the last round that both have; figures of a single run are of its own last round."
        )
    return Comparison(tuple(found), tuple(notes))


def table(comparison: Comparison) -> Rows:
    """The differences as text; no row where nothing can be compared."""
    body = tuple(
        (
            one.name,
            str(one.round),
            one.metric,
            words.change(one.value),
            _bounds(one.over_problems) if one.over_problems else "one problem",
            _over_seeds(one),
            _word(one),
        )
        for one in comparison.differences
    )
    head = ("run", "round", "metric", "difference", "95 % over problems", "95 % over seeds", "zero is")
    return Rows(head, body)


def _figures(
    first: Floats, second: Floats, scores: ProblemScores, pairs: Sequence[int]
) -> tuple[float, Interval | None, Interval | None]:
    """Difference and intervals of ``second`` to ``first``, both [S, P]."""
    difference = second.mean(axis=0) - first.mean(axis=0)
    one, other = ([mean(row, scores) for row in values] for values in (first, second))
    by_seed = [b - a for a, b in zip(one, other, strict=True)] if pairs else []
    over_seeds = t_interval(by_seed) if pairs else welch_interval(one, other)
    return mean(difference, scores), over_problems(difference, scores), over_seeds


def _of(scores: ProblemScores, seeds: Sequence[int]) -> ProblemScores:
    """Those seeds alone, in that order."""
    rows = [scores.correct[scores.seeds.index(seed)] for seed in seeds]
    return replace(scores, seeds=list(seeds), correct=rows)


def _of_seeds(base: str, name: str, one: ProblemScores, other: ProblemScores, pairs: Sequence[int]) -> list[str]:
    """What the reader must know of the seeds that were compared."""
    alone = sorted(set(one.seeds) ^ set(other.seeds))
    if not alone:
        return []
    if pairs:
        return [f"{name} and {base} are compared on seeds {_list(pairs)}; only one of them has {_list(alone)}."]
    return [f"{name} has seeds {_list(other.seeds)} and {base} {_list(one.seeds)}: they are not compared in pairs."]


def _of_settings(base: RunData, run: RunData) -> list[str]:
    """How the two were evaluated otherwise."""
    one, other = (each.settings.get("evaluate") or {} for each in (base, run))
    differing = []
    for key in {**one, **other}:
        apart = words.by_whom([(base.name, _setting(one.get(key))), (run.name, _setting(other.get(key)))])
        if key not in _OF_NO_FIGURE and apart:
            differing.append(f"evaluate.{words.printable(key, 80)} is {apart}")
    if not differing:
        return []
    return [f"Evaluated with other settings, which may be all of a difference: {'; '.join(differing)}."]


def _setting(value: object) -> str:
    if value is None or value == "":
        return "not set" if value is None else "empty"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _why_not(base: RunData, run: RunData) -> str:
    one, other = base.scores[-1], after(run.scores, base.scores[-1].round) or run.scores[-1]
    if asked(one) == asked(other):
        return f"{run.name} is not compared: {_evaluated(run)}, {_evaluated(base)}."
    if one.names == other.names:
        names = sorted({**one.sources, **other.sources})
        changed = [name for name in names if one.sources.get(name) != other.sources.get(name)]
        return (
            f"{run.name} is not compared: its problems and those of {base.name} are of different files (benchmark "
            f"{words.joined(changed)}), and may differ under the same ids."
        )
    missing, more = (len(set(a) - set(b)) for a, b in ((one.names, other.names), (other.names, one.names)))
    return (
        f"{run.name} is not compared: it was not evaluated on the problems of {base.name} ({missing} of its "
        f"{len(one.names)} are missing, {more} others are there)."
    )


def _evaluated(run: RunData) -> str:
    return f"{run.name} was evaluated after round {_list(found.round for found in run.scores)}"


def _up_to(run: RunData) -> str:
    return f"{run.name} up to round {run.scores[-1].round}"


def _list(numbers: Iterable[int]) -> str:
    return words.joined([str(number) for number in numbers])


def _bounds(interval: Interval) -> str:
    return f"{words.change(interval.low)} to {words.change(interval.high)}"


def _over_seeds(one: Difference) -> str:
    if one.over_seeds is None:
        return "one seed"
    return f"{_bounds(one.over_seeds)}, {f'{len(one.pairs)} pairs' if one.pairs else 'not in pairs'}"


def _word(one: Difference) -> str:
    """Whether the widest interval holds zero."""
    bounds = [found for found in (one.over_problems, one.over_seeds) if found is not None]
    if one.over_problems is None:
        return "not known"
    return "excluded" if all(found.low > 0 or found.high < 0 for found in bounds) else "included"
