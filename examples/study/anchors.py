"""The two ends of every table: the student before training and its teacher, on the evaluation problems.

python -m examples.study.anchors        # writes results/anchors.json; about a minute
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eopd.storage.files import replace_atomically
from examples.study.design import FULL, HERE, SAMPLES
from examples.study.worlds import COUNTDOWN

PATH = HERE / "results" / "anchors.json"
ROLES = ("student", "teacher")


def measure_both(work: Path) -> dict[str, Any]:
    """Figures of ``examples.countdown.measure`` by role, seed 0."""
    import torch
    from transformers import AutoModelForCausalLM

    from eopd.examples.countdown.make import read_problems
    from eopd.examples.countdown.measure import measure

    torch.set_num_threads(1)
    COUNTDOWN.prepare(work, FULL)
    problems = read_problems(COUNTDOWN.problems(work, FULL) / "evaluate.jsonl")
    found = {}
    for role in ROLES:
        model = AutoModelForCausalLM.from_pretrained(COUNTDOWN.models(work)[role], dtype="float32")
        found[role] = asdict(measure(model, problems, chat=False, samples=SAMPLES))
    return found


def lines() -> list[str]:
    """Sentences for the report; none where the anchors were not measured."""
    if not PATH.exists():
        return []
    found = json.loads(PATH.read_text(encoding="utf-8"))
    said = [
        f"{name}: Avg@8 {found[role]['avg_at_k']:.4f}, Pass@8 {found[role]['pass_at_k']:.4f}, "
        f"distinct correct {found[role]['distinct_correct']:.4f}, entropy {found[role]['entropy']:.3f} nats"
        for role, name in zip(ROLES, ("The student before training", "the teacher"), strict=True)
    ]
    return ["; ".join(said) + " (the same problems, seed 0)."]


if __name__ == "__main__":
    replace_atomically(PATH, json.dumps(measure_both(Path("runs/study")), indent=1, sort_keys=True) + "\n")
