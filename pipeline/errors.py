"""Errors of a run whose settings are valid, and results of self-checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


class RunError(ValueError):
    """A command needs something that a run does not hold, or tasks failed for good. The message names it and the
    remedy."""


# -- findings ---------------------------------------------------------------------------------------------------------

# Results of self-checks.


State = Literal["ok", "warning", "broken", "absent"]


@dataclass(frozen=True)
class Finding:
    """One result. ``broken``: no run works; ``warning``: a run works, but worse; ``absent``: optional and missing."""

    name: str
    state: State
    text: str
    remedy: str = ""
