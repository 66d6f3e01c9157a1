"""A figure as plain data. ``plots`` draws it as SVG, ``raster`` as PNG, and ``rows`` gives the table behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eopd.stages.report import words
from eopd.stages.report.scales import finite
from eopd.stages.report.words import Form

MOST_POINTS = 120  # a line longer than this is shown as bin means with the range of each bin
MOST_ROWS = 60  # rows of a table behind a figure


@dataclass(frozen=True)
class Point:
    """``y`` None: nothing was measured there, and the line has a gap. ``low`` and ``high``: interval or range."""

    x: float
    y: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """``run`` decides marker and visibility switch; ``band``: draw low and high as an area, else as whiskers."""

    label: str
    points: tuple[Point, ...]
    tone: str
    run: int = 0
    dashed: bool = False
    hollow: bool = False
    band: bool = False


@dataclass(frozen=True)
class Steps:
    """A histogram outline: ``heights[i]`` between ``edges[i]`` and ``edges[i + 1]``; None leaves a gap.

    ``bounds``: the interval of each height, or none of any.
    """

    label: str
    edges: tuple[float, ...]
    heights: tuple[float | None, ...]
    tone: str
    run: int = 0
    dashed: bool = False
    filled: bool = False
    bounds: tuple[tuple[float, float] | None, ...] = ()

    def points(self, end: float = math.inf) -> tuple[Point, ...]:
        """One in the middle of each bin, a bin that passes ``end`` cut off there."""
        sides = zip(self.edges, self.edges[1:], strict=False)
        middles = [(low + min(high, end)) / 2 for low, high in sides]
        bounds = self.bounds or (None,) * len(middles)
        found = zip(middles, self.heights, bounds, strict=True)
        return tuple(Point(at, height, *(pair or (None, None))) for at, height, pair in found)


@dataclass(frozen=True)
class Axis:
    """``base``: logarithmic, with ticks at its powers. ``low`` and ``high`` bound what is drawn, not the table."""

    label: str
    form: Form = "number"
    base: int | None = None
    whole: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Figure:
    """``name`` is the file name; ``rules`` are vertical lines (x, label); ``named``: write each mark's label at its
    end; ``key`` lists (label, tone, run) for files that stand without the page.
    """

    name: str
    title: str
    note: str
    x: Axis
    y: Axis
    marks: tuple[Line | Steps, ...]
    rules: tuple[tuple[float, str], ...] = ()
    named: bool = False
    key: tuple[tuple[str, str, int], ...] = ()

    def xs(self) -> list[float]:
        return finite(x for mark in self.marks for x in positions(mark))

    def ys(self) -> list[float]:
        return finite(y for mark in self.marks for y in heights(mark))


@dataclass(frozen=True)
class Rows:
    """A table as text; ``left_out`` counts rows that were thinned away."""

    head: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    left_out: int = 0


def positions(mark: Line | Steps) -> list[float]:
    return list(mark.edges) if isinstance(mark, Steps) else [point.x for point in mark.points if is_shown(point)]


def heights(mark: Line | Steps) -> list[float | None]:
    points = mark.points() if isinstance(mark, Steps) else mark.points
    return [value for point in points if is_shown(point) for value in (point.y, point.low, point.high)]


def is_shown(point: Point) -> bool:
    return point.y is not None and math.isfinite(point.y)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> tuple[Point, ...]:
    """At most ``most`` points: consecutive ones are averaged, ``low`` and ``high`` become the range of what was
    averaged. Missing and non-finite values take no part; a bin of only such values stays a gap.
    """
    if len(points) <= most:
        return tuple(points)
    width = math.ceil(len(points) / most)
    thinned = []
    for start in range(0, len(points), width):
        chunk = points[start : start + width]
        values = finite(point.y for point in chunk)
        middle = chunk[len(chunk) // 2].x
        mean = sum(values) / len(values) if values else None
        thinned.append(Point(middle, mean, min(values, default=None), max(values, default=None)))
    return tuple(thinned)


def rows(figure: Figure) -> Rows:
    """The numbers behind a figure: a row per x, a column per mark; intervals in brackets."""
    if figure.marks and isinstance(figure.marks[0], Steps):
        return _step_rows(figure)
    lines = [mark for mark in figure.marks if isinstance(mark, Line)]
    columns = [{point.x: point for point in line.points} for line in lines]
    xs = sorted({x for column in columns for x in column})
    stride = math.ceil(len(xs) / MOST_ROWS) or 1
    body = tuple(
        (
            words.number(x, "count" if figure.x.whole else "number"),
            *(_cell(column.get(x), figure) for column in columns),
        )
        for x in xs[::stride]
    )
    return Rows((figure.x.label, *_labels(figure)), body, len(xs) - len(body))


def _labels(figure: Figure) -> list[str]:
    return [mark.label or figure.y.label or figure.title for mark in figure.marks]


def _cell(point: Point | None, figure: Figure) -> str:
    if point is None:
        return words.MISSING
    text = words.number(point.y, figure.y.form)
    spread = words.interval(point.low, point.high, figure.y.form)
    return f"{text} ({spread})" if spread and point.y is not None else text


def _step_rows(figure: Figure) -> Rows:
    steps = [mark for mark in figure.marks if isinstance(mark, Steps)]
    bins = sorted({pair for mark in steps for pair in zip(mark.edges, mark.edges[1:], strict=False)})
    columns = [dict(zip(zip(mark.edges, mark.edges[1:], strict=False), mark.points(), strict=True)) for mark in steps]
    stride = math.ceil(len(bins) / MOST_ROWS) or 1
    body = tuple(
        (
            f"{words.number(low)} to {words.number(high)}",
            *(_cell(column.get((low, high)), figure) for column in columns),
        )
        for low, high in bins[::stride]
    )
    return Rows((figure.x.label, *_labels(figure)), body, len(bins) - len(body))
