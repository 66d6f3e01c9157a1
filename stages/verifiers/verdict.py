"""Verdicts of verifiers."""

from __future__ import annotations

from dataclasses import dataclass

UNREADABLE = "the reference answer cannot be read"
NO_ANSWER = "no answer found"
"""How the reason begins of a response in which a verifier finds no answer at all."""


@dataclass(frozen=True)
class Verdict:
    """Verdict on one response. ``form`` is equal for two correct responses with the same solution; ``reason`` says why
    one is wrong."""

    correct: bool
    form: str | None = None
    reason: str | None = None

    @property
    def readable(self) -> bool:
        """True if the verifier could read the reference answer: if not, nothing was judged."""
        return self.reason != UNREADABLE
