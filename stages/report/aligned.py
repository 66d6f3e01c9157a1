"""From an alignment artifact to what the report shows of it: figures of a round, and means by teacher entropy."""

from __future__ import annotations

import json
from typing import Any

from eopd.stages.report.data import FIRST, FORWARD_KL, BinnedMean
from eopd.storage import alignments
from eopd.storage.artifacts import Artifact

_BINNED = {
    FORWARD_KL: "fkl",
    "Reverse KL": "rkl",
    "Top-1 agreement": "agreement",
    "Student entropy": "student_entropy",
    "Share of tokens": "share",
}
_OF_A_ROUND = {  # attribute of RoundData -> (tokens, figure)
    "held_out_entropy": ("all", "student_entropy"),
    "held_out_teacher_entropy": ("all", "teacher_entropy"),
    "held_out_fkl": ("all", "fkl"),
    "held_out_rkl": ("all", "rkl"),
    "uncertain_fkl": ("above", "fkl"),
    "agreement": ("all", "agreement"),
    "student_above": ("all", "student_above"),
    "teacher_above": ("above", "share"),
}


_READ_WITH = ("tau", "temperature", "merge_stops", "limit")  # settings that decide what a figure is of


def read_alignment(artifact: Artifact) -> dict[str, Any]:
    """The summary, with an entry for each kind of responses (own, first) under ``responses``."""
    path = artifact.part_folder(artifact.parts - 1) / alignments.RESULTS
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def read_with(results: dict[str, Any]) -> dict[str, str]:
    """What must be the same for two alignments to be comparable, as text by name."""
    settings = results["settings"]
    found = {f"evaluate.alignment.{name}": json.dumps(settings[name]) for name in _READ_WITH}
    found["evaluate.alignment.responses"] = " and ".join(sorted(results["responses"]))
    found["score.teacher_prompt"] = json.dumps(results["teacher_prompt"], sort_keys=True)
    found["the teacher"] = results["teacher"]["fingerprint"][:12]
    if "first" in results["responses"]:
        found["the fixed set"] = results["artifact"]["inputs"].get("first evaluation", "")[:12]
    return found


def round_figures(results: dict[str, Any]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Fields of ``RoundData``, and their intervals; a figure of no token is left out."""
    values, bounds = {}, {}
    for whose, found in results["responses"].items():
        for attribute, (tokens, figure) in _OF_A_ROUND.items():
            if found[tokens][figure] is None:
                continue
            name = attribute if whose == "own" else f"{FIRST}{attribute}"
            values[name] = found[tokens][figure]
            interval = found[tokens]["intervals"].get(figure)
            if interval is not None:
                bounds[name] = (interval[0], interval[1])
    return values, bounds


def binned(results: dict[str, Any], whose: str) -> dict[str, BinnedMean]:
    """Figures by bin of teacher entropy on one kind of responses; bins without tokens are gaps."""
    found = results["responses"].get(whose)
    if found is None:
        return {}
    rows = found["bins"]
    return {
        title: BinnedMean(
            found["edges"],
            [row[figure] if row["tokens"] else None for row in rows],
            [row["tokens"] for row in rows],
            [row["intervals"].get(figure) for row in rows],
        )
        for title, figure in _BINNED.items()
    }
