"""Axes: from data to nice ticks, and from data to pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from eopd.stages.report import words
from eopd.stages.report.words import Form


@dataclass(frozen=True)
class Scale:
    """Maps ``low .. high`` to ``start .. stop`` pixels, by logarithm when ``log``."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(item, self.low)) for item in (value, low, high))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def value_range(values: list[float], low: float | None = None, high: float | None = None) -> tuple[float, float]:
    """Range of a value axis with some air. It starts at zero unless the data lie far from it; ``low`` and ``high``
    are bounds the quantity cannot pass (a rate ends at 1).
    """
    least, most = min(values), max(values)
    span = most - least or abs(most) or 1.0
    bottom, top = least - 0.12 * span, most + 0.12 * span
    if least >= 0 and least <= 0.6 * most:
        bottom = 0.0
    if least == most == 0:
        bottom, top = 0.0, 1.0
    if low is not None:
        bottom = max(bottom, low)
    if high is not None:
        top = min(top, high)
    return (bottom, top) if top > bottom else (bottom, bottom + 1.0)


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About ``count`` round numbers (1, 2, 2.5 or 5 times a power of ten) within ``low .. high``."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    if whole:
        step = max(1.0, float(round(step)))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float, base: int) -> list[float]:
    first = math.ceil(math.log(low, base) - 1e-9)
    last = math.floor(math.log(high, base) + 1e-9)
    stride = max(1, math.ceil((last - first) / 5))
    return [float(base) ** power for power in range(first, last + 1, stride)]


def tick_labels(values: list[float], form: Form, log: bool = False) -> list[str]:
    """Labels with one common number of decimals, the fewest that tell the ticks apart; each its own when ``log``."""
    if not values:
        return []
    if log:
        return [label for value in values for label in tick_labels([value], form)]
    shown = [100 * value for value in values] if form == "percent" else values
    unit = " %" if form == "percent" else ""
    if max(abs(value) for value in shown) >= 1e4:
        return [words.short(value) + unit for value in shown]
    for decimals in range(8):
        if all(abs(round(value, decimals) - value) <= 1e-9 + 1e-6 * abs(value) for value in shown):
            break
    if decimals > 5:
        return [words.minus(f"{value:.1e}") + unit for value in shown]
    return [words.minus(f"{value:.{decimals}f}") + unit for value in shown]
