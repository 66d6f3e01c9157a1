"""Errors that stop training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eopd.storage.errors import UserError


class TrainingStopped(UserError, RuntimeError):
    """Training cannot continue: the message says where and why. Nothing committed is lost.

    ``figures``: numbers of a step that broke, for its reproduction; ``folder``: where that was saved.
    """

    def __init__(
        self,
        problem: str,
        *,
        remedy: str = "",
        setting: str | None = None,
        step: int | None = None,
        responses: Sequence[str] = (),
        figures: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__(problem, remedy=remedy, setting=setting)
        self.step = step
        self.responses = tuple(responses)
        self.figures = figures
        self.folder = folder
