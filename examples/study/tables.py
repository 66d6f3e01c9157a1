"""The tables of the report, in Markdown: figures of every setting, and paired differences to the reference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.study import results
from examples.study.compare import Estimate, Floats, crossed, over_seeds, paired
from examples.study.design import SAMPLES, Experiment
from examples.study.experiments import EXPERIMENTS
from examples.study.rates import tasks_of, tuned
from examples.study.results import Counts, Result


@dataclass(frozen=True)
class Rows:
    """The results of one setting, by seed."""

    name: str
    says: str
    by_seed: Mapping[int, Result]

    def stacked(self, seeds: Sequence[int], figure: Callable[[Counts, Counts], Floats]) -> Floats:
        """[S, P] of ``figure(correct, distinct)``."""
        return np.stack([figure(self.by_seed[seed].correct, self.by_seed[seed].distinct) for seed in seeds])

    def metric(self, *names: str) -> Estimate:
        values = []
        for result in self.by_seed.values():
            value: object = result.metrics
            for name in names:
                assert isinstance(value, Mapping)
                value = value[name]
            assert isinstance(value, (int, float))
            values.append(float(value))
        return over_seeds(np.asarray(values))


FIGURES: dict[str, Callable[[Counts, Counts], Floats]] = {
    "Avg@8": lambda correct, distinct: correct / SAMPLES,
    "Pass@8": lambda correct, distinct: (correct > 0).astype(np.float64),
    "distinct correct": lambda correct, distinct: distinct.astype(np.float64),
}


def load(experiment: Experiment, folder: Path) -> list[Rows]:
    """Settings with at least one result, those that the experiment borrows first.

    Raises:
        ValueError: results of one experiment are of different problems.
    """
    rates = tuned(folder)
    found = []
    for name in experiment.borrows:
        source, setting = name.split("/")
        lender = dataclasses.replace(EXPERIMENTS[source], scale=experiment.scale)
        found.append(_rows(lender, setting, name, rates, folder))
    found += [_rows(experiment, setting.name, setting.name, rates, folder) for setting in experiment.settings]
    found = [rows for rows in found if rows.by_seed]
    problems = {result.content["inputs"]["problems"] for rows in found for result in rows.by_seed.values()}
    if len(problems) > 1:
        raise ValueError(f"experiment {experiment.name}: results of {len(problems)} different sets of problems")
    return found


def _rows(experiment: Experiment, setting: str, name: str, rates: Mapping[str, float], folder: Path) -> Rows:
    paths = (folder / experiment.name).glob(f"{setting}-seed*.json")
    seeds = tuple(sorted(int(path.stem.rsplit("-seed", 1)[1]) for path in paths))
    chosen = experiment.setting(setting)
    read = [(task.seed, results.read(task, folder)) for task in tasks_of(experiment, chosen, rates, seeds)]
    return Rows(name, chosen.says, {seed: result for seed, result in read if result is not None})


def block(experiment: Experiment, folder: Path) -> str:
    """Everything that is said of an experiment by its results."""
    found = load(experiment, folder)
    if not found:
        return f"No result yet: `python -m examples.study --only {experiment.name}`."
    return "\n\n".join([_levels(found), *_differences(experiment, found)])


def _levels(found: Sequence[Rows]) -> str:
    lines = [
        "| setting | seeds | Avg@8 | Pass@8 | distinct correct | self-BLEU | entropy (nats) | bytes/token | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rows in found:
        seeds = list(rows.by_seed)
        cells = [rows.name, str(len(seeds))]
        cells += [_level(over_seeds(rows.stacked(seeds, figure).mean(axis=1))) for figure in FIGURES.values()]
        cells += [f"{rows.metric('self_bleu').mean:.3f}", f"{rows.metric('token_entropy').mean:.3f}"]
        costs = [result.content["cost"] for result in rows.by_seed.values()]
        cells.append(f"{np.mean([cost['bytes_per_token'] for cost in costs]):.1f}")
        cells.append(f"{np.mean([cost['seconds'] for cost in costs]) / 60:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _differences(experiment: Experiment, found: Sequence[Rows]) -> list[str]:
    reference = next((rows for rows in found if rows.name == experiment.reference), None)
    if reference is None:
        return []
    lines = [
        f"| against {reference.name}, in pairs | seeds | {' | '.join(FIGURES)} | Pass@8, seeds and problems |",
        "|---|---|---|---|---|---|",
    ]
    for rows in found:
        seeds = sorted(rows.by_seed.keys() & reference.by_seed.keys())
        if rows is reference or not seeds:
            continue
        pairs = {
            name: (rows.stacked(seeds, figure), reference.stacked(seeds, figure)) for name, figure in FIGURES.items()
        }
        cells = [_difference(paired(*pair)) for pair in pairs.values()]
        cells.append(_difference(crossed(*pairs["Pass@8"])))
        lines.append(f"| {rows.name} | {len(seeds)} | {' | '.join(cells)} |")
    return ["\n".join(lines)] if len(lines) > 2 else []


def _level(estimate: Estimate) -> str:
    half = "" if math.isnan(estimate.low) else f" ± {(estimate.high - estimate.low) / 2:.4f}"
    return f"{estimate.mean:.4f}{half}"


def _difference(estimate: Estimate) -> str:
    if math.isnan(estimate.low):
        return f"{estimate.mean:+.4f}"
    text = f"{estimate.mean:+.4f} [{estimate.low:+.4f}, {estimate.high:+.4f}]"
    return f"**{text}**" if estimate.excludes_zero else text
