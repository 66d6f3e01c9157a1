"""The tables of the report, in Markdown: figures of every setting, and paired differences to the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.study import anchors, results
from examples.study.compare import Estimate, Floats, crossed, over_seeds, paired
from examples.study.design import SAMPLES, Experiment
from examples.study.experiments import EXPERIMENTS
from examples.study.rates import tasks_of
from examples.study.results import Counts, Result
from examples.study.worlds import COUNTDOWN

Figure = Callable[[Mapping[str, Any]], float]
"""A number of a result's content."""


@dataclass(frozen=True)
class Rows:
    """The results of one setting, by seed."""

    name: str
    says: str
    by_seed: Mapping[int, Result]

    def stacked(self, seeds: Sequence[int], figure: Callable[[Counts, Counts], Floats]) -> Floats:
        """[S, P] of ``figure(correct, distinct)``."""
        return np.stack([figure(self.by_seed[seed].correct, self.by_seed[seed].distinct) for seed in seeds])

    def values(self, seeds: Sequence[int], figure: Figure) -> Floats:
        """[S] of a number of each result."""
        return np.asarray([figure(self.by_seed[seed].content) for seed in seeds])

    def estimate(self, figure: Figure) -> Estimate:
        return over_seeds(self.values(list(self.by_seed), figure))

    @property
    def contents(self) -> list[Mapping[str, Any]]:
        return [result.content for result in self.by_seed.values()]


FIGURES: dict[str, Callable[[Counts, Counts], Floats]] = {
    "Avg@8": lambda correct, distinct: correct / SAMPLES,
    "Pass@8": lambda correct, distinct: (correct > 0).astype(np.float64),
    "distinct correct": lambda correct, distinct: distinct.astype(np.float64),
}


def _at(*names: str) -> Figure:
    def figure(content: Mapping[str, Any]) -> float:
        value: Any = content
        for name in names:
            value = value[name]
        return float("nan") if value is None else float(value)

    return figure


def _excess(content: Mapping[str, Any]) -> float:
    own = content["alignment"]["own"]
    return float(own["all"]["student_above"] - own["above"]["share"])


SPREAD: dict[str, Figure] = {
    "self-BLEU": _at("metrics", "self_bleu"),
    "entropy (nats)": _at("metrics", "token_entropy"),
}

ALIGNMENT: dict[str, Figure] = {
    "FKL, H > 0.8": _at("alignment", "teacher", "above", "fkl"),
    "FKL, H <= 0.8": _at("alignment", "teacher", "below", "fkl"),
    "RKL, H > 0.8": _at("alignment", "own", "above", "rkl"),
    "RKL, H <= 0.8": _at("alignment", "own", "below", "rkl"),
    "top-1 agreement": _at("alignment", "teacher", "all", "agreement"),
    "student's tokens > 0.8": _at("alignment", "own", "all", "student_above"),
    "teacher's there": _at("alignment", "own", "above", "share"),
    "student's - teacher's": _excess,
}
"""Forward KL on the teacher's responses, reverse KL on the student's own, nats a token."""

UNEQUAL = 0.01  # of the tokens trained on: settings that differ by more are told so


def load(experiment: Experiment, rates: Mapping[str, float], folder: Path) -> list[Rows]:
    """Settings with at least one result, those that the experiment borrows first; none where it has none of its own.

    All are of the experiment's own seeds: others are of development, or of a longer comparison.

    Raises:
        StudyError: results are of different inputs, or of other settings than the experiment has; or the rate that
            they are to have is not known.
    """
    own = [
        _rows(experiment, setting.name, setting.name, experiment.seeds, rates, folder)
        for setting in experiment.settings
    ]
    if not any(rows.by_seed for rows in own):
        return []
    collected = []
    for name in experiment.borrows:
        source, setting = name.split("/")
        lender = dataclasses.replace(EXPERIMENTS[source], scale=experiment.scale)
        seeds = tuple(seed for seed in lender.seeds if seed in experiment.seeds)
        collected.append(_rows(lender, setting, name, seeds, rates, folder))
    collected = [rows for rows in (*collected, *own) if rows.by_seed]
    results.refuse_other_inputs([result for rows in collected for result in rows.by_seed.values()])
    return collected


def _rows(
    experiment: Experiment, setting: str, name: str, seeds: Sequence[int], rates: Mapping[str, float], folder: Path
) -> Rows:
    chosen = experiment.setting(setting)
    there = {path.stem for path in (folder / experiment.name).glob(f"{setting}-seed*.json")}
    seeds = tuple(seed for seed in sorted(seeds) if f"{setting}-seed{seed}" in there)
    read = [(task.seed, results.read(task, folder)) for task in tasks_of(experiment, chosen, rates, seeds)]
    return Rows(name, chosen.says, {seed: result for seed, result in read if result is not None})


def block(experiment: Experiment, groups: Sequence[Rows]) -> str:
    """Everything that is said of an experiment by its results."""
    if not groups:
        return f"No result yet: `python -m examples.study --only {experiment.name}`."
    told = [experiment_line(experiment, groups), *unequal_tokens(groups)]
    ends = anchors.read(experiment, groups[0].contents[0]["inputs"])
    told += ends.lines()
    graded = experiment.world == COUNTDOWN
    told += pairs(experiment, groups)
    told += [levels(groups), *differences(experiment, groups)] if graded else []
    return "\n\n".join([*told, alignment(groups, ends), *alignment_differences(experiment, groups)])


def experiment_line(experiment: Experiment, groups: Sequence[Rows]) -> str:
    have = sum(len(rows.by_seed) for rows in groups if "/" not in rows.name)
    asked = len(experiment.settings) * len(experiment.seeds)
    made = [content["made"] for rows in groups for content in rows.contents]
    commits = sorted({str(commit) for one in made for commit in one.get("commits", [one["commit"]])})
    missing = f" {asked - have} of the planned {asked} are missing." if have < asked else ""
    said = f"{have} results, made at {', '.join(commits)}.{missing} Intervals are 95 %, Student's t over seeds."
    if len(experiment.seeds) == 1 or experiment.world != COUNTDOWN:
        return said
    return (
        f"{said} Few seeds can lie close together by luck: their interval is then narrower than the noise of sampling "
        "allows. Those over seeds and problems never are, and speak of other problems too."
    )


def unequal_tokens(groups: Sequence[Rows]) -> list[str]:
    """A sentence where the settings were not trained on about as many tokens."""
    tokens = {rows.name: rows.estimate(_at("cost", "tokens")).mean for rows in groups}
    least, most = min(tokens, key=tokens.__getitem__), max(tokens, key=tokens.__getitem__)
    if tokens[most] <= tokens[least] * (1 + UNEQUAL):
        return []
    return [
        f"**Unequal tokens:** {most} was trained on {tokens[most] / 1000:.0f} thousand, {least} on "
        f"{tokens[least] / 1000:.0f} thousand ({tokens[most] / tokens[least] - 1:.1%} more for as many responses)."
    ]


def levels(groups: Sequence[Rows]) -> str:
    lines = _header(
        "setting", "seeds", "rate", *FIGURES, *SPREAD, "gate fraction", "tokens (k)", "bytes/token", "CPU minutes"
    )
    for rows in groups:
        seeds = list(rows.by_seed)
        rate = rows.contents[0]["settings"]["train"]["optimizer"]["lr"]
        cells = [rows.name, str(len(seeds)), f"{rate:g}"]
        cells += [_level(over_seeds(rows.stacked(seeds, figure).mean(axis=1))) for figure in FIGURES.values()]
        cells += [_level(rows.estimate(figure)) for figure in SPREAD.values()]
        gates = [np.mean(content["training"]["gate_fraction"]) for content in rows.contents if _has_gate(content)]
        cells.append(f"{np.mean(gates):.3f}" if gates else "-")
        cells.append(f"{rows.estimate(_at('cost', 'tokens')).mean / 1000:.0f}")
        cells.append(f"{rows.estimate(_at('cost', 'bytes_per_token')).mean:.1f}")
        cells.append(_cpu_minutes(rows))
        lines.append(_line(cells))
    if any(DAGGER in line for line in lines):
        lines += [
            "",
            f"{DAGGER} Without sampling and scoring, or without one of them: another setting had paid for it.",
        ]
    return "\n".join(lines)


def _has_gate(content: Mapping[str, Any]) -> bool:
    return "gate_fraction" in content["training"]


DAGGER = "†"


def _cpu_minutes(rows: Rows) -> str:
    """Mean over the results that paid for everything, else over those that found it made for another setting."""
    whole = [one["cost"] for one in rows.contents if _is_whole(one["cost"])]
    paid = [cost for cost in whole if {"rollout", "score"} <= cost["stage_seconds"].keys()]
    if not whole:
        return "-"
    return f"{np.mean([cost['cpu_seconds'] for cost in paid or whole]) / 60:.1f}{'' if paid else f' {DAGGER}'}"


def _is_whole(cost: Mapping[str, Any]) -> bool:
    """Whether it is of all processes that worked on the run."""
    if "shared" in cost:
        return cost["shared"] is not None
    # at first, when no result said what it shared, a resumed run counted its last process only
    return not cost["resumed_at_round"]


def pairs(experiment: Experiment, groups: Sequence[Rows]) -> list[str]:
    """The differences that the experiment names, in what is graded; of a task where nothing is, in alignment."""
    graded = experiment.world == COUNTDOWN
    names, cells = (GRADED, _graded) if graded else (DIVERGENCES, _divergences)
    by_name = {rows.name: rows for rows in groups}
    lines = _header("primary, in pairs" if experiment.primary else "named pairs", "seeds", *names)
    for first, second in experiment.pairs:
        if first in by_name and second in by_name:
            a, b = by_name[first], by_name[second]
            seeds = sorted(a.by_seed.keys() & b.by_seed.keys())
            if seeds:
                lines.append(_line([f"{first} - {second}", str(len(seeds)), *cells(a, b, seeds)]))
    return ["\n".join(lines)] if len(lines) > 2 else []


def differences(experiment: Experiment, groups: Sequence[Rows]) -> list[str]:
    """Paired differences in the graded figures; bold where the interval leaves out 0."""
    return _against(experiment, groups, GRADED, _graded)


OVER_BOTH = ("Pass@8", "distinct correct")  # these also over seeds and problems
GRADED = (*FIGURES, *(f"{name} over seeds and problems" for name in OVER_BOTH), *SPREAD)


def _graded(rows: Rows, reference: Rows, seeds: Sequence[int]) -> list[str]:
    both = {name: (rows.stacked(seeds, figure), reference.stacked(seeds, figure)) for name, figure in FIGURES.items()}
    collected = [*(paired(*pair) for pair in both.values()), *(crossed(*both[name]) for name in OVER_BOTH)]
    return [_difference(one) for one in (*collected, *_apart(rows, reference, seeds, SPREAD.values()))]


def _apart(rows: Rows, reference: Rows, seeds: Sequence[int], figures: Iterable[Figure]) -> list[Estimate]:
    return [over_seeds(rows.values(seeds, figure) - reference.values(seeds, figure)) for figure in figures]


def alignment(groups: Sequence[Rows], ends: anchors.Anchors) -> str:
    lines = _header("alignment", *ALIGNMENT)
    if ends.alignment:
        before = [{"alignment": one} for one in ends.alignment]
        levels = (over_seeds(np.asarray([figure(one) for one in before])) for figure in ALIGNMENT.values())
        lines.append(_line(["before training", *map(_level, levels)]))
    lines += [_line([rows.name, *(_level(rows.estimate(figure)) for figure in ALIGNMENT.values())]) for rows in groups]
    return "\n".join(lines)


DIVERGENCES = tuple(name for name in ALIGNMENT if name != "teacher's there")


def alignment_differences(experiment: Experiment, groups: Sequence[Rows]) -> list[str]:
    return _against(experiment, groups, DIVERGENCES, _divergences)


def _divergences(rows: Rows, reference: Rows, seeds: Sequence[int]) -> list[str]:
    return [_difference(one) for one in _apart(rows, reference, seeds, (ALIGNMENT[name] for name in DIVERGENCES))]


def _against(
    experiment: Experiment,
    groups: Sequence[Rows],
    names: Sequence[str],
    cells: Callable[[Rows, Rows, Sequence[int]], list[str]],
) -> list[str]:
    reference = next((rows for rows in groups if rows.name == experiment.reference), None)
    if reference is None:
        return []
    lines = _header(f"against {reference.name}, in pairs", "seeds", *names)
    for rows in groups:
        seeds = sorted(rows.by_seed.keys() & reference.by_seed.keys())
        if rows is not reference and seeds:
            lines.append(_line([rows.name, str(len(seeds)), *cells(rows, reference, seeds)]))
    return ["\n".join(lines)] if len(lines) > 2 else []


def _header(*names: str) -> list[str]:
    return [_line(names), "|" + "---|" * len(names)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


UNKNOWN = "-"
"""Where a mean is of nothing: no token of a run is in the bin."""


def _level(estimate: Estimate) -> str:
    if np.isnan(estimate.mean):
        return UNKNOWN
    interval = estimate.interval
    half = "" if interval is None else f" ± {(interval.high - interval.low) / 2:.4f}"
    return f"{estimate.mean:.4f}{half}"


def _difference(estimate: Estimate) -> str:
    if np.isnan(estimate.mean):
        return UNKNOWN
    if estimate.interval is None:
        return f"{estimate.mean:+.4f}"
    text = f"{estimate.mean:+.4f} [{estimate.interval.low:+.4f}, {estimate.interval.high:+.4f}]"
    return f"**{text}**" if estimate.excludes_zero else text
