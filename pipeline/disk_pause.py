"""Pause on a full disk: no new task starts until there is space again."""

from __future__ import annotations

import time

from eopd.pipeline.run import Run
from eopd.storage.files import NO_INODES, Free, free_of

ROOM_BYTES = 1 << 20
"""So much more than there was when the disk was full is worth another try."""
ROOM_INODES = 32
"""The same if inodes were short. Elsewhere they say nothing: some file systems derive them from the free bytes."""
FIRST_TRY_SECONDS, LAST_TRY_SECONDS = 10.0, 600.0
"""Waits before a try at an unchanged disk, doubled from one pause to the next: a quota shows in no figure, and space
may have been freed between the failure and the first look at it."""


class DiskPause:
    """A pause that begins when a worker ran out of disk space; it reports its start and its end."""

    def __init__(self, run: Run, message: str, poll_seconds: float, before: int = 0) -> None:
        """
        Args:
            before: pauses since a task was last done.
        """
        self._wait = min(FIRST_TRY_SECONDS * 2.0**before, LAST_TRY_SECONDS)
        self._line = run.progress.line
        self._folders = [folder for folder in (run.store, run.paths.folder) if folder.exists()]
        self._poll, self._looked, self._began = poll_seconds, time.monotonic(), time.monotonic()
        self._by_inodes = False
        self.renew(message)
        free = "; ".join(f"{folder.resolve()} has {free_of(folder)}" for folder in self._folders)
        remedy = "Remove some files" if self._by_inodes else "Free some space"
        self._line(
            f"paused: {message}\n  {free}. {remedy} and the run goes on by itself (a quota, which these figures do not "
            f"show, is tried again in {self._wait:.0f} s); Ctrl-C ends it, and the same command goes on later."
        )

    def renew(self, message: str) -> None:
        """Record today's free space as insufficient: the disk was full again for tasks that were still running."""
        self._free = [free_of(folder) for folder in self._folders]
        few = any(free.inodes is not None and free.inodes < ROOM_INODES for free in self._free)
        self._by_inodes = self._by_inodes or few or NO_INODES in message

    def is_over(self) -> bool:
        """Return True if space was freed or the waiting time has passed. Cheap to call at any time."""
        now = time.monotonic()
        if now - self._looked < self._poll:
            return False
        self._looked = now
        for folder, before in zip(self._folders, self._free, strict=True):
            free = free_of(folder)
            if self._is_room(before, free):
                self._line(f"going on: {folder.resolve()} has {free}")
                return True
        return now - self._began >= self._wait

    def _is_room(self, before: Free, now: Free) -> bool:
        if now.bytes >= before.bytes + ROOM_BYTES:
            return True
        if not self._by_inodes or before.inodes is None:
            return False
        return now.inodes is None or now.inodes >= before.inodes + ROOM_INODES
