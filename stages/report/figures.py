"""The figures of a report, drawn by matplotlib: one SVG each, for the page and as a file.

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from eopd.stages.format import decimal, listed, printable
from eopd.stages.report.data import FIRST, OWN, BinnedMeans, Estimate, Histogram, RoundData, RunData

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
_MOST_BANDS = 3
_MOST_FURTHER = 24
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
class Panel:
    """A quantity to draw: ``names`` are figures of a round or step, the second one dashed."""

    name: str
    title: str
    names: tuple[str, ...]
    form: Form = "number"
    note: str = ""


@dataclass(frozen=True)
class Axis:
    label: str = ""
    form: Form = "number"
    whole: bool = False
    doubling: bool = False
    rules: tuple[tuple[float, str], ...] = field(default_factory=tuple)  # vertical lines and their labels


_ENTROPY = ("student_entropy", "teacher_entropy")
ROUND_PANELS = (
    Panel("entropy", "Entropy", _ENTROPY, note="nats a token"),
    Panel("gate-fraction", "Gate fraction", ("gate_fraction",), "percent", "tokens whose teacher entropy exceeds tau"),
    Panel("rkl", "Reverse KL", ("rkl",), note="student to teacher, nats a token"),
    Panel("fkl", "Forward KL", ("fkl",), note="teacher to student, nats a token"),
    Panel("signal", "Right from wrong", ("signal",), "rate", "AUC of the teacher's summed log-ratio; 0.5: no signal"),
    Panel("distinct-correct", "Distinct correct solutions", ("distinct_correct",), note="a problem"),
    Panel("self-bleu", "Self-BLEU", ("self_bleu",), "rate", "likeness of a problem's samples; 1: all equal"),
    Panel("distinct-4", "Distinct 4-grams", ("distinct_4",), "rate", "share among all of a problem's samples"),
    Panel("token-entropy", "Sampled entropy", ("token_entropy",), note="nats a token, of the evaluation's samples"),
    Panel("response-length", "Response length", ("response_length",), note="mean tokens a response"),
    Panel("truncation", "Truncated responses", ("truncation_rate",), "percent", "cut at the length limit"),
    Panel("tokens", "Training tokens", ("tokens",), "count", "response tokens of the round"),
)
STEP_PANELS = (
    Panel("step-loss", "Loss", ("loss",)),
    Panel("step-rkl", "Reverse KL", ("rkl",), note="nats a token"),
    Panel("step-fkl", "Forward KL", ("fkl",), note="nats a token"),
    Panel("step-gate-fraction", "Gate fraction", ("gate_fraction",), "percent"),
    Panel("step-entropy", "Entropy", _ENTROPY, note="nats a token"),
    Panel("step-retained-mass", "Retained mass", ("retained_mass",), "percent", "teacher probability in the head"),
    Panel("step-grad-norm", "Gradient norm", ("grad_norm",)),
    Panel("step-tokens-per-s", "Training speed", ("tokens_per_s",), "count", "tokens a second"),
)
BIN_TITLES = {
    "fkl": ("Forward KL", "number"),
    "rkl": ("Reverse KL", "number"),
    "agreement": ("Top-1 agreement", "percent"),
    "student_entropy": ("Student entropy", "number"),
    "share": ("Share of tokens", "percent"),
}
SAMPLES = {OWN: "own samples", FIRST: "the first student's samples"}


def quality(runs: Sequence[RunData]) -> list[Drawing]:
    """Draw Avg@k and Pass@k by round, and Pass@k over k after the first and the last evaluation."""
    evaluated = [item for run in runs for item in run.evaluated]
    if not evaluated:
        return []
    samples = sorted({item.samples for item in evaluated})
    name = f"Avg@{samples[0]}" if len(samples) == 1 else "Avg@k"
    note = "share of right samples" + ("" if len(samples) == 1 else f"; {listed(samples)} samples a problem")
    drawn = [_by_round(runs, Panel("avg-at-k", name, ("avg",), "rate", note))]
    k = shared_k(runs)
    if k:
        curves = [
            Curve(run.name, [(item.round, item.pass_at.get(k)) for item in run.evaluated], index)
            for index, run in enumerate(runs)
        ]
        note = f"share of problems solved in {k} samples"
        drawn.append(_chart("pass-at-k", f"Pass@{k}", note, curves, Axis("round", whole=True), "rate", len(runs) > 1))
    curves = []
    for index, run in enumerate(runs):
        ends = [item for item in run.evaluated if len(item.pass_at) > 1]
        for item in ends[:1] * (len(ends) > 1 and len(runs) <= _MOST_BANDS) + ends[-1:]:
            label = f"round {item.round}" if len(runs) == 1 else f"{run.name}, round {item.round}"
            curves.append(Curve(label, sorted(item.pass_at.items()), index, dashed=item is not ends[-1]))
    drawn.append(_chart("pass-over-k", "Pass@k over k", "", curves, Axis("k", doubling=True), "rate", True))
    return [drawing for drawing in drawn if drawing]


def shared_k(runs: Sequence[RunData]) -> int | None:
    """Return the largest k at which all evaluated runs have Pass@k."""
    known = [set().union(*(item.pass_at for item in run.evaluated)) for run in runs if run.evaluated]
    return max(set.intersection(*known), default=None) if known else None


def by_round(runs: Sequence[RunData], panels: Sequence[Panel] = ROUND_PANELS) -> list[Drawing]:
    return [drawing for panel in panels if (drawing := _by_round(runs, panel))]


def against_teacher(runs: Sequence[RunData]) -> list[Drawing]:
    """Draw teacher and student on an evaluation's samples, by round, one figure for each kind of samples."""
    taus = sorted({tau for run in runs if (tau := run.read_with.get("evaluate.alignment.tau"))})
    above = f"entropy above {listed(taus)} nats"
    panels = []
    for prefix, whose in (("", OWN), ("first_", FIRST)):
        held_out, of = f"{prefix}held_out_", SAMPLES[whose]
        for name, title, names, form, note in (
            ("uncertain-fkl", "Forward KL, uncertain tokens", ("uncertain_fkl",), "number", f"teacher {above}"),
            ("held-out-fkl", "Forward KL", ("fkl",), "number", "nats a token"),
            ("held-out-rkl", "Reverse KL", ("rkl",), "number", "nats a token"),
            ("agreement", "Top-1 agreement", ("agreement",), "percent", "same most probable token"),
            ("above-threshold", "Uncertain tokens", ("student_above", "teacher_above"), "percent", above),
            ("held-out-entropy", "Entropy", ("entropy", "teacher_entropy"), "number", "nats a token"),
        ):
            figures = tuple(held_out + figure for figure in names)
            panels.append(Panel(prefix.replace("_", "-") + name, title, figures, form, f"{of} · {note}"))  # type: ignore[arg-type]
    return by_round(runs, panels)


def by_step(runs: Sequence[RunData]) -> tuple[list[Drawing], list[Drawing]]:
    """Draw figures of every optimizer step: the usual ones, and any others that the objective reported."""
    usual = {name for panel in STEP_PANELS for name in panel.names}
    names = sorted({name for run in runs for row in run.training for name in row.figures} - usual)[:_MOST_FURTHER]
    further = [Panel(f"step-further-{i}", printable(name, 40), (name,)) for i, name in enumerate(names)]
    drawn = [[drawing for one in group if (drawing := _by_step(runs, one))] for group in (STEP_PANELS, further)]
    return drawn[0], drawn[1]


def histograms(runs: Sequence[RunData]) -> list[Drawing]:
    """Draw one histogram per run of the entropies of teacher (area) and student (dashed outline)."""
    drawn = []
    for index, run in enumerate(runs):
        both = {"teacher": run.teacher_entropy, "student": run.student_entropy}
        known = {name: histogram for name, histogram in both.items() if histogram and sum(histogram.counts)}
        if known:
            title = "Token entropy" if len(runs) == 1 else f"Token entropy, {run.name}"
            drawn.append(_histogram(f"entropy-histogram-{index}", title, known, run.threshold, index))
    return drawn


def by_entropy_bin(runs: Sequence[RunData]) -> list[Drawing]:
    """Draw means by bin of teacher entropy, one figure for each kind of samples."""
    thresholds = {run.threshold for run in runs}
    rules = _gate(thresholds.pop()) if len(thresholds) == 1 else ()
    drawn = []
    for whose, (name, (title, form)) in itertools.product(SAMPLES, BIN_TITLES.items()):
        curves = [
            Curve(run.name, _middles(run.bins[whose][name]), index)
            for index, run in enumerate(runs)
            if name in run.bins.get(whose, {})
        ]
        file = f"{'first-' if whose == FIRST else ''}{name.replace('_', '-')}-by-entropy"
        axis = Axis("teacher entropy, nats", rules=rules)
        drawn.append(_chart(file, f"{title} by teacher entropy", SAMPLES[whose], curves, axis, form, len(runs) > 1))  # type: ignore[arg-type]
    return [drawing for drawing in drawn if drawing]


def _middles(binned: BinnedMeans) -> list[tuple[float, Estimate | None]]:
    return [
        ((low + high) / 2, mean)
        for (low, high), mean in zip(itertools.pairwise(binned.edges), binned.means, strict=True)
    ]


def _by_round(runs: Sequence[RunData], panel: Panel) -> Drawing | None:
    def points(run: RunData, name: str) -> list[tuple[float, Estimate | None]]:
        """Return points of a curve: a gap for a missing figure, nothing for students that were not to be measured."""
        shown: Iterable[RoundData] = [item for item in run.rounds if item.measured or name in item.figures]
        return [(item.round, item.figures.get(name)) for item in shown]

    curves = [
        _curve(runs, index, panel, name, points(run, name)) for index, run in enumerate(runs) for name in panel.names
    ]
    axis = Axis("round", whole=True)
    return _chart(panel.name, panel.title, panel.note, curves, axis, panel.form, len(runs) + len(panel.names) > 2)


def _by_step(runs: Sequence[RunData], panel: Panel) -> Drawing | None:
    curves = []
    for index, run in enumerate(runs):
        steps = [row.step for row in run.training]
        rising = all(later > step for step, later in itertools.pairwise(steps))
        xs = steps if rising else list(range(1, len(steps) + 1))
        for name in panel.names:
            values = [(x, row.figures.get(name)) for x, row in zip(xs, run.training, strict=True)]
            curves.append(_curve(runs, index, panel, name, _thin(values, len(runs) <= _MOST_BANDS), band=True))
    rules: list[tuple[float, str]] = []
    if len(runs) == 1:
        rounds = [row.round for row in runs[0].training]
        rules = [(x, "") for x, (before, now) in zip(xs[1:], itertools.pairwise(rounds), strict=True) if now != before]
    axis = Axis("optimizer step", whole=True, rules=tuple(rules) if len(rules) <= 16 else ())
    return _chart(panel.name, panel.title, panel.note, curves, axis, panel.form, len(runs) + len(panel.names) > 2)


def _curve(
    runs: Sequence[RunData],
    index: int,
    panel: Panel,
    name: str,
    points: Sequence[tuple[float, Estimate | None]],
    band: bool = False,
) -> Curve:
    """Build a curve: with one run, colours tell student from teacher; with several they tell runs."""
    second = name != panel.names[0]
    role = ("teacher" if second else "student") if len(panel.names) > 1 else ""
    label = role if len(runs) == 1 else f"{runs[index].name} ({role})" if role else runs[index].name
    return Curve(label, points, int(second) if len(runs) == 1 else index, second, band)


def _thin(values: Sequence[tuple[float, float | None]], ranges: bool) -> list[tuple[float, Estimate | None]]:
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
def _chart(
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
def _histogram(name: str, title: str, known: dict[str, Histogram], threshold: float | None, tone: int) -> Drawing:
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
    _rules(axes, _gate(threshold))
    _legend(figure, *axes.get_legend_handles_labels())
    return _drawing(figure, name, f"{title}, {note}")


def _gate(threshold: float | None) -> tuple[tuple[float, str], ...]:
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
