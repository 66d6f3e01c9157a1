"""Learning rates: by a rule, from the results of the tuning experiment, so that nobody picks them after the fact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from examples.study import results
from examples.study.design import SAMPLES, Experiment, Setting, Task
from examples.study.experiments import TUNE


def tasks_of(
    experiment: Experiment, setting: Setting, rates: Mapping[str, float], seeds: tuple[int, ...]
) -> list[Task]:
    """One task a seed, the setting's rate looked up where it names a tuned objective."""
    lr = setting.lr if isinstance(setting.lr, float) else rates[setting.lr]
    return [Task(experiment, setting, seed, lr) for seed in seeds]


def tuned(folder: Path) -> dict[str, float]:
    """Rate by tuned objective: the best Avg@8 + Pass@8, mean over the tuning seeds.

    An objective of which a result is missing gets the middle of its rates: only ``--smoke`` trains with those.
    """
    found: dict[str, float] = {}
    for name, settings in _grid().items():
        scores = [_score(setting, folder) for setting in settings]
        known = [score for score in scores if score is not None]
        best = int(np.argmax(known)) if len(known) == len(scores) else len(settings) // 2
        rate = settings[best].lr
        assert isinstance(rate, float)
        found[name] = rate
    return found


def is_tuned(folder: Path) -> bool:
    return all(_score(setting, folder) is not None for setting in TUNE.settings)


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
