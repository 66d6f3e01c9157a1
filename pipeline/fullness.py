"""A full disk holds the run up: nothing new is started until there is room again."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from eopd.pipeline.runner import Runner

ROOM_BYTES = 1 << 20
"""So much more than there was when the disk was full is worth another try."""
TRY_EVERY_SECONDS = 600.0
"""A quota shows in no figure: now and then it is simply tried."""


class Pause:
    """Begins when a worker found no space; says so, and when there is some again."""

    def __init__(self, runner: Runner, message: str, poll_seconds: float) -> None:
        self._line = runner.progress.line
        self._folders = [folder for folder in (runner.store, runner.paths.folder) if folder.exists()]
        self._free = [free_bytes(folder) for folder in self._folders]
        self._poll, self._looked, self._began = poll_seconds, time.monotonic(), time.monotonic()
        told = "; ".join(
            f"{folder.resolve()} has {free:,} bytes free"
            for folder, free in zip(self._folders, self._free, strict=True)
        )
        self._line(
            f"paused: {message}\n  {told}. Free some space and the run goes on by itself; Ctrl-C ends it, and the same "
            "command goes on later."
        )

    def renew(self) -> None:
        """It was full again, with what was still at work meanwhile."""
        self._free = [free_bytes(folder) for folder in self._folders]

    def is_over(self) -> bool:
        """Whether there is more space than there was, or it is time to simply try. Cheap to ask at any time."""
        now = time.monotonic()
        if now - self._looked < self._poll:
            return False
        self._looked = now
        for folder, before in zip(self._folders, self._free, strict=True):
            free = free_bytes(folder)
            if free >= before + ROOM_BYTES:
                self._line(f"going on: {folder.resolve()} has {free:,} bytes free")
                return True
        return now - self._began >= TRY_EVERY_SECONDS


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free
