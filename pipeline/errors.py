"""Errors of a run whose settings are valid, and results of self-checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eopd.storage.errors import UserError
from eopd.storage.extras import installing


class RunError(UserError, ValueError):
    """A command needs something that a run does not hold, or tasks failed for good."""


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


def not_looked_at(name: str, error: ImportError) -> Finding:
    """Report a check that was skipped because a package is missing or broken."""
    return Finding(name, "broken", f"not looked at: {error}", installing("train"))


def refused(name: str, error: UserError, remedy: str = "") -> Finding:
    """Report an error under ``name``, which need not name that setting again; ``remedy``: for one that has none."""
    setting = error.setting is not None and not name.startswith(error.setting)
    return Finding(name, "broken", error.text(setting=setting, remedy=False), error.remedy or remedy)
