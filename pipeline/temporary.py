"""One folder for all temporary files of a run; if the run is killed, the next run removes it.

Killed processes leave files of libraries behind (vLLM's `vllm_dist_*`, sockets, folders of multiprocessing). TMPDIR
directs them, and those of child processes, into one folder ``eopd-*``. Every process that uses the folder holds a
kernel lock on a file in it, so a folder whose lock is free is unused.
"""

from __future__ import annotations

import fcntl
import getpass
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "eopd-"
LOCK = "in-use"
TORCH_CACHE = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Direct temporary files to a folder that is removed at the end, and remove folders of killed runs.

    A process that another one of ours started works in that one's folder.
    """
    base = Path(tempfile.gettempdir())
    handle = _join(base) if base.name.startswith(PREFIX) else None
    if handle is not None:
        try:
            yield base
        finally:
            os.close(handle)
        return
    sweep(base)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    handle = _lock(folder)
    before = dict(os.environ)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    # a cache that torch keeps among temporary files, and that is to outlive them
    user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    os.environ.setdefault(TORCH_CACHE, str(base / f"torchinductor_{user}"))
    try:
        yield folder
    finally:
        tempfile.tempdir = None
        for name in ("TMPDIR", TORCH_CACHE):
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]
        _remove_unused(folder, handle)  # or a worker that outlives us goes on in it, and the next run removes it


def sweep(base: Path) -> None:
    """Remove our folders below ``base`` that no process uses. Those of other users are left alone."""
    for folder in base.glob(f"{PREFIX}*"):
        with suppress(OSError):
            status = folder.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                _remove_unused(folder, os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW))


def _lock(folder: Path) -> int:
    """Create the lock file of a new folder, locked before it becomes visible."""
    hidden = folder / f".{LOCK}"
    handle = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with suppress(OSError):  # a file system without locks: the folder is removed at the end, and never swept
        fcntl.flock(handle, fcntl.LOCK_SH)
    os.rename(hidden, folder / LOCK)
    return handle


def _join(folder: Path) -> int | None:
    """Lock a folder that another process made; None if it was removed meanwhile or is not ours."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.fstat(handle).st_nlink:
            return handle
    os.close(handle)
    return None


def _remove_unused(folder: Path, handle: int) -> None:
    """Close ``handle``, the lock, and remove the folder unless another process holds it."""
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)
