"""Formatting of quantities and untrusted text for people, shared by the command line and the report."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_DIRECTION = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_COLOUR = re.compile("\x1b\\[[0-9;]*m")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff\ud800-\udfff]")


def size(count: float) -> str:
    """Format bytes in decimal units: ``12.3 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(count: float) -> str:
    """Format a count with three digits: ``950``, ``12.3k``, ``4.56M``."""
    if count < 1000:
        return f"{count:.0f}"
    for unit in ("k", "M", "G"):
        count /= 1000
        if count < 1000:
            return f"{count:.3g}{unit}"
    return f"{count / 1000:.3g}T"


def duration(seconds: float) -> str:
    """Format seconds in the two largest units: ``42 s``, ``4 min 10 s``, ``3 h 20 min``, ``12 d 4 h``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour} h"
    if hours:
        return f"{hours} h {minute} min"
    return f"{minutes} min {second} s" if minutes else f"{second} s"


def listed(items: Sequence[object]) -> str:
    """Join names: ``a``, ``a and b``, ``a, b and c``."""
    texts = [str(item) for item in items]
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]])) if texts else ""


def decimal(value: float | None, form: str = "#.3g", signed: bool = False) -> str:
    """Format ``value`` with a real minus sign and a format specification (default: three digits); a dash if it is not
    finite."""
    if value is None or not math.isfinite(value):
        return "–"
    form = ",.0f" if form == "#.3g" and abs(value) >= 999.5 else form
    text = format(value, ("+" if signed else "") + form).removesuffix(".")
    if not re.search("[1-9]", text):
        text = text.lstrip("+-")
    return text.replace("-", "−", 1) if text.startswith("-") else text


def printable(text: str, limit: int | None = None) -> str:
    """Make text safe for HTML, XML and a terminal, without escaping markup.

    Control characters become visible signs, direction overrides are spelled out, a lone surrogate becomes U+FFFD, and
    an ellipsis replaces what exceeds ``limit`` characters.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    text = _DIRECTION.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)
    return _CONTROL.sub(_sign, text)


def _sign(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "\ufffd"


def escaped(text: str, *, colours: bool = False) -> str:
    """Escape ``text`` for a terminal: control characters and direction overrides become visible.

    Names of files, messages and prompts may be anybody's. Line breaks and tabs stay.

    Args:
        colours: leave colours in.
    """
    if text.isprintable():
        return text
    if colours:
        shown = (escaped(piece) for piece in _COLOUR.split(text))
        kept = [*_COLOUR.findall(text), ""]
        return "".join(piece + colour for piece, colour in zip(shown, kept, strict=True))
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character.isprintable() or character in "\n\t":
        return character
    return character.encode("unicode_escape").decode()


def one_line(text: str) -> str:
    """Return ``text`` as one printable line."""
    return escaped(text.replace("\n", "\\n").replace("\t", "\\t"))


def excerpt(text: str, most: int = 400) -> str:
    """Return one printable line of a text, without its middle if it is longer than ``most`` characters."""
    half = most // 2
    short = text if len(text) <= most else f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return one_line(short)


def error_line(error: BaseException) -> str:
    """Return an error's message, or its type, as one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
