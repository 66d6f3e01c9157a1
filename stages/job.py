"""Types that every stage is given: a reference to a model, and progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ModelRef:
    """A causal LM in Hugging Face format: a local folder or a hub id.

    ``fingerprint`` covers weights, config and dtype; it is what keys are made of, never the path.
    """

    path: str
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    fingerprint: str = ""
    tokenizer: str | None = None

    @property
    def tokenizer_path(self) -> str:
        return self.tokenizer or self.path

    @property
    def tokenizer_revision(self) -> str | None:
        """``revision`` is of the model: a tokenizer of another place has none."""
        return self.revision if self.tokenizer is None else None


class Progress(Protocol):
    """Progress of long work, as shown to people."""

    def start(self, what: str, total: int, unit: str = "tokens") -> None:
        """Begin a bar of ``total`` units; 0: the total is not known yet."""

    def advance(self, n: int, **figures: float) -> None:
        """Advance the bar by ``n`` units; ``figures`` are shown beside it."""

    def expect(self, total: int, in_hand: int = 0) -> None:
        """Correct the total to an estimate; ``in_hand`` units of it are left until the next commit (0: not known)."""

    def line(self, text: str) -> None:
        """Print a line that stays."""

    def close(self) -> None:
        """End the bar."""


class NullProgress:
    """Progress that is not shown."""

    def start(self, what: str, total: int, unit: str = "tokens") -> None:
        pass

    def advance(self, n: int, **figures: float) -> None:
        pass

    def expect(self, total: int, in_hand: int = 0) -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass
