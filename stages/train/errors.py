"""What stops training."""

from __future__ import annotations

from collections.abc import Sequence


class TrainingStopped(RuntimeError):
    """Training cannot go on: the message says where and why. Nothing committed is lost."""

    def __init__(self, message: str, *, step: int | None = None, responses: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.step = step
        self.responses = tuple(responses)
