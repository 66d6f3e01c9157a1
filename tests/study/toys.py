"""Experiments at toy size, results made up, and tables read back."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np

from examples.study import experiments, rates, results
from examples.study.design import SMOKE, Experiment, Scale, Task

TOY = dataclasses.replace(SMOKE, problems=12, tuning_problems=4)

TINY = Scale(iterations=2, train_problems=128, problems=12, tuning_problems=4)

RATES = rates.untuned()

ALL = tuple(experiments.EXPERIMENTS.values())


def toy(name: str, **changes: object) -> Experiment:
    return dataclasses.replace(experiments.EXPERIMENTS[name], scale=TOY, **changes)  # type: ignore[arg-type]


def tiny(name: str) -> Experiment:
    """With two rounds, or one where a setting samples once: to be run."""
    one = experiments.EXPERIMENTS[name]
    settings = tuple(dataclasses.replace(setting, refresh=min(1, setting.refresh)) for setting in one.settings)
    return dataclasses.replace(one, scale=TINY, settings=settings)


def table(text: str, first: str) -> dict[str, dict[str, str]]:
    """The Markdown table whose first column is called ``first``: by row, by column."""
    lines = text.splitlines()
    begin = next(place for place, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = [line.strip("| ").split(" | ") for line in itertools.takewhile(lambda line: "|" in line, lines[begin:])]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


INPUTS = {"student": "s", "teacher": "t", "prompts": "p", "problems": "q"}


def made_up(
    task: Task,
    folder: Path,
    shift: int = 0,
    cost: dict[str, object] | None = None,
    commits: tuple[str, ...] = (),
    **inputs: str,
) -> Path:
    rng = np.random.default_rng(task.seed)
    correct = np.minimum(8, rng.integers(0, 5, size=40) + shift)
    figures = dict.fromkeys(("fkl", "rkl", "agreement", "share", "student_entropy", "student_above"), 0.3)
    content = {
        "correct": results.encode(correct),
        "distinct": results.encode(correct // 2),
        "metrics": {"self_bleu": 0.5, "token_entropy": 0.3},
        "training": {"gate_fraction": [0.1, 0.3]} if task.setting.name == "random" else {},
        "settings": {"train": {"optimizer": {"lr": task.lr}}},
        "alignment": {name: {"all": figures, "above": figures, "below": figures} for name in ("own", "teacher")},
    }
    made: dict[str, object] = {"commit": "c0ffee", **({"commits": commits} if commits else {})}
    stages = {"rollout": 1.0, "score": 1.0, "train": 1.0, "evaluate": 1.0}
    paid = {"bytes_per_token": 30.0, "seconds": 60.0, "cpu_seconds": 60.0, "tokens": 590_000, "resumed_at_round": 0}
    paid |= {"stage_seconds": stages, **(cost or {})}
    body = {**content, "seed": task.seed, "made": made, "inputs": {**INPUTS, **inputs}, "cost": paid}
    return results.write(task, body, folder)
