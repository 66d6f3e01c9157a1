"""Errors of a run whose settings are valid, and results of self-checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from eopd.storage.errors import UserError, installing


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


# -- outcomes of tasks ------------------------------------------------------------------------------------------------

# Outcomes of tasks, shared by workers, launchers and exit codes.


Kind = Literal["done", "failed", "refused", "full", "lost", "interrupted"]
"""refused: the input is at fault, and another attempt would end the same; full: no space left where it writes; lost:
the worker vanished (its node is gone, it was killed)."""

# refused: EX_DATAERR of sysexits.h; full: the number of ENOSPC
EXIT_CODES: dict[Kind, int] = {"done": 0, "failed": 1, "refused": 65, "full": 28, "interrupted": 130}


@dataclass(frozen=True)
class Outcome:
    """The end of a task."""

    kind: Kind
    message: str = ""  # for people
    fields: Mapping[str, Any] = field(default_factory=dict)  # of a ``UserError``: setting, file, line, remedy, ...

    def to_json(self) -> dict[str, Any]:
        return {"outcome": self.kind, "message": self.message, "fields": dict(self.fields)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Outcome:
        return cls(values["outcome"], values["message"], values.get("fields", {}))

    @classmethod
    def from_exit(cls, code: int, message: str) -> Outcome:
        """Return the outcome of a process that did not report one; a negative code is the signal that killed it."""
        kinds = {number: kind for kind, number in EXIT_CODES.items()}
        kind = "lost" if code < 0 else kinds.get(code, "failed")
        return cls("lost" if kind == "interrupted" else kind, message)
