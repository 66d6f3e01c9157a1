"""Figures that follow a run: by round, and by optimiser step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from eopd.stages.report import palette, words
from eopd.stages.report.data import RoundData, RunData, StepRow
from eopd.stages.report.figure import Axis, Figure, Line, Point, is_shown, thin
from eopd.stages.report.rates import Rate, rates
from eopd.stages.report.words import Form

_MOST_BANDS = 3  # with more runs than this, ranges would hide the lines
_MOST_RULES = 16
_MOST_FURTHER = 24
_FURTHER = "step-further"


@dataclass(frozen=True)
class Panel:
    """One quantity to plot: ``solid`` is the attribute drawn whole, ``dashed`` a second one beside it."""

    name: str
    title: str
    solid: str
    form: Form = "number"
    note: str = ""
    dashed: str = ""


ENTROPY_NOTE = "nats a token · student solid, teacher dashed"
ROUND_PANELS = (
    Panel("entropy", "Entropy", "student_entropy", note=ENTROPY_NOTE, dashed="teacher_entropy"),
    Panel("gate-fraction", "Gate fraction", "gate_fraction", "percent", "tokens whose teacher entropy passes the gate"),
    Panel("rkl", "Reverse KL", "rkl", note="student to teacher, nats per token"),
    Panel("fkl", "Forward KL", "fkl", note="teacher to student, nats per token"),
    Panel(
        "distinct-correct",
        "Distinct correct solutions",
        "distinct_correct",
        note="a problem · apart by equations (math), expression (countdown) or text (exact)",
    ),
    Panel("self-bleu", "Self-BLEU", "self_bleu", "rate", "likeness of a problem's samples, 1: all equal"),
    Panel("distinct-4", "Distinct 4-grams", "distinct_4", "rate", "different ones among all of a problem's samples"),
    Panel(
        "token-entropy", "Sampled entropy", "token_entropy", note="nats a token, of what the evaluation sampled from"
    ),
    Panel("response-length", "Response length", "response_length", note="mean tokens a response"),
    Panel("truncation", "Truncation rate", "truncation_rate", "percent", "responses cut off at the length limit"),
    Panel("tokens", "Student tokens", "tokens", "count", "response tokens trained on in the round"),
)
STEP_PANELS = (
    Panel("step-loss", "Loss", "loss"),
    Panel("step-rkl", "Reverse KL", "rkl", note="nats per token"),
    Panel("step-fkl", "Forward KL", "fkl", note="nats per token"),
    Panel("step-gate-fraction", "Gate fraction", "gate_fraction", "percent"),
    Panel("step-entropy", "Entropy", "student_entropy", note=ENTROPY_NOTE, dashed="teacher_entropy"),
    Panel("step-retained-mass", "Retained mass", "retained_mass", "percent", "teacher probability in the stored head"),
    Panel("step-grad-norm", "Gradient norm", "grad_norm"),
    Panel("step-tokens-per-s", "Training speed", "tokens_per_s", "count", "tokens a second"),
)


def key_of(runs: Sequence[RunData]) -> tuple[tuple[str, str, int], ...]:
    """Legend of a figure that compares runs; none for a single one."""
    if len(runs) == 1:
        return ()
    return tuple((run.name, palette.tone(index), index) for index, run in enumerate(runs))


def quality(runs: Sequence[RunData]) -> list[Figure]:
    """Avg@k and Pass@k by round, and Pass@k over k in the first and the last round."""
    figures = [_by_round(runs, rate) for rate in rates(runs)]
    by_k = [line for index, run in enumerate(runs) for line in _pass_over_k(run, index, len(runs) == 1)]
    if any(len(line.points) > 1 for line in by_k):
        figures.append(
            Figure(
                "pass-over-k",
                "Pass@k over k",
                "first round hollow and dashed, last round solid",
                Axis("k", "count", base=2, whole=True),
                Axis("Pass@k", "rate", low=0.0, high=1.0),
                tuple(by_k),
                key=key_of(runs),
            )
        )
    return figures


def by_round(runs: Sequence[RunData], panels: Sequence[Panel] = ROUND_PANELS) -> tuple[list[Figure], list[str]]:
    """Figures by round, and the titles of those nothing was measured for."""
    return _panels(runs, panels, _round_lines)


def by_step(runs: Sequence[RunData]) -> tuple[list[Figure], list[str]]:
    """Figures by optimiser step, and the titles of those nothing was measured for."""
    names = sorted({name for run in runs for row in run.training for name in row.further})
    further = tuple(
        Panel(f"{_FURTHER}-{index}", words.printable(name, 40), f"further:{name}")
        for index, name in enumerate(names[:_MOST_FURTHER])
    )
    return _panels(runs, (*STEP_PANELS, *further), _step_lines)


def is_further(figure: Figure) -> bool:
    """Is it one of the objective's own figures, which the page folds away?"""
    return figure.name.startswith(_FURTHER)


Lines = Callable[[RunData, int, Panel, int], tuple[list[Line], list[tuple[float, str]]]]


def _panels(runs: Sequence[RunData], panels: Sequence[Panel], lines: Lines) -> tuple[list[Figure], list[str]]:
    figures, missing = [], []
    for panel in panels:
        drawn = [lines(run, index, panel, len(runs)) for index, run in enumerate(runs)]
        marks = tuple(line for found, _ in drawn for line in found if any(map(is_shown, line.points)))
        if not marks:
            missing.append(panel.title.lower())
            continue
        unit = "step" if lines is _step_lines else "round"
        bounds = (0.0, 1.0) if panel.form in ("percent", "rate") else (None, None)
        figures.append(
            Figure(
                panel.name,
                panel.title,
                panel.note,
                Axis("optimiser step" if unit == "step" else "round", "count", whole=True),
                Axis(panel.title, panel.form, low=bounds[0], high=bounds[1]),
                marks,
                rules=tuple(drawn[0][1]) if len(runs) == 1 else (),
                named=len(runs) == 1 and len(marks) > 1,
                key=key_of(runs),
            )
        )
    return figures, missing


def _round_lines(run: RunData, index: int, panel: Panel, count: int) -> tuple[list[Line], list[tuple[float, str]]]:
    lines = []
    for attribute in filter(None, (panel.solid, panel.dashed)):
        points = _points(run, partial(_figure_of, attribute))
        lines.append(_line(run, index, attribute, panel, points, count))
    return lines, []


def _step_lines(run: RunData, index: int, panel: Panel, count: int) -> tuple[list[Line], list[tuple[float, str]]]:
    xs = _global_steps(run.training)
    lines = []
    for attribute in filter(None, (panel.solid, panel.dashed)):
        points = thin([Point(x, _value(row, attribute)) for x, row in zip(xs, run.training, strict=True)])
        if count > _MOST_BANDS:
            points = tuple(Point(point.x, point.y) for point in points)
        lines.append(_line(run, index, attribute, panel, points, count, band=True))
    rounds = [row.round for row in run.training]
    starts = [x for x, now, before in zip(xs[1:], rounds[1:], rounds, strict=False) if now != before]
    return lines, [(x, "") for x in starts] if len(starts) <= _MOST_RULES else []


def _line(
    run: RunData, index: int, attribute: str, panel: Panel, points: tuple[Point, ...], count: int, band: bool = False
) -> Line:
    """One run alone: colours tell student from teacher. Several: colours tell runs, dashes the teacher."""
    dashed = attribute == panel.dashed
    role = ("teacher" if dashed else "student") if panel.dashed else ""
    if count == 1:
        return Line(role, points, palette.tone(int(dashed)), 0, dashed, band=band)
    label = f"{run.name} ({role})" if role else run.name
    return Line(label, points, palette.tone(index), index, dashed, band=band)


def _figure_of(attribute: str, item: RoundData) -> Point:
    return Point(item.round, getattr(item, attribute), *item.intervals.get(attribute, (None, None)))


def _points(run: RunData, point: Callable[[RoundData], Point]) -> tuple[Point, ...]:
    """One a round; none, and no gap, where a figure is missing because the student was not to be measured."""
    found = [(item, point(item)) for item in run.rounds]
    return thin([shown for item, shown in found if item.measured or is_shown(shown)])


def _by_round(runs: Sequence[RunData], rate: Rate) -> Figure:
    marks = []
    for index, run in enumerate(runs):
        points = _points(run, partial(_rate_of, rate))
        if any(map(is_shown, points)):
            label = "" if len(runs) == 1 else run.name
            marks.append(Line(label, points, palette.tone(index), index))
    axis = Axis(rate.name, "rate", low=0.0, high=1.0)
    x = Axis("round", "count", whole=True)
    return Figure(f"{rate.which}-at-k", rate.name, rate.note, x, axis, tuple(marks), key=key_of(runs))


def _rate_of(rate: Rate, item: RoundData) -> Point:
    found = rate.of(item)
    return Point(item.round, None) if found is None else Point(item.round, found.value, found.low, found.high)


def _pass_over_k(run: RunData, index: int, alone: bool) -> list[Line]:
    evaluated = [item for item in run.rounds if item.pass_at_k]
    if not evaluated:
        return []
    chosen = [evaluated[-1]] if len(evaluated) == 1 else [evaluated[0], evaluated[-1]]
    lines = []
    for item in chosen:
        points = tuple(
            Point(k, item.pass_at_k[k], *item.pass_interval.get(k, (None, None))) for k in sorted(item.pass_at_k)
        )
        first = item is not evaluated[-1]
        label = f"round {item.round}" if alone else f"{run.name} (round {item.round})"
        lines.append(Line(label, points, palette.tone(index), index, dashed=first, hollow=first))
    return lines


def _global_steps(rows: Sequence[StepRow]) -> list[int]:
    """The rows' own step numbers where they keep rising, else their place: 1, 2, 3 ..."""
    steps = [row.step for row in rows]
    rising = all(after > before for before, after in itertools.pairwise(steps))
    return steps if rising else list(range(1, len(rows) + 1))


def _value(row: StepRow, attribute: str) -> float | None:
    if attribute.startswith("further:"):
        return row.further.get(attribute.removeprefix("further:"))
    found: float | None = getattr(row, attribute)
    return found
