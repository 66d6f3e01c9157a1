"""The two ends of every table: the student before training and its teacher, on the evaluation problems.

python -m examples.study.anchors        # writes results/anchors.json; about five minutes
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from eopd.storage.files import replace_atomically
from examples.study.compare import over_seeds
from examples.study.design import FULL, HERE, SAMPLES, Scale, Task
from examples.study.errors import StudyError
from examples.study.experiments import MAIN
from examples.study.worlds import COUNTDOWN

PATH = HERE / "results" / "anchors.json"
ROLES, NAMES = ("student", "teacher"), ("The student before training", "the teacher")
SHOWN = {
    "avg_at_k": ("Avg@8", 4),
    "pass_at_k": ("Pass@8", 4),
    "distinct_correct": ("distinct correct", 4),
    "entropy": ("entropy in nats", 3),
}


def measure_both(work: Path, scale: Scale = FULL, seeds: Sequence[int] = MAIN.seeds) -> dict[str, Any]:
    """Figures of ``examples.countdown.measure`` by role, a list of one a seed; what they are of, what measured them."""
    import torch
    from transformers import AutoModelForCausalLM

    from eopd.examples.countdown.make import read_problems
    from eopd.examples.countdown.measure import measure
    from eopd.pipeline.config import parse_settings
    from eopd.pipeline.inspect import gather_facts
    from examples.study.run import made

    torch.set_num_threads(1)
    COUNTDOWN.prepare(work, scale)
    any_task = Task(replace(MAIN, scale=scale), MAIN.settings[0], seed=0, lr=1.0)
    facts = gather_facts(parse_settings(any_task.config(work), source=any_task.name))
    problems = read_problems(COUNTDOWN.problems(work, scale) / "evaluate.jsonl")
    found: dict[str, Any] = {
        "inputs": {
            "student": facts.student.fingerprint,
            "teacher": facts.teacher.fingerprint,
            "problems": facts.benchmarks[0].fingerprint,
        },
        "made": made(),
    }
    for role in ROLES:
        model = AutoModelForCausalLM.from_pretrained(COUNTDOWN.models(work)[role], dtype="float32")
        found[role] = [asdict(measure(model, problems, chat=False, samples=SAMPLES, seed=seed)) for seed in seeds]
    return found


def lines(inputs: Mapping[str, str]) -> list[str]:
    """Sentences for the report, beside results of ``inputs``; none where the anchors were not measured.

    Raises:
        StudyError: the anchors are of other inputs.
    """
    if not PATH.exists():
        return []
    found = json.loads(PATH.read_text(encoding="utf-8"))
    for name, fingerprint in found["inputs"].items():
        if fingerprint != inputs[name]:
            raise StudyError(
                f"{PATH} is of other {name} ({fingerprint}) than the results beside it ({inputs[name]}): measure it "
                "again (python -m examples.study.anchors)"
            )
    said = [_sentence(name, found[role]) for role, name in zip(ROLES, NAMES, strict=True)]
    return ["; ".join(said) + f" (the same problems, {len(found[ROLES[0]])} seeds)."]


def _sentence(name: str, by_seed: Sequence[Mapping[str, float]]) -> str:
    figures = []
    for key, (shown, digits) in SHOWN.items():
        estimate = over_seeds(np.asarray([one[key] for one in by_seed]))
        half = "" if estimate.interval is None else f" ± {(estimate.interval.high - estimate.mean):.{digits}f}"
        figures.append(f"{shown} {estimate.mean:.{digits}f}{half}")
    return f"{name}: {', '.join(figures)}"


if __name__ == "__main__":
    replace_atomically(PATH, json.dumps(measure_both(Path("runs/study")), indent=1, sort_keys=True) + "\n")
