"""What a self-check says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "broken", "absent"]


@dataclass(frozen=True)
class Finding:
    """``broken``: no run without it. ``warning``: a run works, not as well. ``absent``: optional, and not there."""

    name: str
    state: State
    text: str
    remedy: str = ""
