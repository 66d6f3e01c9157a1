"""Learning rates: by a rule, from the results of the tuning experiment, so that nobody picks them after the fact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from examples.study import results
from examples.study.design import SAMPLES, Experiment, Setting, Task
from examples.study.errors import StudyError
from examples.study.experiments import TUNE


class Rates(dict[str, float]):
    """Rate by tuned objective. To ask for one of which a tuning result is missing is an error that names it."""

    def __init__(self, known: Mapping[str, float], missing: Mapping[str, Sequence[str]]) -> None:
        super().__init__(known)
        self.missing = missing

    def __missing__(self, objective: str) -> float:
        raise StudyError(
            f"the learning rate of {objective} is not known, for want of {', '.join(self.missing[objective])}: "
            "make them first (python -m examples.study --only tuning)"
        )


def tasks_of(
    experiment: Experiment, setting: Setting, rates: Mapping[str, float], seeds: tuple[int, ...]
) -> list[Task]:
    """One task a seed, the setting's rate looked up where it names a tuned objective."""
    return [
        Task(experiment, setting, seed, setting.lr if isinstance(setting.lr, float) else rates[setting.lr])
        for seed in seeds
    ]


def tuned(folder: Path) -> Rates:
    """The best Avg@8 + Pass@8, mean over the tuning seeds, of every objective all of whose results are there."""
    known: dict[str, float] = {}
    missing: dict[str, list[str]] = {}
    for name, settings in _grid().items():
        scores = {setting.name: _score(setting, folder) for setting in settings}
        absent = [f"{TUNE.name}/{setting}" for setting, score in scores.items() if score is None]
        if absent:
            missing[name] = absent
        else:
            known[name] = _rate(max(settings, key=lambda setting: scores[setting.name] or 0.0))
    return Rates(known, missing)


def untuned() -> Rates:
    """What ``--smoke`` trains with: one rate that no experiment states, so that no two settings are the same run."""
    return Rates(dict.fromkeys(_grid(), 3e-4), {})


def _rate(setting: Setting) -> float:
    assert isinstance(setting.lr, float), setting
    return setting.lr


def _grid() -> dict[str, list[Setting]]:
    grid: dict[str, list[Setting]] = {}
    for setting in TUNE.settings:
        grid.setdefault(setting.name.rsplit("-lr", 1)[0], []).append(setting)
    return grid


def _score(setting: Setting, folder: Path) -> float | None:
    scores = []
    for task in tasks_of(TUNE, setting, {}, TUNE.seeds):
        result = results.read(task, folder)
        if result is None:
            return None
        scores.append(float(np.mean(result.correct / SAMPLES) + np.mean(result.correct > 0)))
    return float(np.mean(scores))
