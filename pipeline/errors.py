"""Errors of a run whose settings are valid."""

from __future__ import annotations


class RunError(ValueError):
    """A command needs something that a run does not hold, or tasks failed for good. The message names it and the
    remedy."""
