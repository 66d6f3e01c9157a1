"""The two ends of every table: the student before training and its teacher, on the evaluation problems.

python -m examples.study.anchors        # writes results/anchors.json; about a minute
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from eopd.storage.files import replace_atomically
from examples.study.design import FULL, HERE, SAMPLES, Scale, Task
from examples.study.errors import StudyError
from examples.study.experiments import MAIN
from examples.study.worlds import COUNTDOWN

PATH = HERE / "results" / "anchors.json"
ROLES = ("student", "teacher")


def measure_both(work: Path, scale: Scale = FULL) -> dict[str, Any]:
    """Figures of ``examples.countdown.measure`` by role, seed 0; what they are of, and what measured them."""
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
        found[role] = asdict(measure(model, problems, chat=False, samples=SAMPLES))
    return found


def lines(inputs: Mapping[str, str]) -> list[str]:
    """Sentences for the report, beside results of ``inputs``; none where the anchors were not measured.

    Raises:
        StudyError: the anchors are of other inputs. The first ones do not say what they are of.
    """
    if not PATH.exists():
        return []
    found = json.loads(PATH.read_text(encoding="utf-8"))
    for name, fingerprint in found.get("inputs", {}).items():
        if fingerprint != inputs[name]:
            raise StudyError(
                f"{PATH} is of other {name} ({fingerprint}) than the results beside it ({inputs[name]}): measure it "
                "again (python -m examples.study.anchors)"
            )
    said = [
        f"{name}: Avg@8 {found[role]['avg_at_k']:.4f}, Pass@8 {found[role]['pass_at_k']:.4f}, "
        f"distinct correct {found[role]['distinct_correct']:.4f}, entropy {found[role]['entropy']:.3f} nats"
        for role, name in zip(ROLES, ("The student before training", "the teacher"), strict=True)
    ]
    return ["; ".join(said) + " (the same problems, seed 0)."]


if __name__ == "__main__":
    replace_atomically(PATH, json.dumps(measure_both(Path("runs/study")), indent=1, sort_keys=True) + "\n")
