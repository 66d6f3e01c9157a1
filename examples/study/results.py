"""The record of a result: one small JSON a (setting, seed), committed, so that a study can be continued elsewhere.

Producer: ``run.py``. Readers: ``compare.py`` and ``report.py``. ``correct`` and ``distinct`` are one digit a problem,
in the order of the problem file: right answers of 8 samples, and different right solutions among them. With them any
two results on the same problems can be compared in pairs, at any k.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eopd.storage.files import replace_atomically
from examples.study.design import HERE, SAMPLES, Task
from examples.study.errors import StudyError

RESULTS = HERE / "results"
RECORD, VERSION = "study_result", 1

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Result:
    """A result as read from ``path``; ``content`` is the whole JSON."""

    path: Path
    content: Mapping[str, Any]
    correct: Counts  # [P] of SAMPLES
    distinct: Counts  # [P]

    @property
    def seed(self) -> int:
        return int(self.content["seed"])

    @property
    def metrics(self) -> Mapping[str, Any]:
        result: Mapping[str, Any] = self.content["metrics"]
        return result


def path_of(task: Task, folder: Path) -> Path:
    return folder / f"{task.name}.json"


def write(task: Task, content: Mapping[str, Any], folder: Path) -> Path:
    """Raises: StudyError where a result of other settings is in the way (``read``)."""
    read(task, folder)
    path = path_of(task, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {"record": RECORD, "version": VERSION, "key": task.key, **content}
    replace_atomically(path, json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return path


def read(task: Task, folder: Path) -> Result | None:
    """The task's result; None where there is none.

    Raises:
        StudyError: the file is not a result, or one of other settings than the task has; names it.
    """
    path = path_of(task, folder)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["record"] != RECORD or content["version"] != VERSION:
            raise ValueError(f"record {content['record']!r} version {content['version']!r}")
        correct, distinct = decode(content["correct"]), decode(content["distinct"])
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path} is no result of the study ({error!r}); delete it and run again") from error
    if content["key"] != task.key:
        raise StudyError(
            f"{path} is a result of other settings (key {content['key']}) than {task.name} has now (key {task.key}): "
            "undo the change of the settings, or move the file away"
        )
    return Result(path, content, correct, distinct)


INPUTS = ("student", "teacher", "prompts", "problems")
"""By fingerprint; beside them ``objective``: the source of an objective of the study's own."""


def refuse_other_inputs(outcome: Sequence[Result]) -> None:
    """Results that are compared are of the same models, problems and objective sources.

    Raises:
        StudyError: two are not; names their files. Older results do not say the source of their objective.
    """
    for name in (*INPUTS, "objective"):
        known = [result for result in outcome if name in result.content["inputs"]]
        for result in known:
            here, there = result.content["inputs"][name], known[0].content["inputs"][name]
            if here != there:
                raise StudyError(
                    f"{result.path} and {known[0].path} cannot be compared: {name} {here} and {there}. Delete the one "
                    "that was made by mistake, and run it again"
                )


def encode(counts: Iterable[int]) -> str:
    """One digit a problem."""
    digits = [int(count) for count in counts]
    assert all(0 <= digit <= SAMPLES for digit in digits)
    return "".join(map(str, digits))


def decode(digits: str) -> Counts:
    return np.asarray([int(digit) for digit in digits], dtype=np.int64)
