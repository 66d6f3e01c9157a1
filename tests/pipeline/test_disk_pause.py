"""What a full disk lacks, and when a run that it holds up goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from eopd.pipeline import scheduler
from eopd.pipeline.scheduler import ROOM_BYTES, ROOM_INODES, DiskPause
from eopd.storage import files
from eopd.storage.errors import StoreFull
from eopd.storage.files import NO_INODES, Free, free_of, naming_full_disks
from tests.pipeline.plan_case import make_run

PLENTY = 1 << 40


@pytest.mark.parametrize(
    ("number", "free", "words"),
    [
        (errno.ENOSPC, Free(0, 9), "no space left while writing"),
        (errno.ENOSPC, Free(PLENTY, None), "no space left while writing"),
        (errno.ENOSPC, Free(PLENTY, 0), "no inodes left while writing"),
        (errno.EDQUOT, Free(PLENTY, 9), "quota exceeded while writing"),
        (errno.EFBIG, Free(PLENTY, 9), "ulimit -f"),
    ],
)
def test_what_is_short_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, free: Free, words: str
) -> None:
    monkeypatch.setattr(files, "free_of", lambda _: free)
    with pytest.raises(StoreFull, match=words), naming_full_disks(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "part"))


def test_free_space_of_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    free, there = free_of(tmp_path / "not" / "yet"), os.statvfs(tmp_path)
    assert free.bytes > 0
    assert (free.inodes is None) == (there.f_files == 0)


@pytest.mark.parametrize(
    ("message", "before", "now", "over"),
    [
        ("no space left", Free(5, 900), Free(5 + ROOM_BYTES, 900), True),
        ("no space left", Free(5, 900), Free(4 + ROOM_BYTES, 900), False),
        ("no space left", Free(5, 900), Free(5, 900 + ROOM_INODES), False),
        (NO_INODES, Free(PLENTY, 900), Free(PLENTY, 900 + ROOM_INODES), True),
        (NO_INODES, Free(PLENTY, 900), Free(PLENTY, 899 + ROOM_INODES), False),
        ("[Errno 28]", Free(PLENTY, 0), Free(PLENTY, ROOM_INODES), True),
        (NO_INODES, Free(PLENTY, 0), Free(PLENTY, None), True),
    ],
)
def test_a_pause_is_over_when_what_was_short_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str, before: Free, now: Free, over: bool
) -> None:
    runner = make_run(tmp_path)
    runner.store.mkdir()
    monkeypatch.setattr(scheduler, "free_of", lambda _: before)
    pause = DiskPause(runner, message, poll_seconds=0.0)
    assert not pause.is_over()
    monkeypatch.setattr(scheduler, "free_of", lambda _: now)
    assert pause.is_over() == over


def test_a_try_at_an_unchanged_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota shows in no figure: the waits of 10 s, 20 s, 40 s end by themselves, and the run says so."""
    run = make_run(tmp_path)
    run.store.mkdir()
    lines: list[str] = []
    monkeypatch.setattr(run.progress, "line", lines.append, raising=False)
    monkeypatch.setattr(scheduler, "free_of", lambda _: Free(5, 900))
    clock = [100.0]
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: clock[0])
    pause = DiskPause(run, "quota exceeded", poll_seconds=0.0, before=1)
    clock[0] += 19.0
    assert not pause.is_over()
    clock[0] += 1.0
    assert pause.is_over()
    assert lines[-1] == "going on: the disk is tried again after 20 s"
