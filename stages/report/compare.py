"""Comparison of runs: gains and differences on the same problems, and seeds of one setting as one run.

Letters: S seeds, P problems.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from eopd.stages.format import listed, printable
from eopd.stages.intervals import Interval, bootstrap, group_means, t_interval, welch_interval
from eopd.stages.report.data import (
    BinnedMeans,
    CostRow,
    Estimate,
    Histogram,
    ProblemScores,
    RoundData,
    RunData,
    StepRow,
)

Floats = NDArray[np.float64]
_SUMMED = ("ungraded", "left_out")
_NOT_OF_FIGURES = {  # settings of `evaluate` that change no figure, or that problem names and sample counts show
    *("alignment", "every", "engine", "engine_options", "verifier_workers", "rows_per_part", "confidence", "resamples"),
    *("benchmarks", "max_prompt_tokens", "too_long", "samples"),
}


# Scores, problem by problem


def after(scores: Sequence[ProblemScores], round_: int) -> ProblemScores | None:
    """Return the evaluation after a round."""
    return next((evaluation for evaluation in scores if evaluation.round == round_), None)


def problems_of(scores: ProblemScores) -> Hashable:
    """Return a value that is equal for evaluations on the same problems: names and files."""
    return (*scores.names, *sorted(scores.sources.items()))


def shared_rounds(runs: Sequence[Sequence[ProblemScores]]) -> list[int]:
    """List rounds after which all runs were evaluated on the same problems, in order."""
    rounds = []
    for first in runs[0] if runs else ():
        others = [after(scores, first.round) for scores in runs]
        if all(other is not None and problems_of(other) == problems_of(first) for other in others):
            rounds.append(first.round)
    return sorted(rounds)


def average(scores: ProblemScores) -> Floats:
    """Return the share of right samples [S, P]."""
    return np.asarray(scores.correct, np.float64) / scores.samples


def passed(scores: ProblemScores, k: int) -> Floats:
    """Return unbiased Pass@k [S, P] (Chen et al. 2021): 1 - C(n - c, k) / C(n, k)."""
    n = scores.samples
    by_count = np.asarray([1.0 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return np.asarray(by_count[np.asarray(scores.correct)])


def gains(first: ProblemScores, last: ProblemScores, confidence: float = 0.95) -> dict[str, Estimate]:
    """Return last minus first Avg@k and Pass@k (k: all samples) of one run; none if the problems differ or are
    missing."""
    if problems_of(first) != problems_of(last) or not first.names:
        return {}
    k = min(first.samples, last.samples)
    pairs = {"avg": (average(first), average(last)), "pass": (passed(first, k), passed(last, k))}
    estimates = {}
    for name, (before, later) in pairs.items():
        differences = (later - before).mean(axis=0)
        bounds = _over_problems(differences, first, confidence)
        estimates[name] = _estimate(_mean_of(differences, first), bounds)
    return estimates


def _mean_of(values: Floats, scores: ProblemScores) -> float:
    """Return the mean of values [P]; benchmarks count the same."""
    return float(group_means(values[:, None], scores.benchmarks)[0])


def _over_problems(differences: Floats, scores: ProblemScores, confidence: float = 0.95) -> Interval | None:
    (interval,) = bootstrap(differences[:, None], bounds=(-1.0, 1.0), groups=scores.benchmarks, confidence=confidence)
    return interval


def _estimate(value: float, bounds: Interval | None) -> Estimate:
    return Estimate(value) if bounds is None else Estimate(value, bounds.low, bounds.high)


# Differences between runs


@dataclass(frozen=True)
class Difference:
    """Run ``name`` minus the first run after ``round``.

    Args:
        which: ``avg`` or ``pass``.
        k: None for Avg@k of all samples of two runs with different numbers of them.
        over_problems: None with a single problem.
        over_seeds: None if either run has a single seed.
        pairs: seeds that were compared one by one; none if the runs share fewer than two.
    """

    name: str
    which: str
    k: int | None
    round: int
    value: float
    over_problems: Interval | None
    over_seeds: Interval | None
    pairs: tuple[int, ...]

    @property
    def metric(self) -> str:
        return f"{self.which.capitalize()}@{self.k or 'k'}"

    @property
    def zero(self) -> str:
        """True if every available interval excludes zero."""
        bounds = [interval for interval in (self.over_problems, self.over_seeds) if interval is not None]
        if self.over_problems is None:
            return "not known"
        return "excluded" if all(interval.low > 0 or interval.high < 0 for interval in bounds) else "included"


@dataclass(frozen=True)
class Comparison:
    """Differences of runs. ``notes``: runs that are not compared, and unexpected differences between runs."""

    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()


def compare(runs: Sequence[RunData]) -> Comparison:
    """Compare every further run with the first, after the last round that the two share, on the same problems.

    ``over_problems`` is a bootstrap over problems, within each benchmark, of paired differences (means over the seeds).
    ``over_seeds`` is Student's t of the differences seed by seed if the runs share two seeds or more, else Welch's.
    """
    differences: list[Difference] = []
    notes: list[str] = []
    base = runs[0]
    for run in runs[1:]:
        if not base.scores or not run.scores:
            continue
        rounds = shared_rounds([base.scores, run.scores])
        if not rounds:
            notes.append(f"{run.name} is not compared with {base.name}: {_obstacle(base, run)}.")
            continue
        one, other = (after(each.scores, rounds[-1]) for each in (base, run))
        assert one is not None
        assert other is not None
        if not one.names:
            continue
        pairs = tuple(sorted(set(one.seeds) & set(other.seeds)))
        pairs = pairs if len(pairs) > 1 else ()
        notes += _caveats(base, run, one, other, pairs)
        k = min(one.samples, other.samples)
        one, other = (_of_seeds(scores, pairs or scores.seeds) for scores in (one, other))
        for which, at, first, second in (
            ("avg", k if one.samples == other.samples else None, average(one), average(other)),
            ("pass", k, passed(one, k), passed(other, k)),
        ):
            figures = _difference(first, second, one, bool(pairs))
            differences.append(Difference(run.name, which, at, rounds[-1], *figures, pairs))
    ends = {run.name: run.scores[-1].round for run in runs if run.scores}
    if len(set(ends.values())) > 1:
        texts = [f"{name} after round {last}" for name, last in ends.items()]
        notes.append(f"Last evaluations: {listed(texts)}. Each run is compared after the last round it shares.")
    return Comparison(tuple(differences), tuple(dict.fromkeys(notes)))


def _difference(
    first: Floats, second: Floats, scores: ProblemScores, paired: bool
) -> tuple[float, Interval | None, Interval | None]:
    """Return ``second`` minus ``first``, both [S, P], with its intervals over problems and over seeds."""
    difference = second.mean(axis=0) - first.mean(axis=0)
    one, other = ([_mean_of(row, scores) for row in values] for values in (first, second))
    by_seed = [b - a for a, b in zip(one, other, strict=True)] if paired else []
    over_seeds = t_interval(by_seed) if paired else welch_interval(one, other)
    return _mean_of(difference, scores), _over_problems(difference, scores), over_seeds


def _of_seeds(scores: ProblemScores, seeds: Sequence[int]) -> ProblemScores:
    rows = [scores.correct[scores.seeds.index(seed)] for seed in seeds]
    return replace(scores, seeds=list(seeds), correct=rows)


def _caveats(
    base: RunData, run: RunData, one: ProblemScores, other: ProblemScores, pairs: Sequence[int]
) -> Iterable[str]:
    """List reasons why a difference of two runs may not be due to their training."""
    if base.graders and run.graders and base.graders != run.graders:
        names = [f"{listed(each.graders)} in {each.name}" for each in (base, run)]
        yield f"Graded by different verifiers: {listed(names)}."
    settings = [each.settings.get("evaluate") or {} for each in (base, run)]
    names = [key for key in dict.fromkeys([*settings[0], *settings[1]]) if key not in _NOT_OF_FIGURES]
    texts = [{f"evaluate.{key}": _setting(each.get(key)) for key in names} for each in settings]
    differing = apart([(base.name, texts[0]), (run.name, texts[1])])
    if differing:
        yield f"Evaluated with different settings: {'; '.join(differing)}."
    alone = sorted(set(one.seeds) ^ set(other.seeds))
    if alone and pairs:
        yield f"{run.name} and {base.name} are compared on seeds {listed(pairs)}; only one has {listed(alone)}."
    elif alone:
        seeds = f"seeds {listed(other.seeds)} and {listed(one.seeds)}"
        yield f"{run.name} and {base.name} are not compared in pairs: they have {seeds}."


def apart(by_name: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    """Describe values that differ between the runs that have them: ``name is 1 in a and b and 2 in c``."""
    texts = []
    for key in dict.fromkeys(key for _, values in by_name for key in values):
        whose: dict[str, list[str]] = {}
        for name, values in by_name:
            if key in values:
                whose.setdefault(values[key], []).append(name)
        if len(whose) > 1:
            parts = [f"{printable(value, 120)} in {listed(names)}" for value, names in whose.items()]
            texts.append(f"{printable(key, 80)} is {listed(parts)}")
    return texts


def _setting(value: object) -> str:
    if value is None or value == "":
        return "not set" if value is None else "empty"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _obstacle(base: RunData, run: RunData) -> str:
    one, other = base.scores[-1], after(run.scores, base.scores[-1].round) or run.scores[-1]
    if problems_of(one) == problems_of(other):
        rounds = [f"{each.name} after round {listed([s.round for s in each.scores])}" for each in (run, base)]
        return f"evaluations are of {listed(rounds)}"
    if one.names == other.names:
        changed = [name for name in one.sources if one.sources[name] != other.sources.get(name)]
        return f"the files of benchmark {listed(changed)} differ"
    return f"only {len(set(one.names) & set(other.names))} of its {len(other.names)} problems are the same"


# Seeds


def grouped(runs: Sequence[RunData]) -> list[RunData]:
    """Merge each set of runs of equal ``kin`` and different seeds, in the order of their first members."""
    groups: list[list[RunData]] = []
    for run in runs:
        for group in groups:
            if run.kin and group[0].kin == run.kin and run.seed not in [member.seed for member in group]:
                group.append(run)
                break
        else:
            groups.append([run])
    return [group[0] if len(group) == 1 else merged(group) for group in groups]


def merged(runs: Sequence[RunData]) -> RunData:
    """Merge at least two seeds into one run: means with Student's t intervals.

    A figure that one seed lacks is left out; gains and scores are of the rounds that all were evaluated after.
    """
    first = runs[0]
    seeds = ", ".join(str(run.seed) for run in runs)
    rounds = [{item.round: item for item in run.rounds} for run in runs]
    shared = shared_rounds([run.scores for run in runs])
    scores = [_scores_of_seeds([after(run.scores, number) for run in runs]) for number in shared]
    stems = {re.sub(r"([-_. ]+(s|seed)?[-_. ]*)?\d+$", "", run.name) for run in runs}
    return RunData(
        name=f"{(stems.pop() if len(stems) == 1 else '') or first.name} ({len(runs)} seeds)",
        settings={**first.settings, "name": ", ".join(run.name for run in runs), "seed": seeds},
        rounds=[
            _round_of_seeds([by_number.get(number, RoundData(number)) for by_number in rounds])
            for number in sorted(set().union(*rounds))
        ],
        training=_training_of_seeds(runs),
        teacher_entropy=_histogram_of_seeds([run.teacher_entropy for run in runs]),
        student_entropy=_histogram_of_seeds([run.student_entropy for run in runs]),
        bins={whose: _bins_of_seeds([run.bins.get(whose, {}) for run in runs]) for whose in first.bins},
        read_with=_common([run.read_with for run in runs if run.read_with]),
        rollouts=first.rollouts,
        cost=_cost_of_seeds(runs),
        threshold=first.threshold,
        interval=f"95 % Student t over {len(runs)} seeds",
        gains=_gains_of_seeds(scores),
        scores=scores,
        kin=first.kin,
        graders=sorted({name for run in runs for name in run.graders}),
        head=listed(sorted({run.head for run in runs if run.head})),
        warnings=[f"Seed {run.seed}: {warning}" for run in runs for warning in run.warnings],
        notes=[
            f"Means over {len(runs)} seeds ({seeds}); rollouts are of seed {first.seed}.",
            *(["Routing is of single runs: a report of one seed shows it."] if first.routing else []),
            *(["Attribution is of single runs: a report of one seed shows it."] if first.attribution else []),
            *_unequal_rounds(runs),
            *(f"Seed {run.seed}: {note}" for run in runs for note in run.notes),
        ],
    )


def _unequal_rounds(runs: Sequence[RunData]) -> list[str]:
    rounds = {run.seed: {item.round for item in run.evaluated} for run in runs}
    everywhere = [number for number in rounds[runs[0].seed] if all(number in numbers for numbers in rounds.values())]
    differing = set().union(*rounds.values()) - set(everywhere)
    if not differing:
        return []
    texts = [f"seed {seed} after {listed(sorted(own & differing)) or 'none'}" for seed, own in rounds.items()]
    return [f"Means leave out rounds that not every seed was evaluated after: {'; '.join(texts)}."]


def _over_seeds(values: Sequence[float]) -> Estimate:
    return _estimate(float(np.mean(values)), t_interval(values))


def _round_of_seeds(items: Sequence[RoundData]) -> RoundData:
    names = [name for name in items[0].figures if all(name in item.figures for item in items)]
    figures = {name: _over_seeds([item.figures[name].value for item in items]) for name in names}
    for name in set(names) & set(_SUMMED):
        figures[name] = Estimate(sum(item.figures[name].value for item in items))
    ks = [k for k in items[0].pass_at if all(k in item.pass_at for item in items)]
    benchmarks = [name for name in items[0].benchmarks if all(name in item.benchmarks for item in items)]
    return RoundData(
        items[0].round,
        figures,
        {k: _over_seeds([item.pass_at[k].value for item in items]) for k in ks},
        items[0].problems,
        items[0].samples,
        all(item.measured for item in items),
        {name: _round_of_seeds([item.benchmarks[name] for item in items]) for name in benchmarks},
    )


def _training_of_seeds(runs: Sequence[RunData]) -> list[StepRow]:
    """Return mean steps of the rounds that all seeds trained."""
    steps: dict[tuple[int, int], list[StepRow]] = {}
    trained = set.intersection(*({row.round for row in run.training} for run in runs))
    for row in (row for run in runs for row in run.training if row.round in trained):
        steps.setdefault((row.round, row.step), []).append(row)
    means = []
    for (round_, step), rows in sorted(steps.items()):
        names = dict.fromkeys(name for row in rows for name in row.figures)
        known = {name: [row.figures[name] for row in rows if name in row.figures] for name in names}
        means.append(StepRow(round_, step, {name: float(np.mean(values)) for name, values in known.items()}))
    return means


def _histogram_of_seeds(histograms: Sequence[Histogram | None]) -> Histogram | None:
    """Add up counts; a seed with rarer, larger entropies has a last bin that the others lack."""
    known = [histogram for histogram in histograms if histogram is not None]
    edges = max((histogram.edges for histogram in known), key=len, default=[])
    if not known or any(histogram.edges != edges[: len(histogram.edges)] for histogram in known):
        return None
    counts = np.zeros(len(edges) - 1, np.int64)
    for histogram in known:
        counts[: len(histogram.counts)] += histogram.counts
    return Histogram(edges, counts.tolist())


def _bins_of_seeds(bins: Sequence[Mapping[str, BinnedMeans]]) -> dict[str, BinnedMeans]:
    """Return means over the seeds with tokens in a bin; no interval if all have one value, such as an agreement of
    1."""
    means = {}
    for name in dict.fromkeys(name for one in bins for name in one):
        known = [one[name] for one in bins if name in one]
        if any(one.edges != known[0].edges for one in known):
            continue
        columns = zip(*(one.means for one in known), strict=True)
        values = [[estimate.value for estimate in column if estimate is not None] for column in columns]
        estimates = [_over_seeds(column) if column else None for column in values]
        degenerate = [len(set(column)) < 2 for column in values]
        means[name] = BinnedMeans(
            known[0].edges,
            [Estimate(one.value) if one and flat else one for one, flat in zip(estimates, degenerate, strict=True)],
        )
    return means


def _common(values: Sequence[dict[str, str]]) -> dict[str, str]:
    return {
        name: text for name, text in (values[0] if values else {}).items() if all(o.get(name) == text for o in values)
    }


def _gains_of_seeds(scores: Sequence[ProblemScores]) -> dict[str, Estimate]:
    """Return gains between the first and the last round after which all seeds were evaluated."""
    if len(scores) < 2 or problems_of(scores[0]) != problems_of(scores[-1]):
        return {}
    by_seed = [gains(_of_seeds(scores[0], [seed]), _of_seeds(scores[-1], [seed])) for seed in scores[0].seeds]
    return {name: _over_seeds([gained[name].value for gained in by_seed]) for name in by_seed[0]}


def _scores_of_seeds(evaluations: Sequence[ProblemScores | None]) -> ProblemScores:
    known = [scores for scores in evaluations if scores is not None]
    rows = sorted((seed, row) for scores in known for seed, row in zip(scores.seeds, scores.correct, strict=True))
    return replace(known[0], seeds=[seed for seed, _ in rows], correct=[row for _, row in rows])


def _cost_of_seeds(runs: Sequence[RunData]) -> list[CostRow]:
    """Sum the cost of all seeds; jobs that several of them read count once."""
    return sorted(distinct_jobs(runs), key=lambda row: row.round)


def distinct_jobs(runs: Sequence[RunData]) -> list[CostRow]:
    """Return the jobs of all runs, each once."""
    rows: dict[str, CostRow] = {}
    for number, run in enumerate(runs):
        for place, row in enumerate(run.cost):
            rows.setdefault(row.key or f"{number} {place}", row)
    return list(rows.values())
