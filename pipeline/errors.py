"""What can go wrong with a run whose settings are sound."""

from __future__ import annotations


class RunError(ValueError):
    """A command asks for what a run does not hold, or tasks failed for good. The message says which, and what to do."""
