"""A figure as SVG, for the page and as a file of its own.

Colours are CSS classes (``s-c0``: stroke, ``f-c0``: fill), so that the page's theme reaches the drawing; a file of
its own carries a style sheet that follows the reader's light or dark setting. Nothing in it refers to anything outside.
"""

from __future__ import annotations

import math
import textwrap
from html import escape
from itertools import groupby

from eopd.stages.report import palette, words
from eopd.stages.report.figure import Figure, Line, Point, Steps, is_shown
from eopd.stages.report.scales import Scale, finite, log_ticks, tick_labels, ticks, value_range

WIDTH, HEIGHT = 380, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 14, 12, 40
_NAMES = 74  # room for names at the line ends
_MOST_WHISKERS = 16
_MOST_TIPS = 600  # points with a tooltip of their own, a figure
_CORNERS = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
    "triangle": [(0, -1.2), (1.15, 0.85), (-1.15, 0.85)],
    "plus": [
        *((-0.45, -1.25), (0.45, -1.25), (0.45, -0.45), (1.25, -0.45), (1.25, 0.45), (0.45, 0.45)),
        *((0.45, 1.25), (-0.45, 1.25), (-0.45, 0.45), (-1.25, 0.45), (-1.25, -0.45), (-0.45, -0.45)),
    ],
}


def inline(figure: Figure, ident: str) -> str:
    """SVG to stand in the page; title and note are the page's own text. ``ident``: a document-wide unique id."""
    label = escape(f"{figure.title}. {_describe(figure)}")
    return (
        f'<svg class="plot" id="{escape(ident)}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"<title>{escape(figure.title)}</title>{_body(figure)}</svg>"
    )


def standalone(figure: Figure) -> str:
    """A whole SVG file, with title, note and legend."""
    head, top = _heading(figure)
    height = HEIGHT + top
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{2 * WIDTH}" '
        f'height="{2 * height}" role="img" aria-label="{escape(_describe(figure))}">'
        f"<title>{escape(figure.title)}</title><style>{_file_style()}</style>"
        f'<rect width="{WIDTH}" height="{height}" class="paper"/>{head}'
        f'<g transform="translate(0 {top})">{_body(figure)}</g></svg>\n'
    )


def shape(run: int, x: float, y: float, classes: str, size: float = 3.4) -> str:
    """The marker of a run, in turn (``palette.MARKERS``)."""
    marker = palette.marker(run)
    if marker == "circle":
        return f'<circle class="{classes}" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    return f'<path class="{classes}" d="{_path([(x + size * dx, y + size * dy) for dx, dy in _CORNERS[marker]])}Z"/>'


def _body(figure: Figure) -> str:
    x, y = _scales(figure)
    tips = sum(len(mark.points) for mark in figure.marks if isinstance(mark, Line)) <= _MOST_TIPS
    parts = [_axes(figure, x, y), _rules(figure, x)]
    for mark in figure.marks:
        drawn = _steps(mark, x, y) if isinstance(mark, Steps) else _line(mark, figure, x, y, tips)
        parts.append(f'<g class="r{mark.run}">{drawn}</g>')
    if figure.named:
        parts.append(_names(figure, x, y))
    return "".join(parts)


def _scales(figure: Figure) -> tuple[Scale, Scale]:
    xs, ys = figure.xs(), figure.ys()
    assert ys, f"figure {figure.name} has nothing to draw"
    right = WIDTH - (_NAMES if figure.named else _RIGHT)
    low, high = min(xs), max(xs)
    if figure.x.high is not None:
        high = min(high, figure.x.high)
    if low == high:
        low, high = (low / 2, high * 2) if figure.x.base else (low - 0.5, high + 0.5)
    x = Scale(low, high, _LEFT + 6, right - 6, log=figure.x.base is not None)
    if figure.y.base:
        positive = [value for value in ys if value > 0] or [1.0]
        bottom = 10 ** math.floor(math.log10(min(positive)) - 1e-9)
        top = max(max(positive) * 1.3, bottom * 10)
        return x, Scale(bottom, top, HEIGHT - _BOTTOM, _TOP, log=True)
    bottom, top = value_range(ys, figure.y.low, figure.y.high)
    return x, Scale(bottom, top, HEIGHT - _BOTTOM, _TOP)


def _axes(figure: Figure, x: Scale, y: Scale) -> str:
    right = x.stop + 6
    values = log_ticks(y.low, y.high, figure.y.base) if figure.y.base else ticks(y.low, y.high)
    parts = []
    for value, label in zip(values, tick_labels(values, figure.y.form, figure.y.base is not None), strict=True):
        at = y(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{at + 3.6:.1f}" text-anchor="end">{label}</text>')
    base = HEIGHT - _BOTTOM
    parts.append(f'<path class="base" d="M{_LEFT} {base}H{right:.1f}"/>')
    for value, label in _x_ticks(figure, x):
        at = x(value)
        parts.append(f'<path class="base" d="M{at:.1f} {base}v4"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{base + 16}" text-anchor="middle">{label}</text>')
    middle = (_LEFT + right) / 2
    parts.append(
        f'<text class="name" x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(figure.x.label)}</text>'
    )
    return "".join(parts)


def _x_ticks(figure: Figure, x: Scale) -> list[tuple[float, str]]:
    if figure.x.base:
        values = log_ticks(x.low, x.high, figure.x.base)
    else:
        values = ticks(x.low, x.high, count=5, whole=figure.x.whole)
    return list(zip(values, tick_labels(values, figure.x.form), strict=True))


def _rules(figure: Figure, x: Scale) -> str:
    parts = []
    for at, label in figure.rules:
        if x.low <= at <= x.high:
            parts.append(f'<path class="rule" d="M{x(at):.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>')
            if not label:
                continue
            near_end = x(at) > x.stop - 60
            anchor, shift = ("end", -4) if near_end else ("start", 4)
            place = f'x="{x(at) + shift:.1f}" y="{_TOP + 9}" text-anchor="{anchor}"'
            parts.append(f'<text class="tick" {place}>{escape(label)}</text>')
    return "".join(parts)


def _line(line: Line, figure: Figure, x: Scale, y: Scale, tips: bool) -> str:
    parts = []
    dash = " dashed" if line.dashed else ""
    pieces = [list(piece) for shown, piece in groupby(line.points, key=is_shown) if shown]
    count = sum(map(len, pieces))
    marked = count <= _MOST_WHISKERS
    for piece in pieces:
        if line.band or not marked:
            parts.append(_band(line, piece, x, y))
        else:
            parts.extend(_whisker(line, point, x, y) for point in piece)
        corners = [(x(point.x), _height(y, point)) for point in piece]
        if len(corners) > 1:
            parts.append(f'<path class="s-{line.tone}{dash}" d="{_path(corners)}"/>')
        fill = "hollow" if line.hollow or line.dashed else f"f-{line.tone}"
        ends = corners[-1:] if len(piece) == 1 or (figure.key and piece is pieces[-1]) else []
        parts.extend(shape(line.run, *at, f"s-{line.tone} {fill} dot") for at in (corners if marked else ends))
        if tips:
            parts.extend(_tip(line, point, figure, x, y) for point in piece)
    return "".join(parts)


def _height(y: Scale, point: Point) -> float:
    assert point.y is not None
    return y(point.y)


def _tip(line: Line, point: Point, figure: Figure, x: Scale, y: Scale) -> str:
    spread = words.interval(*_spread(point), figure.y.form)
    at = words.number(point.x, "count" if figure.x.whole else "number")
    text = f"{line.label or figure.title}, {figure.x.label} {at}: {words.number(point.y, figure.y.form)}"
    text += f" ({spread})" if spread else ""
    return f'<circle class="hit" cx="{x(point.x):.1f}" cy="{_height(y, point):.1f}" r="8" data-t="{escape(text)}"/>'


def _spread(point: Point) -> tuple[float | None, float | None]:
    pair = (point.low, point.high)
    return pair if len(finite(pair)) == 2 else (None, None)


def _band(line: Line, piece: list[Point], x: Scale, y: Scale) -> str:
    spreads = [(x(point.x), *_spread(point)) for point in piece]
    known = [(at, low, high) for at, low, high in spreads if low is not None and high is not None]
    if len(known) < 2:
        return ""
    corners = [(at, y(high)) for at, _, high in known] + [(at, y(low)) for at, low, _ in reversed(known)]
    return f'<path class="f-{line.tone} band" d="{_path(corners)}Z"/>'


def _whisker(line: Line | Steps, point: Point, x: Scale, y: Scale) -> str:
    low, high = _spread(point)
    if low is None or high is None:
        return ""
    return f'<path class="s-{line.tone} whisker" d="M{x(point.x):.1f} {y(low):.1f}V{y(high):.1f}"/>'


def _steps(steps: Steps, x: Scale, y: Scale) -> str:
    parts = []
    bars = [*zip(steps.edges, steps.edges[1:], steps.heights, strict=False)]
    base = y.start
    for shown, group in groupby(bars, key=lambda bar: _has_height(bar[2], y.log)):
        if not shown:
            continue
        tops = [(low, high, y(height)) for low, high, height in group if height is not None]
        corners = [(x(at), top) for low, high, top in tops for at in (low, min(high, x.high))]
        around = [(corners[0][0], base), *corners, (corners[-1][0], base)]
        if steps.filled:
            parts.append(f'<path class="f-{steps.tone} area" d="{_path(around)}Z"/>')
        dash = " dashed" if steps.dashed else ""
        parts.append(f'<path class="s-{steps.tone}{dash} thin" d="{_path(around)}"/>')
    parts.extend(_whisker(steps, point, x, y) for point in steps.points(x.high) if is_shown(point))
    return "".join(parts)


def _has_height(height: float | None, log: bool) -> bool:
    return height is not None and math.isfinite(height) and (height > 0 or not log)


def _names(figure: Figure, x: Scale, y: Scale) -> str:
    """Each mark's label at its end, pushed apart so that none covers another."""
    ends: list[tuple[float, Line]] = []
    for mark in figure.marks:
        shown = [point for point in mark.points if is_shown(point)] if isinstance(mark, Line) else []
        if shown and isinstance(mark, Line):
            ends.append((_height(y, shown[-1]), mark))
    ends.sort(key=lambda end: end[0])
    places: list[float] = []
    for at, _ in ends:
        places.append(max(at, places[-1] + 13) if places else at)
    overflow = (places[-1] - (HEIGHT - _BOTTOM)) if places else 0
    if overflow > 0:
        places = [place - overflow for place in places]
    parts = []
    for place, (_, mark) in zip(places, ends, strict=True):
        label = escape(words.printable(mark.label, 12))
        parts.append(f'<text class="end t-{mark.tone}" x="{x.stop + 11:.1f}" y="{place + 4:.1f}">{label}</text>')
    return "".join(parts)


def _heading(figure: Figure) -> tuple[str, int]:
    """Title, note and legend of a file of its own, and the height they take."""
    parts = [f'<text class="title" x="14" y="24">{escape(figure.title)}</text>']
    top = 32
    for line in textwrap.wrap(words.printable(figure.note), 66):
        parts.append(f'<text class="tick" x="14" y="{top + 8}">{escape(line)}</text>')
        top += 16
    for label, tone, run in figure.key:
        parts.append(shape(run, 19, top + 6, f"s-{tone} f-{tone} dot"))
        parts.append(f'<text class="tick" x="30" y="{top + 10}">{escape(words.printable(label, 56))}</text>')
        top += 15
    return "".join(parts), top


def _describe(figure: Figure) -> str:
    """What a reader who cannot see the drawing is told; the whole numbers stand in the table below it."""
    said = []
    for mark in figure.marks[:12]:
        shown = [point for point in mark.points if is_shown(point)] if isinstance(mark, Line) else []
        if shown:
            first, last = (words.number(point.y, figure.y.form) for point in (shown[0], shown[-1]))
            said.append(f"{mark.label or figure.title} from {first} to {last}")
        elif isinstance(mark, Steps):
            said.append(f"{mark.label}, histogram")
    return "; ".join([*said, f"by {figure.x.label}"])


def _path(corners: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{at:.1f} {height:.1f}" for at, height in corners)


def _file_style() -> str:
    rules = [
        "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;font-size:11px}",
        ".title{font-size:14px;font-weight:600;fill:var(--ink)}.paper{fill:var(--paper)}",
        plot_style(),
        f":root{{{palette.css_variables(palette.LIGHT)}}}",
        f"@media(prefers-color-scheme:dark){{:root{{{palette.css_variables(palette.DARK)}}}}}",
    ]
    return "".join(rules)


def plot_style() -> str:
    """Style rules that both the page and the files use."""
    tones = "".join(
        f".s-{name}{{stroke:var(--{name})}}.f-{name}{{fill:var(--{name})}}.t-{name}{{fill:var(--{name})}}"
        for name in map(palette.tone, range(palette.SERIES))
    )
    return (
        "svg path,svg circle{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}"
        f"{tones}"
        "svg .grid{stroke:var(--line);stroke-width:1}svg .base{stroke:var(--muted);stroke-width:1;opacity:.6}"
        "svg .rule{stroke:var(--muted);stroke-width:1;stroke-dasharray:1 4;opacity:.7}svg .dashed{stroke-dasharray:5 4}"
        "svg .whisker{stroke-width:1.5;opacity:.55}svg .band{opacity:.14;stroke:none}svg .area{opacity:.16;stroke:none}"
        "svg .thin{stroke-width:1.6}svg .dot{stroke-width:1.6;stroke-dasharray:none}svg .hollow{fill:var(--paper)}"
        "svg .hit{fill:transparent;stroke:none}svg .tick,svg .name{fill:var(--muted)}svg .end{font-weight:600}"
    )
