"""From an alignment artifact to what the report shows of it: figures of a round, and means by teacher entropy."""

from __future__ import annotations

import json
from typing import Any

from eopd.stages.report.data import BinnedMean
from eopd.storage import alignments
from eopd.storage.artifacts import Artifact

_BINNED = {
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


def read_alignment(artifact: Artifact) -> dict[str, Any]:
    """What was measured on the first kind of responses that was asked for (own, unless the settings say otherwise)."""
    path = artifact.part_folder(artifact.parts - 1) / alignments.RESULTS
    results = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, Any] = results["responses"][results["settings"]["responses"][0]]
    return found


def round_figures(found: dict[str, Any]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Fields of ``RoundData``, and their intervals; a figure of no token is left out."""
    values, bounds = {}, {}
    for attribute, (tokens, figure) in _OF_A_ROUND.items():
        if found[tokens][figure] is None:
            continue
        values[attribute] = found[tokens][figure]
        interval = found[tokens]["intervals"].get(figure)
        if interval is not None:
            bounds[attribute] = (interval[0], interval[1])
    return values, bounds


def binned(found: dict[str, Any], figure: str) -> BinnedMean:
    """A figure by bin of teacher entropy; bins without tokens are gaps."""
    rows = found["bins"]
    return BinnedMean(
        found["edges"],
        [row[figure] if row["tokens"] else None for row in rows],
        [row["tokens"] for row in rows],
        [row["intervals"].get(figure) for row in rows],
    )


def further(found: dict[str, Any]) -> dict[str, BinnedMean]:
    """Everything by bin but the forward KL."""
    return {title: binned(found, figure) for title, figure in _BINNED.items()}
