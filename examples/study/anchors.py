"""Where every table starts, and where it could end: the student before training and its teacher, on the same problems.

python -m examples.study.anchors        # writes results/anchors.json; about ten minutes
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eopd.storage.files import replace_atomically
from examples.study.compare import over_seeds
from examples.study.design import HERE, Experiment, Task
from examples.study.errors import StudyError
from examples.study.experiments import MAIN, TEXT_PAIR
from examples.study.worlds import COUNTDOWN

PATH = HERE / "results" / "anchors.json"
MEASURED = (MAIN, TEXT_PAIR)
"""One experiment of each task, with the seeds that its results have."""
ROLES, NAMES = ("student", "teacher"), ("The student before training", "the teacher")
SHOWN = {
    "avg_at_k": ("Avg@8", 4),
    "pass_at_k": ("Pass@8", 4),
    "distinct_correct": ("distinct correct", 4),
    "entropy": ("entropy in nats", 3),
}


@dataclass(frozen=True)
class Anchors:
    """``alignment``: of the student before training, as a result's (``alignment.measure``), one a seed. ``figures``:
    of ``examples.countdown.measure`` by role, a list of one a seed; none of GSM8K, where nothing is graded."""

    alignment: Sequence[Mapping[str, Any]]
    figures: Mapping[str, Sequence[Mapping[str, float]]]

    def lines(self) -> list[str]:
        """Sentences for the report."""
        if not self.figures:
            return []
        said = [_sentence(name, self.figures[role]) for role, name in zip(ROLES, NAMES, strict=True)]
        return ["; ".join(said) + f" (the same problems, {len(self.figures[ROLES[0]])} seeds)."]


NOTHING = Anchors((), {})


def measure(experiment: Experiment, work: Path) -> dict[str, Any]:
    """The anchors of an experiment's task and seeds, as ``PATH`` holds them: with what they are of, and made by."""
    import torch

    from eopd.pipeline.worker import execute
    from examples.study import alignment
    from examples.study.run import delete, inputs_of, made, open_task

    torch.set_num_threads(1)
    result: dict[str, Any] = {"made": made(), "alignment": []}
    for seed in experiment.seeds:
        opened = open_task(Task(experiment, experiment.settings[0], seed, lr=1.0), work)
        job = opened.plan.job("evaluate", 0)
        execute(opened, job)
        evaluation = opened.artifact(job.output)
        result["inputs"] = inputs_of(opened)
        result["alignment"].append(alignment.measure(opened, evaluation, round_=0))
        delete(evaluation)
    result["figures"] = _countdown(experiment, work) if experiment.world == COUNTDOWN else {}
    return result


def _countdown(experiment: Experiment, work: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    from eopd.examples.countdown.make import read_problems
    from eopd.examples.countdown.measure import measure as measure_model

    world = experiment.world
    problems = read_problems(world.problems(work, experiment.scale) / "evaluate.jsonl")
    result = {}
    for role in ROLES:
        model = AutoModelForCausalLM.from_pretrained(world.models(work)[role], dtype="float32", use_safetensors=True)
        result[role] = [
            asdict(measure_model(model, problems, chat=False, samples=world.samples, seed=seed))
            for seed in experiment.seeds
        ]
    return result


def read(experiment: Experiment, inputs: Mapping[str, str]) -> Anchors:
    """What was measured for results of ``inputs``; ``NOTHING`` at another size, or where nothing was measured.

    Raises:
        StudyError: it is of other models or problems.
    """
    name = experiment.world.name
    measured = {one.world.name: one.scale.problems for one in MEASURED}
    if not PATH.exists() or (experiment.evaluates, experiment.scale.problems) != ("evaluate", measured[name]):
        return NOTHING
    result = json.loads(PATH.read_text(encoding="utf-8")).get(name)
    if result is None:
        return NOTHING
    for what in (*ROLES, "problems"):
        fingerprint = result["inputs"][what]
        if fingerprint != inputs[what]:
            raise StudyError(
                f"{PATH} is of other {what} ({fingerprint}) than the results beside it ({inputs[what]}): measure it "
                "again (python -m examples.study.anchors)"
            )
    return Anchors(result["alignment"], result["figures"])


def _sentence(name: str, by_seed: Sequence[Mapping[str, float]]) -> str:
    figures = []
    for key, (shown, digits) in SHOWN.items():
        estimate = over_seeds(np.asarray([one[key] for one in by_seed]))
        half = "" if estimate.interval is None else f" ± {(estimate.interval.high - estimate.mean):.{digits}f}"
        figures.append(f"{shown} {estimate.mean:.{digits}f}{half}")
    return f"{name}: {', '.join(figures)}"


if __name__ == "__main__":
    both = {one.world.name: measure(one, Path("runs/study")) for one in MEASURED}
    replace_atomically(PATH, json.dumps(both, indent=1, sort_keys=True) + "\n")
