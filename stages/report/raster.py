"""A figure as PNG, drawn by matplotlib in the report's light colours."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from eopd.stages.report import palette, words
from eopd.stages.report.figure import Figure, Line, Steps, is_shown
from eopd.stages.report.scales import log_ticks, tick_labels, ticks, value_range

_COLOUR = palette.LIGHT
_MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle": "^", "plus": "P"}
_WIDTH, _HEIGHT = 6.4, 4.2  # inches, without the legend
_KEY_HEIGHT = 0.19  # of a line of the legend
_KEY_WIDTH = 84  # characters that a line of it holds
# A dollar sign in a run's name is text, not mathematics.
_STYLE: Mapping[str, object] = {"text.parse_math": False, "font.size": 9, "font.family": "sans-serif"}


def png(figure: Figure) -> bytes:
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        canvas = Canvas(
            figsize=(_WIDTH, _HEIGHT),
            dpi=160,
            facecolor=_COLOUR["paper"],
            layout=ConstrainedLayoutEngine(w_pad=0.18, h_pad=0.18),
        )
        FigureCanvasAgg(canvas)
        axes = canvas.subplots()
        for mark in figure.marks:
            if isinstance(mark, Steps):
                _steps(axes, mark)
            else:
                _line(axes, mark, compared=bool(figure.key))
        _dress(axes, figure)
        _legend(canvas, axes, figure)
        out = io.BytesIO()
        canvas.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _line(axes: Axes, line: Line, *, compared: bool) -> None:
    """A long line has its marker at the end alone, where it must be told from others."""
    colour = _COLOUR[line.tone]
    gaps = [point.y if is_shown(point) and point.y is not None else math.nan for point in line.points]
    xs = [point.x for point in line.points]
    many = len(xs) > 16
    shown = [number for number, point in enumerate(line.points) if is_shown(point)]
    axes.plot(
        xs,
        gaps,
        color=colour,
        linewidth=1.8,
        linestyle=(0, (4, 3)) if line.dashed else "-",
        marker="" if many and not compared else _MARKERS[palette.marker(line.run)],
        markevery=[max(shown)] if many and shown else None,
        markersize=5,
        markerfacecolor=_COLOUR["paper"] if line.hollow or line.dashed else colour,
        label=_text(line.label) or None,
    )
    known = [(p.x, p.low, p.high) for p in line.points if is_shown(p) and p.low is not None and p.high is not None]
    if known and (many or line.band):
        at, low, high = zip(*known, strict=True)
        axes.fill_between(at, low, high, color=colour, alpha=0.14, linewidth=0)
    elif known:
        for at_one, low_one, high_one in known:
            axes.plot([at_one, at_one], [low_one, high_one], color=colour, alpha=0.5, linewidth=1.4)


def _steps(axes: Axes, steps: Steps) -> None:
    colour = _COLOUR[steps.tone]
    values = [math.nan if height is None else height for height in steps.heights]
    if steps.filled:
        axes.stairs(values, steps.edges, fill=True, color=colour, alpha=0.18)
    axes.stairs(
        values,
        steps.edges,
        color=colour,
        linewidth=1.6,
        linestyle="--" if steps.dashed else "-",
        label=_text(steps.label),
    )
    for point in steps.points():
        if point.low is not None and point.high is not None:
            axes.plot([point.x, point.x], [point.low, point.high], color=colour, alpha=0.5, linewidth=1.4)


def _dress(axes: Axes, figure: Figure) -> None:
    """The page's look: hairlines across, no box, words in grey."""
    axes.set_facecolor(_COLOUR["paper"])
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_COLOUR["line"])
    axes.grid(axis="y", color=_COLOUR["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_COLOUR["muted"])
    axes.set_xlabel(_text(figure.x.label), color=_COLOUR["muted"])
    title = _text(figure.title, 70)
    axes.set_title(
        title, loc="left", color=_COLOUR["ink"], fontsize=12, fontweight="bold", pad=26 if figure.note else 10
    )
    if figure.note:
        note = _text(figure.note, 90)
        axes.text(0, 1.03, note, transform=axes.transAxes, color=_COLOUR["muted"], fontsize=8.5)
    _scale(axes, figure)
    for at, label in figure.rules:
        axes.axvline(at, color=_COLOUR["muted"], linewidth=0.8, linestyle=":")
        axes.annotate(_text(label), (at, 0.97), xycoords=("data", "axes fraction"), color=_COLOUR["muted"], fontsize=8)


def _legend(canvas: Canvas, axes: Axes, figure: Figure) -> None:
    """Below the axes, and the picture higher by as much: every run where runs are compared, else every mark."""
    handles = [
        Line2D([], [], color=_COLOUR[tone], marker=_MARKERS[palette.marker(run)], markersize=5, label=_text(label))
        for label, tone, run in figure.key
    ] or axes.get_legend_handles_labels()[0]
    if len(handles) < 2:
        return
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(3, _KEY_WIDTH // (longest + 6)))
    canvas.set_figheight(_HEIGHT + _KEY_HEIGHT * math.ceil(len(handles) / columns))
    canvas.legend(
        handles=handles,
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=8,
        labelcolor=_COLOUR["ink"],
    )


def _scale(axes: Axes, figure: Figure) -> None:
    """The same ranges and ticks as the SVG."""
    if figure.y.base:
        axes.set_yscale("log", base=figure.y.base)
        low, high = axes.get_ylim()
        found = log_ticks(low, high, figure.y.base)
    else:
        low, high = value_range(figure.ys(), figure.y.low, figure.y.high)
        axes.set_ylim(low, high)
        found = ticks(low, high)
    axes.yaxis.set_major_locator(FixedLocator(found))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks(found, tick_labels(found, figure.y.form, figure.y.base is not None))
    xs = figure.xs()
    if figure.x.base:
        axes.set_xscale("log", base=figure.x.base)
        places = log_ticks(min(xs), max(xs), figure.x.base)
    else:
        span = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 0.5, max(xs) + 0.5)
        places = ticks(*span, count=6, whole=figure.x.whole)
    if figure.x.high is not None:
        axes.set_xlim(right=figure.x.high)
        places = [place for place in places if place <= figure.x.high]
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(places, tick_labels(places, figure.x.form))


def _text(text: str, limit: int = 60) -> str:
    """Matplotlib drops a legend entry whose label begins with an underscore."""
    shown = words.printable(text, limit)
    return " " + shown if shown.startswith("_") else shown
