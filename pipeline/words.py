"""Quantities as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes, decimal: ``12.3 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(count: float) -> str:
    """A count with three digits: ``950``, ``12.3k``, ``4.56M``."""
    if count < 1000:
        return f"{count:.0f}"
    for unit in ("k", "M", "G"):
        count /= 1000
        if count < 1000:
            return f"{count:.3g}{unit}"
    return f"{count / 1000:.3g}T"


def duration(seconds: float) -> str:
    """Its two largest units: ``42 s``, ``4 min 10 s``, ``3 h 20 min``, ``12 d 4 h``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour} h"
    if hours:
        return f"{hours} h {minute} min"
    return f"{minutes} min {second} s" if minutes else f"{second} s"
