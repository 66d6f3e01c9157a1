"""Teacher against student on the evaluation's samples, by round: figures of each kind of responses apart."""

from __future__ import annotations

from collections.abc import Sequence

from eopd.stages.report import words
from eopd.stages.report.curves import ENTROPY_NOTE, Panel, by_round
from eopd.stages.report.data import FIRST, RunData
from eopd.stages.report.figure import Figure

NOTES = {"": "own samples", FIRST: "first student's samples"}
"""What figures are of, by what their names begin with."""
TITLES = {"": "", FIRST: ", fixed set"}
_TAU = "evaluate.alignment.tau"


def figures(runs: Sequence[RunData]) -> list[Figure]:
    """Those of the student's own samples, then those of the fixed set."""
    return [figure for kind in NOTES for figure in by_round(runs, _panels(kind, _threshold(runs)))[0]]


def notes(runs: Sequence[RunData]) -> list[str]:
    """What the runs' teachers and students were not compared alike in."""
    read = [(run.name, run.read_with) for run in runs if run.read_with]
    differing = []
    for name in dict.fromkeys(name for _, found in read for name in found):
        apart = words.by_whom([(run, found[name]) for run, found in read if name in found])
        if apart:
            differing.append(f"{words.printable(name, 80)} is {apart}")
    if not differing:
        return []
    return [f"Not measured alike, which may be all of a difference: {'; '.join(differing)}."]


def _threshold(runs: Sequence[RunData]) -> str:
    taus = sorted({run.read_with[_TAU] for run in runs if _TAU in run.read_with}, key=float)
    return f"{' or '.join(taus)} nats" if taus else "the threshold"


def _panels(kind: str, threshold: str) -> tuple[Panel, ...]:
    """With ``kind`` before the name of each figure."""

    def panel(name: str, title: str, solid: str, note: str, *, percent: bool = False, dashed: str = "") -> Panel:
        return Panel(
            f"{kind.replace('_', '-')}{name}",
            f"{title}{TITLES[kind]}",
            f"{kind}{solid}",
            "percent" if percent else "number",
            f"{NOTES[kind]} · {note}",
            dashed and f"{kind}{dashed}",
        )

    return (
        panel("uncertain-fkl", "Forward KL on uncertain tokens", "uncertain_fkl", f"teacher entropy past {threshold}"),
        panel("held-out-fkl", "Forward KL on all tokens", "held_out_fkl", "teacher to student, nats per token"),
        panel("held-out-rkl", "Reverse KL on all tokens", "held_out_rkl", "student to teacher, nats per token"),
        panel("agreement", "Top-1 agreement", "agreement", "the most probable token is the same", percent=True),
        panel(
            "above-threshold",
            "Uncertain tokens",
            "student_above",
            f"entropy past {threshold} · student solid, teacher dashed",
            percent=True,
            dashed="teacher_above",
        ),
        panel("held-out-entropy", "Entropy", "held_out_entropy", ENTROPY_NOTE, dashed="held_out_teacher_entropy"),
    )
