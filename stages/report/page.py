"""The page: data to one self-contained HTML document.

Nothing in it is loaded from anywhere: its content policy forbids every request and every script but its own, which is
named by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from eopd.stages.report import (
    comparison,
    curves,
    distributions,
    headline,
    heads,
    held_out,
    palette,
    plots,
    tables,
    words,
)
from eopd.stages.report.data import ReportData, RunData
from eopd.stages.report.figure import Figure, Rows, rows
from eopd.stages.report.rollout_html import gallery

_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'; base-uri 'none'"


@dataclass(frozen=True)
class Section:
    """A group of figures. ``missing``: titles of those that no run has numbers for; ``more``: figures folded away;
    ``notes``: what must be known before comparing their lines.
    """

    ident: str
    short: str  # in the navigation
    title: str
    intro: str
    figures: tuple[Figure, ...]
    missing: tuple[str, ...]
    more: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()


def sections(runs: Sequence[RunData]) -> list[Section]:
    quality = curves.quality(runs)
    rounds, rounds_missing = curves.by_round(runs)
    steps, steps_missing = curves.by_step(runs)
    binned = distributions.by_entropy_bin(runs)
    histograms = distributions.histograms(runs)
    measured = held_out.figures(runs)
    spread_missing = [
        *([] if histograms else ["token entropy"]),
        *([] if binned else ["forward KL by teacher entropy"]),
    ]
    return [
        Section(
            "quality",
            "Answers",
            "Right answers",
            "Avg@k is the share of right samples, Pass@k the share of problems that k samples solve. "
            + _intervals(runs),
            tuple(quality),
            () if quality else ("Avg@k and Pass@k",),
        ),
        Section(
            "rounds",
            "Rounds",
            "Round by round",
            "Each round samples from the student that the round before trained. Round 0 is the first student. Entropy, "
            "gate fraction and divergences are of the round's first training step, before any update: the last student "
            "trains no more and has none.",
            tuple(rounds),
            tuple(rounds_missing),
            notes=tuple(heads.notes(runs)),
        ),
        Section(
            "training",
            "Training",
            "Inside training",
            "Every optimiser step. Long curves are means over a few steps, with their range behind; "
            "dotted lines mark the start of a round.",
            tuple(figure for figure in steps if not curves.is_further(figure)),
            tuple(steps_missing),
            tuple(figure for figure in steps if curves.is_further(figure)),
            notes=tuple(heads.notes(runs)),
        ),
        Section(
            "held-out",
            "Teacher",
            "Against the teacher",
            "Teacher and student on the evaluation's samples, exact over the full vocabulary.",
            tuple(measured),
            () if measured else ("alignment on held-out samples (set evaluate.alignment)",),
            notes=tuple(held_out.notes(runs)),
        ),
        Section(
            "spread",
            "Uncertainty",
            "Where the teacher is uncertain",
            "Most tokens are certain; the method is about the few at which several continuations are right.",
            (*histograms, *binned),
            tuple(spread_missing),
            notes=tuple(held_out.notes(runs)) if binned else (),
        ),
    ]


def figures(data: ReportData) -> list[Figure]:
    """Every figure of the report, in the page's order."""
    return [figure for section in sections(_cleaned(data).runs) for figure in (*section.figures, *section.more)]


def render(data: ReportData) -> str:
    """The document.

    Raises:
        ValueError: there is no run to show.
    """
    if not data.runs:
        raise ValueError("runs is empty: a report needs at least one run")
    data = _cleaned(data)
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    summaries = headline.summarise(data.runs)
    compared = comparison.compare(data.runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        data=data,
        policy=_POLICY.format(digest),
        style=Markup(_theme() + plots.plot_style() + style),
        script=Markup(script),
        sentences=headline.sentence(summaries),
        summaries=summaries,
        beside=headline.beside(summaries),
        compared=compared,
        evaluations=tables.evaluations(data.runs),
        graders=[(run.name, words.joined(run.graders)) for run in data.runs if run.graders],
        warnings=[(run.name, run.warnings) for run in data.runs if run.warnings],
        differences=comparison.table(compared),
        dumbbells=headline.dumbbells(summaries),
        marker=_marker,
        several=len(data.runs) > 1,
        sections=sections(data.runs),
        drawing=_drawing,
        table=_table,
        gallery=gallery(data.runs),
        heat=_heat_legend(),
        costs=tables.costs(data.runs),
        whole_time=tables.whole_time(data.runs),
        settings=tables.settings(data.runs),
        notes=[(run.name, run.notes) for run in data.runs if run.notes],
    )


def _cleaned(data: ReportData) -> ReportData:
    """Names and notes without control characters, and every run with a name of its own."""
    runs, seen = [], set()
    for index, run in enumerate(data.runs):
        name = words.printable(run.name, 60).strip() or f"run {index + 1}"
        while name in seen:
            name = f"{name} ({index + 1})"
        seen.add(name)
        said = {
            field: [words.printable(text, 1000) for text in getattr(run, field)]
            for field in ("notes", "warnings", "graders")
        }
        runs.append(_replace(run, name=name, interval=words.printable(run.interval, 120), **said))
    title, generated = words.printable(data.title, 200), words.printable(data.generated, 100)
    return ReportData(title=title, generated=generated, runs=runs)


def _replace(run: RunData, **changed: object) -> RunData:
    """``dataclasses.replace``, without validating the run's whole content a second time."""
    copy = object.__new__(RunData)
    copy.__dict__.update({**run.__dict__, **changed})
    return copy


def _intervals(runs: Sequence[RunData]) -> str:
    said = sorted({run.interval for run in runs if run.interval})
    present = any(item.avg_interval or item.pass_interval for run in runs for item in run.rounds)
    if said:
        return f"Intervals: {'; '.join(said)}."
    return "" if present else "No intervals were measured."


def _theme() -> str:
    light, dark = palette.css_variables(palette.LIGHT), palette.css_variables(palette.DARK)
    return (
        f":root{{color-scheme:light;{light}}}"
        f"@media(prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}"
        f":root[data-theme=dark]{{color-scheme:dark;{dark}}}"
    )


def _drawing(figure: Figure) -> Markup:
    return Markup(plots.inline(figure, f"plot-{figure.name}"))


def _table(figure: Figure) -> Rows:
    return rows(figure)


def _marker(index: int) -> Markup:
    tone = palette.tone(index)
    drawn = plots.shape(index, 7, 7, f"s-{tone} f-{tone} dot", 4)
    return Markup(f'<svg class="marker" viewBox="0 0 14 14" aria-hidden="true">{drawn}</svg>')


def _heat_legend() -> list[tuple[int, str]]:
    edges = palette.HEAT_EDGES
    first = (0, f"below {edges[0]}")
    middle = [(step, f"{low}–{high}") for step, low, high in zip(range(1, len(edges)), edges, edges[1:], strict=False)]
    return [first, *middle, (len(edges), f"{edges[-1]} and more")]
