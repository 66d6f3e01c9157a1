"""Numbers and foreign text as people read them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal

Form = Literal["number", "rate", "percent", "count"]
MISSING = "not measured"
NOT_FINITE = "not finite"
_BIDI = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff\ud800-\udfff]")


def printable(text: str, limit: int | None = None) -> str:
    """Text that can stand in HTML and XML: controls become visible signs, direction overrides are spelled out, a
    lone surrogate becomes U+FFFD, and anything past ``limit`` characters an ellipsis. It is not escaped here.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    text = _BIDI.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)
    return _CONTROL.sub(_sign, text)


def number(value: float | None, form: Form = "number") -> str:
    """``rate`` in three decimals, ``percent`` in one, ``count`` with a thousands sign, ``number`` in three digits."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return NOT_FINITE
    if form == "percent":
        return minus(f"{100 * value:.1f} %")
    if form == "rate":
        return minus(f"{value:.3f}")
    if form == "count":
        return short(value) if abs(value) >= 1e5 else minus(f"{value:,.0f}".replace(",", "\u202f"))
    return significant(value)


def significant(value: float, digits: int = 3) -> str:
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size >= 5:
        return short(value)
    if size < -4:
        return minus(f"{value:.{digits - 1}e}")
    return minus(f"{value:.{max(digits - 1 - size, 0)}f}")


def short(value: float) -> str:
    """1.2k, 3.4M, 5G."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return minus(f"{value / size:.3g}{unit}")
    return minus(f"{value:.3g}")


def change(value: float, form: Form = "rate") -> str:
    """A difference, always with its sign."""
    text = number(abs(value), form)
    if not math.isfinite(value) or not re.search("[1-9]", text):
        return text
    return ("+" if value > 0 else "−") + text


def interval(low: float | None, high: float | None, form: Form = "rate") -> str:
    if low is None or high is None:
        return ""
    return f"{number(low, form)} to {number(high, form)}" if low < 0 else f"{number(low, form)}–{number(high, form)}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if not math.isfinite(seconds):
        return NOT_FINITE
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def size(count: float | None) -> str:
    if count is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def joined(items: list[str]) -> str:
    """a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def by_whom(found: Iterable[tuple[str, str]]) -> str:
    """Of (name, what is said of it): 1 in a and b and 2 in c. Empty where the same is said of all."""
    whose: dict[str, list[str]] = {}
    for name, said in found:
        whose.setdefault(said, []).append(name)
    if len(whose) < 2:
        return ""
    return joined([f"{printable(said, 120)} in {joined(names)}" for said, names in whose.items()])


def minus(text: str) -> str:
    """A typographic minus sign for the ASCII one at the front."""
    return "−" + text[1:] if text.startswith("-") else text


def _sign(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "\ufffd"
