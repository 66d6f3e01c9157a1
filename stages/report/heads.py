"""What the divergences of training are of: the teacher's head, as it is stored and as far as the objective reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eopd.stages.report import words
from eopd.stages.report.data import RunData
from eopd.storage.artifacts import Artifact
from eopd.storage.teacher_record import HeadRule


def read_head(scores: Artifact, objective: Mapping[str, Any]) -> str:
    """Which ids the objective (its settings) reads of these scores, in words."""
    coverage = scores.identity.coverage or {}
    if "head" not in coverage:  # imported, of another kind of record
        return "not known"
    rule, name = HeadRule(**coverage["head"]), objective["name"]
    if name == "sft":
        most = 1
    elif objective["support"] == "sampled":
        most = rule.k_max  # draws stand for what the stored head leaves out
    else:
        most = min(objective["k"], rule.k_max)
    if most == 1:
        said = "the most probable id"
    elif rule.full_head_above < 0:
        said = f"the {most} most probable ids"
    else:
        said = f"ids of probability {rule.min_prob:g} and more, {most} at most and past {rule.full_head_above:g} nats"
    return f"{said}, as {name} reads it" if ":" in name else said


def notes(runs: Sequence[RunData]) -> list[str]:
    """What must be said of the divergences of training of several runs."""
    measured = [run for run in runs if any(row.rkl is not None or row.fkl is not None for row in run.training)]
    apart = words.by_whom([(run.name, run.head) for run in measured if run.head])
    if not apart:
        return []
    return [
        "Forward and reverse KL of training are of the teacher's head and one bucket for the rest, and cannot be "
        f"compared where the head is another one: it is {apart}."
    ]
