"""Results of self-checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "broken", "absent"]


@dataclass(frozen=True)
class Finding:
    """One result. ``broken``: no run works; ``warning``: a run works, but worse; ``absent``: optional and missing."""

    name: str
    state: State
    text: str
    remedy: str = ""
