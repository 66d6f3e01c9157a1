"""Figures over teacher entropy: histograms, and means by entropy bin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from eopd.stages.report import held_out, palette, words
from eopd.stages.report.curves import key_of
from eopd.stages.report.data import FIRST, FORWARD_KL, BinnedMean, Histogram, RunData
from eopd.stages.report.figure import Axis, Figure, Line, Steps, is_shown

_OPEN = 4  # a last bin this many times wider than the one before is open: its end is not to scale


def histograms(runs: Sequence[RunData]) -> list[Figure]:
    """One figure a run: how often the teacher (area) and the student (dashed outline) are how uncertain."""
    figures = []
    for index, run in enumerate(runs):
        marks, legends = [], []
        for dashed, label, histogram in (
            (False, "teacher", run.entropy_histogram_teacher),
            (True, "student", run.entropy_histogram_student),
        ):
            if histogram is not None and any(histogram.counts):
                marks.append(_outline(histogram, label, index, len(runs) == 1, dashed))
                legends.append(_legend(label, "dashed" if dashed else "filled", histogram, run.threshold))
        if marks:
            figures.append(
                Figure(
                    f"entropy-histogram-{index}",
                    "Token entropy, log scale" if len(runs) == 1 else f"Token entropy, {run.name}",
                    _note(legends),
                    _entropy_axis(marks),
                    Axis("share of tokens", "percent", base=10, high=1.0),
                    tuple(marks),
                    rules=_gate(run),
                )
            )
    return figures


def by_entropy_bin(runs: Sequence[RunData]) -> list[Figure]:
    """FKL by teacher-entropy bin, then whatever else was measured by bin; each kind of responses apart."""
    own, first = [run.by_entropy_bin for run in runs], [run.first_by_entropy_bin for run in runs]
    return [*_by_entropy_bin(runs, own, ""), *_by_entropy_bin(runs, first, FIRST)]


def _by_entropy_bin(runs: Sequence[RunData], measured: Sequence[Mapping[str, BinnedMean]], kind: str) -> list[Figure]:
    figures = []
    names = sorted({name for binned in measured for name in binned}, key=lambda name: (name != FORWARD_KL, name))
    for number, name in enumerate(names):
        found = [binned.get(name) for binned in measured]
        marks = tuple(_means(runs, index, binned) for index, binned in enumerate(found) if binned is not None)
        shown = tuple(mark for mark in marks if _has_data(mark))
        if shown:
            title = f"{words.printable(name, 40)} by teacher entropy{held_out.TITLES[kind]}"
            unit = "mean of the tokens in each bin" + (", nats" if name == FORWARD_KL else "")
            figures.append(
                Figure(
                    f"{kind.replace('_', '-')}{'fkl-by-entropy' if name == FORWARD_KL else f'by-entropy-{number}'}",
                    title,
                    f"{held_out.NOTES[kind]} · {unit}",
                    Axis("teacher entropy, nats"),
                    Axis(title),
                    shown,
                    rules=_gate(runs[0]) if len({run.threshold for run in runs}) == 1 else (),
                    key=key_of(runs),
                )
            )
    return figures


def share_above(histogram: Histogram, threshold: float) -> float | None:
    """Share of tokens in bins that begin at or above ``threshold``; None unless an edge lies there."""
    total = sum(histogram.counts)
    edges = [edge for edge in histogram.edges if abs(edge - threshold) < 1e-9]
    if not total or not edges:
        return None
    above = sum(count for low, count in zip(histogram.edges, histogram.counts, strict=False) if low >= edges[0])
    return above / total


def _outline(histogram: Histogram, label: str, index: int, alone: bool, dashed: bool) -> Steps:
    total = sum(histogram.counts)
    tone = palette.tone((0 if dashed else 1) if alone else index)
    shares = tuple(count / total for count in histogram.counts)
    return Steps(label, tuple(histogram.edges), shares, tone, index, dashed=dashed, filled=not dashed)


def _legend(label: str, look: str, histogram: Histogram, threshold: float | None) -> str:
    share = None if threshold is None else share_above(histogram, threshold)
    return f"{label} {look}" if share is None else f"{label} {words.number(share, 'percent')} ({look})"


def _note(legends: Sequence[str]) -> str:
    shares = any("%" in legend for legend in legends)
    return ("past the gate: " if shares else "") + ", ".join(legends)


def _entropy_axis(marks: Sequence[Steps]) -> Axis:
    """The axis ends a little after the start of an open last bin, which would otherwise squeeze all others."""
    longest = max((mark.edges for mark in marks), key=lambda edges: edges[-1])
    if len(longest) > 2:
        before, start, end = longest[-3:]
        if end - start >= _OPEN * (start - before):
            return Axis(f"entropy, nats (last: {start:g} and more)", high=start + _OPEN * (start - before))
    return Axis("entropy, nats")


def _gate(run: RunData) -> tuple[tuple[float, str], ...]:
    return () if run.threshold is None else ((run.threshold, f"gate {run.threshold:g}"),)


def _means(runs: Sequence[RunData], index: int, binned: BinnedMean) -> Line | Steps:
    """A histogram-like outline for one run; lines through the bins' middles where runs are compared."""
    steps = Steps("mean", tuple(binned.edges), tuple(binned.means), palette.tone(index), bounds=tuple(binned.bounds))
    if len(runs) == 1:
        return replace(steps, filled=True)
    return Line(runs[index].name, steps.points(), palette.tone(index), index)


def _has_data(mark: Line | Steps) -> bool:
    if isinstance(mark, Steps):
        return any(value is not None for value in mark.heights)
    return any(map(is_shown, mark.points))
