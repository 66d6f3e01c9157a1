"""The tables of the report, in Markdown: figures of every setting, and paired differences to the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.study import anchors, results
from examples.study.compare import Estimate, Floats, crossed, over_seeds, paired
from examples.study.design import FULL, SAMPLES, Experiment
from examples.study.experiments import EXPERIMENTS
from examples.study.rates import tasks_of, tuned
from examples.study.results import Counts, Result
from examples.study.worlds import COUNTDOWN


@dataclass(frozen=True)
class Rows:
    """The results of one setting, by seed."""

    name: str
    says: str
    by_seed: Mapping[int, Result]

    def stacked(self, seeds: Sequence[int], figure: Callable[[Counts, Counts], Floats]) -> Floats:
        """[S, P] of ``figure(correct, distinct)``."""
        return np.stack([figure(self.by_seed[seed].correct, self.by_seed[seed].distinct) for seed in seeds])

    def values(self, seeds: Sequence[int], *names: str) -> Floats:
        """[S] of a number in the results, by its path."""
        return np.asarray([_at(self.by_seed[seed].content, names) for seed in seeds])

    def estimate(self, *names: str) -> Estimate:
        return over_seeds(self.values(list(self.by_seed), *names))


FIGURES: dict[str, Callable[[Counts, Counts], Floats]] = {
    "Avg@8": lambda correct, distinct: correct / SAMPLES,
    "Pass@8": lambda correct, distinct: (correct > 0).astype(np.float64),
    "distinct correct": lambda correct, distinct: distinct.astype(np.float64),
}

ALIGNMENT: dict[str, tuple[str, ...]] = {
    "FKL, H > 0.8": ("teacher", "above", "fkl"),
    "FKL, H <= 0.8": ("teacher", "below", "fkl"),
    "RKL, H > 0.8": ("own", "above", "rkl"),
    "RKL, H <= 0.8": ("own", "below", "rkl"),
    "top-1 agreement": ("teacher", "all", "agreement"),
    "student's tokens > 0.8": ("own", "all", "student_above"),
    "teacher's there": ("own", "above", "share"),
}
"""Forward KL on the teacher's responses, reverse KL on the student's own, nats a token."""


def load(experiment: Experiment, folder: Path) -> list[Rows]:
    """Settings with at least one result, those that the experiment borrows first; none where it has none of its own.

    All are of the experiment's own seeds: others are of development, or of a longer comparison.

    Raises:
        ValueError: results are of different inputs (``results.refuse_other_inputs``).
    """
    rates = tuned(folder)
    own = [
        _rows(experiment, setting.name, setting.name, experiment.seeds, rates, folder)
        for setting in experiment.settings
    ]
    if not any(rows.by_seed for rows in own):
        return []
    found = []
    for name in experiment.borrows:
        source, setting = name.split("/")
        lender = dataclasses.replace(EXPERIMENTS[source], scale=experiment.scale)
        seeds = tuple(seed for seed in lender.seeds if seed in experiment.seeds)
        found.append(_rows(lender, setting, name, seeds, rates, folder))
    found = [rows for rows in (*found, *own) if rows.by_seed]
    results.refuse_other_inputs([result for rows in found for result in rows.by_seed.values()])
    return found


def _rows(
    experiment: Experiment, setting: str, name: str, seeds: Sequence[int], rates: Mapping[str, float], folder: Path
) -> Rows:
    chosen = experiment.setting(setting)
    there = {path.stem for path in (folder / experiment.name).glob(f"{setting}-seed*.json")}
    seeds = tuple(seed for seed in sorted(seeds) if f"{setting}-seed{seed}" in there)
    read = [(task.seed, results.read(task, folder)) for task in tasks_of(experiment, chosen, rates, seeds)]
    return Rows(name, chosen.says, {seed: result for seed, result in read if result is not None})


def block(experiment: Experiment, found: Sequence[Rows]) -> str:
    """Everything that is said of an experiment by its results."""
    if not found:
        return f"No result yet: `python -m examples.study --only {experiment.name}`."
    told = [experiment_line(experiment, found)]
    told += anchors.lines() if experiment.scale == FULL else []
    graded = experiment.world == COUNTDOWN
    told += [*primary(experiment, found), levels(found), *differences(experiment, found)] if graded else []
    return "\n\n".join([*told, alignment(found), *alignment_differences(experiment, found)])


def experiment_line(experiment: Experiment, found: Sequence[Rows]) -> str:
    have = sum(len(rows.by_seed) for rows in found if "/" not in rows.name)
    asked = len(experiment.settings) * len(experiment.seeds)
    commits = sorted({str(result.content["made"]["commit"]) for rows in found for result in rows.by_seed.values()})
    missing = f" {asked - have} of the planned {asked} are missing." if have < asked else ""
    return f"{have} results, made at {', '.join(commits)}.{missing} Intervals are 95 %, Student's t over seeds."


def levels(found: Sequence[Rows]) -> str:
    lines = _header("setting", "seeds", "rate", *FIGURES, "self-BLEU", "entropy (nats)", "bytes/token", "CPU minutes")
    for rows in found:
        seeds = list(rows.by_seed)
        rate = next(iter(rows.by_seed.values())).content["settings"]["train"]["optimizer"]["lr"]
        cells = [rows.name, str(len(seeds)), f"{rate:g}"]
        cells += [_level(over_seeds(rows.stacked(seeds, figure).mean(axis=1))) for figure in FIGURES.values()]
        cells += [f"{rows.estimate('metrics', name).mean:.3f}" for name in ("self_bleu", "token_entropy")]
        cells.append(f"{rows.estimate('cost', 'bytes_per_token').mean:.1f}")
        cells.append(f"{rows.estimate('cost', 'cpu_seconds').mean / 60:.1f}")
        lines.append(_line(cells))
    return "\n".join(lines)


def primary(experiment: Experiment, found: Sequence[Rows]) -> list[str]:
    """The differences that were named before the experiment ran."""
    by_name = {rows.name: rows for rows in found}
    lines = _header("primary, in pairs", "seeds", *FIGURES, "Pass@8 over seeds and problems")
    for first, second in experiment.primary:
        if first in by_name and second in by_name:
            a, b = by_name[first], by_name[second]
            seeds = sorted(a.by_seed.keys() & b.by_seed.keys())
            if seeds:
                lines.append(_line([f"{first} - {second}", str(len(seeds)), *_graded(a, b, seeds)]))
    return ["\n".join(lines)] if len(lines) > 2 else []


def differences(experiment: Experiment, found: Sequence[Rows]) -> list[str]:
    """Paired differences in the graded figures; bold where the interval leaves out 0."""
    return _against(experiment, found, [*FIGURES, "Pass@8 over seeds and problems"], _graded)


def _graded(rows: Rows, reference: Rows, seeds: Sequence[int]) -> list[str]:
    pairs = {name: (rows.stacked(seeds, figure), reference.stacked(seeds, figure)) for name, figure in FIGURES.items()}
    return [*(_difference(paired(*pair)) for pair in pairs.values()), _difference(crossed(*pairs["Pass@8"]))]


def alignment(found: Sequence[Rows]) -> str:
    lines = _header("alignment", *ALIGNMENT)
    for rows in found:
        lines.append(_line([rows.name, *(_level(rows.estimate("alignment", *path)) for path in ALIGNMENT.values())]))
    return "\n".join(lines)


def alignment_differences(experiment: Experiment, found: Sequence[Rows]) -> list[str]:
    names = {name: path for name, path in ALIGNMENT.items() if name != "teacher's there"}

    def cells(rows: Rows, reference: Rows, seeds: Sequence[int]) -> list[str]:
        return [
            _difference(
                over_seeds(rows.values(seeds, "alignment", *path) - reference.values(seeds, "alignment", *path))
            )
            for path in names.values()
        ]

    return _against(experiment, found, list(names), cells)


def _against(
    experiment: Experiment,
    found: Sequence[Rows],
    names: Sequence[str],
    cells: Callable[[Rows, Rows, Sequence[int]], list[str]],
) -> list[str]:
    reference = next((rows for rows in found if rows.name == experiment.reference), None)
    if reference is None:
        return []
    lines = _header(f"against {reference.name}, in pairs", "seeds", *names)
    for rows in found:
        seeds = sorted(rows.by_seed.keys() & reference.by_seed.keys())
        if rows is not reference and seeds:
            lines.append(_line([rows.name, str(len(seeds)), *cells(rows, reference, seeds)]))
    return ["\n".join(lines)] if len(lines) > 2 else []


def _at(content: Mapping[str, object], names: Sequence[str]) -> float:
    value: object = content
    for name in names:
        assert isinstance(value, Mapping), (name, names)
        value = value[name]
    return float("nan") if value is None else float(value)  # type: ignore[arg-type]


def _header(*names: str) -> list[str]:
    return [_line(names), "|" + "---|" * len(names)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _level(estimate: Estimate) -> str:
    interval = estimate.interval
    half = "" if interval is None else f" ± {(interval.high - interval.low) / 2:.4f}"
    return f"{estimate.mean:.4f}{half}"


def _difference(estimate: Estimate) -> str:
    if estimate.interval is None:
        return f"{estimate.mean:+.4f}"
    text = f"{estimate.mean:+.4f} [{estimate.interval.low:+.4f}, {estimate.interval.high:+.4f}]"
    return f"**{text}**" if estimate.excludes_zero else text
