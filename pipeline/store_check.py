"""Checks that a store is writable and that its file system supports commits, in a temporary folder."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from eopd.pipeline.config import ConfigError, RunSettings
from eopd.pipeline.errors import Finding
from eopd.stages.format import one_line, size
from eopd.storage.errors import NoHardLinks, StoreError
from eopd.storage.files import NEEDS_LINKS, create_exclusively, existing, fsync_folder

LITTLE_SPACE = 5 << 30
NO_SPACE = 100 << 20


def check_store(store: Path) -> Iterator[Finding]:
    """Check space, permissions, exclusive creation and locks at ``store``, or at its nearest existing parent."""
    reason = why_no_folder(store)
    if reason is not None:
        yield Finding("store", "broken", f"{store} cannot be a folder: {reason}", "set store: to another folder")
        return
    place = existing(store)
    yield _space(place)
    trial = place / f".doctor-{secrets.token_hex(8)}"
    try:
        trial.mkdir()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            yield Finding("store", "broken", f"no space left in {place}", "free space, or set store: to another disk")
        else:
            remedy = "have its owner give you write permission (chmod, chgrp), or set store: to a folder of yours"
            yield Finding("store", "broken", f"{place} cannot be written: {error.strerror}", remedy)
        return
    try:
        yield _commits(trial, store if store.exists() else place)
        yield _locks(trial)
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def check_folders(settings: RunSettings) -> None:
    """Raise ConfigError if `store` or `runs` is not a folder and cannot become one.

    One that is there may be read-only: a plan only looks at it.
    """
    for name in ("store", "runs"):
        path = Path(getattr(settings, name))
        reason = why_no_folder(path)
        if reason is not None:
            raise ConfigError(f"{name}: {path} cannot be a folder: {reason}", setting=name, file=path)


def check_runs_folder(runs: Path) -> list[Finding]:
    """Return a finding if `runs` is not a folder and cannot become one."""
    reason = why_no_folder(runs)
    text = f"{runs} cannot be a folder: {reason}"
    return [] if reason is None else [Finding("runs", "broken", text, "set runs: to another folder")]


def why_no_folder(path: Path) -> str | None:
    """Return why ``path`` cannot be a folder; None if it is one or no obstacle is known.

    Nothing is left behind, and only file systems that keep no files, such as /proc, are written to.
    """
    try:
        above = existing(path)
        if not above.is_dir():
            return f"{above} is a file"
        if above == path.resolve():
            return None
        system = os.statvfs(above)
        if system.f_flag & os.ST_RDONLY:
            return f"{above} cannot be written: {os.strerror(errno.EROFS)}"
        if not os.access(above, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            return f"{above} cannot be written: {os.strerror(errno.EACCES)}"
    except (OSError, RuntimeError) as error:  # a name that is too long, a loop of links
        return one_line(str(error))
    return None if system.f_blocks else _why_nothing_is_made(above)


def _why_nothing_is_made(folder: Path) -> str | None:
    """Explain why a file system without a size takes no files: /proc refuses them; a tmpfs without limit works."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"nothing can be made in {folder}: {error.strerror}"


def _space(place: Path) -> Finding:
    free = shutil.disk_usage(place).free
    text = f"{size(free)} free at {place}"
    if free < NO_SPACE:
        return Finding("disk", "broken", text, "free space, or set store: to another disk")
    remedy = "`eopd plan CONFIG` shows what a run needs at its peak" if free < LITTLE_SPACE else ""
    return Finding("disk", "warning" if remedy else "ok", text, remedy)


def _commits(trial: Path, store: Path) -> Finding:
    """Check exclusive creation by link(2), on which commits rest."""
    marker = trial / "part-00000.json"
    try:
        first, second = create_exclusively(marker, "first"), create_exclusively(marker, "second")
        text = marker.read_text(encoding="utf-8")
        fsync_folder(trial)
    except NoHardLinks as error:
        return Finding("store", "broken", f"no hard links in {store}: {error.__cause__}", NEEDS_LINKS)
    except (OSError, StoreError) as error:
        return Finding("store", "broken", f"a commit failed in {store}: {error}", "free space, or choose another disk")
    if (first, second, text) != (True, False, "first"):
        remedy = "two workers could overwrite each other there: set store: to another file system"
        return Finding("store", "broken", f"creating a file in {store} is not exclusive", remedy)
    return Finding("store", "ok", f"{store} can be written; commits are exclusive")


def _locks(trial: Path) -> Finding:
    """Check locks, on which claims rest. Without them results are right, but work may be done twice."""
    handles = [os.open(trial / "part-00000.claim", os.O_RDWR | os.O_CREAT) for _ in range(2)]
    try:
        fcntl.flock(handles[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(handles[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Finding("claims", "ok", "locks work: no two workers take one part")
        problem = "a lock there holds nobody off"
    except OSError as error:
        problem = f"no locks there: {error.strerror}"
    finally:
        for handle in handles:
            os.close(handle)
    return Finding(
        "claims", "warning", problem, "parts may be done twice, harmlessly; mount with locks (Lustre: -o flock)"
    )
