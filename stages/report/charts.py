"""Drawing of a report's figures with matplotlib: lines with intervals, and histograms, as SVG.

Colours come from ``LIGHT``. On the page each is replaced by the CSS variable of its name, so that a figure follows the
reader's light or dark setting. Runs differ in colour and marker, teacher and student in dashes.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from eopd.stages.format import decimal, listed, printable
from eopd.stages.report.data import Estimate, Histogram

Form = Literal["number", "rate", "percent", "count"]
_COLOURS = """name light dark; c: series, h: steps of the rollouts' heat scale
paper #fbfaf7 #151513  card  #ffffff #1c1c19  ink #1f1e1b #efede7  muted #68645d #a8a49b  line #e5e1d8 #35332e
good  #1d6b4f #6cc7a0  bad   #a63a2b #f0907f
c0 #2b57b3 #8fb0f7  c1 #bf5312 #f29d62  c2 #16785a #62c6a0  c3 #84489e #cba1e4
c4 #8a6b00 #dcc057  c5 #b02c66 #f58cb7  c6 #2a7f9e #80c9e4  c7 #5b5852 #bab7b0
h0 #fffffe #1c1c1a  h1 #fdf3dd #2d2618  h2 #fbe4b8 #41311b  h3 #f8cf8d #583d1c
h4 #f3b366 #6b461b  h5 #eb9548 #804f1b  h6 #df7835 #985a1a"""
_PAIRS = re.findall(r"(\w+) +(#\w+) (#\w+)", _COLOURS)
LIGHT = {name: light for name, light, _ in _PAIRS}
DARK = {name: dark for name, _, dark in _PAIRS}
_NAME_OF = {colour: name for name, colour in LIGHT.items()}
_MARKERS = "osD^P"  # their number and that of the colours have no common factor: 40 runs before a look repeats
_MOST_POINTS = 120  # a longer curve is drawn as means over stretches, with their range
_MOST_MARKERS = 16
MOST_BANDS = 3
_WIDTH, _HEIGHT = 3.8, 1.9  # of a figure, of its axes; inches
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")
_SMALL: dict[str, Any] = {"fontsize": 7, "color": LIGHT["muted"]}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 8,
    "figure.facecolor": LIGHT["paper"],
    "axes.facecolor": LIGHT["paper"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.7,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "ytick.left": False,
    "text.color": LIGHT["ink"],
    "lines.linewidth": 1.4,
    "lines.markersize": 3.6,
}


@dataclass(frozen=True)
class Drawing:
    """A figure: ``svg`` is a whole file, ``inline`` the same for the page."""

    name: str
    label: str
    svg: str

    @property
    def inline(self) -> Markup:
        return _for_the_page(self.svg, self.label)


@dataclass(frozen=True)
class Curve:
    """A line; None is a gap. ``band``: draw intervals as an area instead of bars."""

    label: str
    points: Sequence[tuple[float, Estimate | None]]
    tone: int = 0
    dashed: bool = False
    band: bool = False

    @property
    def known(self) -> list[tuple[float, Estimate]]:
        return [(x, y) for x, y in self.points if y is not None and math.isfinite(y.value)]

    @property
    def constant(self) -> bool:
        values = [y.value for _, y in self.known]
        return max(values) - min(values) <= 1e-12 * max(1.0, abs(values[0]))


@dataclass(frozen=True)
class Axis:
    label: str = ""
    form: Form = "number"
    whole: bool = False
    doubling: bool = False
    rules: tuple[tuple[float, str], ...] = field(default_factory=tuple)  # vertical lines and their labels


def thin(values: Sequence[tuple[float, float | None]], ranges: bool) -> list[tuple[float, Estimate | None]]:
    """Reduce points to at most ``_MOST_POINTS``: means over stretches, with their ranges. Non-finite values are left
    out."""
    width = math.ceil(len(values) / _MOST_POINTS)
    points: list[tuple[float, Estimate | None]] = []
    for start in range(0, len(values), width or 1):
        stretch = values[start : start + width]
        known = [value for _, value in stretch if value is not None and math.isfinite(value)]
        bounds = (min(known), max(known)) if known and ranges and width > 1 else (None, None)
        points.append((stretch[len(stretch) // 2][0], Estimate(sum(known) / len(known), *bounds) if known else None))
    return points


@matplotlib.rc_context(_STYLE)
def draw_chart(
    name: str, title: str, note: str, curves: Sequence[Curve], axis: Axis, form: Form, legend: bool
) -> Drawing | None:
    """Draw lines with their intervals; None if there is no value."""
    shown = [curve for curve in curves if curve.known]
    if not shown:
        return None
    labels = [curve.label for curve in shown] if legend else []
    figure, axes = _canvas(title, note, labels)
    for curve in shown:
        _draw(axes, curve, form)
    drawn = [(y.value, *_whisker(curve, y, form)) for curve in shown for _, y in curve.known]
    axes.set_ylim(*_value_range(drawn, form))
    _set_form(axes, form)
    axes.set_xlabel(axis.label)
    xs = [x for curve in shown for x, _ in curve.known]
    if axis.doubling:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    elif axis.whole:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if min(xs) == max(xs):
            axes.set_xlim(xs[0] - 0.5, xs[0] + 0.5)
    _rules(axes, axis.rules)
    if labels:
        _legend(figure, [axes.plot([], [], **_look(curve, True))[0] for curve in shown], labels)
    ends = [(curve.label or title, curve.known[0][1].value, curve.known[-1][1].value) for curve in shown[:12]]
    texts = [f"{label} from {decimal(first)} to {decimal(last)}" for label, first, last in ends]
    return _drawing(figure, name, f"{title}. {'; '.join(texts)}, by {axis.label}")


def _draw(axes: Axes, curve: Curve, form: Form) -> None:
    marked = len(curve.known) <= _MOST_MARKERS
    look = _look(curve, marked)
    for shown, piece in itertools.groupby(
        curve.points, key=lambda point: point[1] is not None and point in curve.known
    ):
        if not shown:
            continue
        points = [(x, y) for x, y in piece if y is not None]
        xs, ys = [x for x, _ in points], [y.value for _, y in points]
        axes.plot(xs, ys, **{**look, **({"marker": "."} if len(points) == 1 and not marked else {})})
        bars = [(x, bounds) for x, y in points if (bounds := _whisker(curve, y, form))]
        if not bars:
            continue
        at, lows, highs = [x for x, _ in bars], [low for _, (low, _) in bars], [high for _, (_, high) in bars]
        if curve.band or not marked:
            axes.fill_between(at, lows, highs, color=look["color"], alpha=0.15, linewidth=0)
        else:
            axes.vlines(at, lows, highs, color=look["color"], alpha=0.5, linewidth=1.0)


def _whisker(curve: Curve, estimate: Estimate, form: Form) -> tuple[float, float] | tuple[()]:
    """Return the interval to draw: none if a constant sample made it, within 0 and 1 for a rate."""
    if estimate.bounds is None or not all(map(math.isfinite, estimate.bounds)):
        return ()
    low, high = estimate.bounds
    if form in ("rate", "percent"):
        low, high = max(low, 0.0), min(high, 1.0)
        if estimate.value in (0.0, 1.0):
            return ()
    return () if curve.constant and len(curve.known) > 1 else (low, high)


def _look(curve: Curve, marked: bool) -> dict[str, Any]:
    colour = LIGHT[f"c{curve.tone % 8}"]
    marker = _MARKERS[curve.tone % len(_MARKERS)]
    return {
        "color": colour,
        "linestyle": (0, (3.5, 2)) if curve.dashed else "-",
        "marker": marker if marked else None,
        "markerfacecolor": LIGHT["paper"] if curve.dashed else colour,
    }


@matplotlib.rc_context(_STYLE)
def draw_histogram(name: str, title: str, known: dict[str, Histogram], threshold: float | None, tone: int) -> Drawing:
    shares = {who: histogram.share_above(threshold) for who, histogram in known.items()}
    texts = [f"{who} {decimal(100 * share, '.1f')} %" for who, share in shares.items() if share is not None]
    note = f"above tau = {threshold:g}: {listed(texts)} of the tokens" if texts else "log scale"
    figure, axes = _canvas(title, note, list(known))
    smallest = 1.0
    for who, histogram in known.items():
        total = sum(histogram.counts)
        heights = [count / total for count in histogram.counts]
        smallest = min(smallest, *(height for height in heights if height))
        colour = LIGHT[f"c{tone % 8}"]
        if who == "teacher":
            axes.stairs(heights, histogram.edges, fill=True, color=colour, alpha=0.3, label=who)
        else:
            axes.stairs(heights, histogram.edges, color=colour, linestyle=(0, (3.5, 2)), label=who, baseline=None)
    axes.set_yscale("log")
    axes.set_ylim(10 ** math.floor(math.log10(smallest)), 1.3)
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.minorticks_off()
    edges = max((histogram.edges for histogram in known.values()), key=lambda each: each[-1])
    axes.set_xlabel("entropy, nats")
    if len(edges) > 2 and edges[-1] - edges[-2] > 4 * (edges[-2] - edges[-3]):  # an open last bin, not to scale
        axes.set_xlim(edges[0], edges[-2] + 4 * (edges[-2] - edges[-3]))
        axes.set_xlabel(f"entropy, nats (last bin: {edges[-2]:g} and more)")
    _rules(axes, gate_rules(threshold))
    _legend(figure, *axes.get_legend_handles_labels())
    return _drawing(figure, name, f"{title}, {note}")


@matplotlib.rc_context(_STYLE)
def draw_points(
    name: str,
    title: str,
    note: str,
    groups: Mapping[str, Sequence[tuple[Estimate, Estimate]]],
    axes_of: tuple[str, str],
) -> Drawing:
    """Draw points (x, y) with their intervals, a colour and marker for each group."""
    figure, axes = _canvas(title, note, list(groups))
    for tone, points in enumerate(groups.values()):
        colour, many = LIGHT[f"c{tone % 8}"], len(points) > _MOST_MARKERS
        xs, ys = ([point[place].value for point in points] for place in (0, 1))
        look: dict[str, Any] = {"color": colour, "marker": _MARKERS[tone % len(_MARKERS)], "linestyle": "none"}
        axes.plot(xs, ys, **look, markersize=2.0 if many else 4.0, alpha=0.5 if many else 1.0)
        for x, y in points:
            if y.bounds is not None:
                axes.vlines(x.value, *y.bounds, color=colour, alpha=0.5, linewidth=1.0)
            if x.bounds is not None:
                axes.hlines(y.value, *x.bounds, color=colour, alpha=0.5, linewidth=1.0)
    axes.set_xlabel(axes_of[0])
    axes.yaxis.set_major_locator(MaxNLocator(5))
    handles = [
        axes.plot([], [], color=LIGHT[f"c{tone % 8}"], marker=_MARKERS[tone % len(_MARKERS)], linestyle="none")[0]
        for tone in range(len(groups))
    ]
    _legend(figure, handles, list(groups))
    return _drawing(figure, name, f"{title}: {axes_of[1]} by {axes_of[0]}, of {listed(list(groups))}")


@matplotlib.rc_context(_STYLE)
def draw_heat_map(
    name: str,
    title: str,
    note: str,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
) -> Drawing:
    """Draw numbers in cells, the higher the darker; None is an empty cell."""
    figure, axes = _canvas(title, note)
    known = [value for row in values for value in row if value is not None]
    least, most = min(known, default=0.0), max(known, default=0.0)
    for place, row in enumerate(values):
        for column, value in enumerate(row):
            if value is None:
                continue
            step = round(6 * (value - least) / (most - least)) if most > least else 0
            axes.add_patch(Rectangle((column, place), 1, 1, facecolor=LIGHT[f"h{step}"], edgecolor=LIGHT["paper"]))
            axes.text(column + 0.5, place + 0.5, f"{value:+.2f}", ha="center", va="center", fontsize=7)
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    axes.set_xticks([column + 0.5 for column in range(len(columns))], columns)
    axes.set_yticks([place + 0.5 for place in range(len(rows))], rows)
    axes.grid(visible=False)
    return _drawing(figure, name, f"{title}: {note}")


def gate_rules(threshold: float | None) -> tuple[tuple[float, str], ...]:
    return () if threshold is None else ((threshold, f"tau = {threshold:g}"),)


def _rules(axes: Axes, rules: Iterable[tuple[float, str]]) -> None:
    low, high = axes.get_xlim()
    for at, label in rules:
        if low <= at <= high:
            axes.axvline(at, color=LIGHT["muted"], linewidth=0.7, linestyle=":")
            place: dict[str, Any] = {
                "textcoords": "offset points",
                "xytext": (3, -8),
                "color": LIGHT["muted"],
                "fontsize": 7,
            }
            axes.annotate(label, (at, 1.0), xycoords=("data", "axes fraction"), **place)


def _value_range(points: Sequence[tuple[float, ...]], form: Form) -> tuple[float, float]:
    """Return the axis range of values with their intervals: from zero unless all lie far from it, and wider than any
    interval.

    A rate stays within 0 and 1.
    """
    values = [value for point in points for value in point]
    least, most = min(values), max(values)
    air = max(0.12 * (most - least), max(max(point) - min(point) for point in points) - (most - least) / 2)
    if air <= 1e-12 * max(1.0, abs(most)):  # all are one value
        air = abs(most) or 1.0
    low, high = (0.0 if 0 <= least <= max(0.6 * most, air) else least - air), most + air
    return (max(low, 0.0), min(high, 1.02)) if form in ("rate", "percent") and most <= 1.0 else (low, high)


def _set_form(axes: Axes, form: Form) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if form == "percent":
        axes.yaxis.set_major_formatter(_PERCENT)
    elif form == "count":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _canvas(title: str, note: str, labels: Sequence[str] = ()) -> tuple[Figure, Axes]:
    """Create a figure with a heading and, for ``labels``, room for ``_legend`` below. Sizes are in inches."""
    titles, notes = textwrap.wrap(printable(title, 90), 46), textwrap.wrap(printable(note, 160), 66)
    head = 0.16 * len(titles) + 0.13 * len(notes) + 0.08
    foot = 0.42 + 0.15 * math.ceil(len(labels) / _columns(labels))
    height = head + _HEIGHT + foot
    figure = Figure(figsize=(_WIDTH, height))
    figure.text(0.01, 1.0, "\n".join(titles), fontsize=9, fontweight="bold", va="top")
    figure.text(0.01, 1 - 0.16 * len(titles) / height, "\n".join(notes), va="top", **_SMALL)
    return figure, figure.add_axes((0.54 / _WIDTH, foot / height, 1 - 0.62 / _WIDTH, _HEIGHT / height))


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    texts = [" " + printable(label, 44) for label in labels]  # a label that begins with _ would be left out
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 0), "borderaxespad": 0, "labelspacing": 0.2}
    figure.legend(handles, texts, ncols=_columns(labels), frameon=False, fontsize=7, **place)


def _columns(labels: Sequence[str]) -> int:
    longest = max(map(len, labels), default=0)
    return 1 if longest > 28 else 2 if longest > 16 else 3


def _drawing(figure: Figure, name: str, label: str) -> Drawing:
    return Drawing(name, printable(label, 600), svg_text(figure, name))


def svg_text(figure: Figure, salt: str, **options: Any) -> str:
    """Render a figure as deterministic SVG. ``salt`` keeps its ids apart from those of other figures in a page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a reader's browser has more fonts
        figure.savefig(buffer, format="svg", metadata={"Date": None}, **options)
    return buffer.getvalue()


def _for_the_page(svg: str, label: str) -> Markup:
    """Turn ``svg`` into an element of an HTML document: without prolog and unused ids, colours by name."""
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            plain = key.rpartition("}")[2]
            del element.attrib[key]
            if plain in ("d", "x", "y", "transform"):
                value = re.sub(r"(\.\d)\d+", r"\1", " ".join(value.split()))
            elif plain == "style":
                value = re.sub(r"font-family: [^;]*; ?", "", value)
                value = re.sub(r"#[0-9a-f]{6}", lambda match: _variable(match[0]), value)
            if not (plain == "id" and element.tag == "g"):
                element.set(plain, value)
        element.tail = None
        if not (element.text or "").strip():
            element.text = None
    del root.attrib["width"], root.attrib["height"]
    root.attrib.update({"class": "plot", "role": "img", "aria-label": label})
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _variable(colour: str) -> str:
    return f"var(--{_NAME_OF[colour]})" if colour in _NAME_OF else colour
