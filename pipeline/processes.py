"""Worker processes: starting, stopping and cleaning up after them. Used by every launcher."""

from __future__ import annotations

import ctypes
import fcntl
import getpass
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eopd.pipeline.tasks import Task


# -- temporary --------------------------------------------------------------------------------------------------------

# One folder for all temporary files of a run; if the run is killed, the next run removes it.
#
# Killed processes leave files of libraries behind (vLLM's `vllm_dist_*`, sockets, folders of multiprocessing). TMPDIR
# directs them, and those of child processes, into one folder ``eopd-*``. Every process that uses the folder holds a
# kernel lock on a file in it, so a folder whose lock is free is unused.


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


# -- processes --------------------------------------------------------------------------------------------------------

WORKER = "eopd.pipeline.worker"
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
TORCHRUN = ("-m", "torch.distributed.run", f"--log-dir={os.devnull}")  # else it leaves a folder among temporary files
TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"
"""Set by torchrun's agent for the processes that it starts."""
PARENT_POLL_SECONDS = 0.5
PARENT_GRACE_SECONDS = 60.0
"""How long an orphaned process may take to finish a training step and its state before it is killed."""
GROUP_SECONDS = 10.0
"""How long processes that a worker left behind may take to clean up before they are killed."""


def worker_command(processes: int, *arguments: str, torchrun: Sequence[str] | None = None) -> list[str]:
    """Return the arguments of ``python`` that start a worker, or several processes that do one task together.

    Args:
        processes: on this machine.
        torchrun: options that say where the processes of several machines meet; None: there is one machine.
    """
    if processes == 1 and torchrun is None:
        return ["-m", WORKER, *arguments]
    return [
        *TORCHRUN,
        *(["--standalone"] if torchrun is None else torchrun),
        f"--nproc-per-node={processes}",
        "-m",
        WORKER,
        *arguments,
    ]


def trains_together(task: Task) -> bool:
    """True in the process that starts the group of a task; False inside the group."""
    return task.processes > 1 and "WORLD_SIZE" not in os.environ


def rank() -> int:
    """Return the rank of this process in the group that does a task; 0 if it is alone."""
    return int(os.environ.get("RANK", "0"))


class Leader(subprocess.Popen[bytes]):
    """``python ARGUMENTS`` as the leader of a process group that ends with it; the leader stops if its parent dies.

    vLLM's processes would outlive a killed worker and keep the memory of its GPU.
    """

    def __init__(self, arguments: Sequence[str], **options: Any) -> None:
        ask = partial(ask_to_stop_when_orphaned, os.getpid()) if sys.platform == "linux" else None
        super().__init__([sys.executable, *arguments], start_new_session=True, preexec_fn=ask, **options)

    def poll(self) -> int | None:
        ended_before = self.returncode is not None
        code = super().poll()
        if code is not None and not ended_before:
            end_group(self.pid)
        return code

    def wait(self, timeout: float | None = None) -> int:
        ended_before = self.returncode is not None
        code = super().wait(timeout)
        if not ended_before:
            end_group(self.pid)
        return code


def end_group(leader: int) -> None:
    """Kill what is left of the process group of ``leader``, which has ended."""
    with suppress(ProcessLookupError, PermissionError):
        try:
            os.killpg(leader, signal.SIGTERM)
            until = time.monotonic() + GROUP_SECONDS
            while _any_runs(leader) and time.monotonic() < until:
                time.sleep(0.02)
        finally:
            os.killpg(leader, signal.SIGKILL)


def _any_runs(group: int) -> bool:
    """True if a process of ``group`` runs; zombies keep their group but do not count."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group, *_ = file.read_text(errors="replace").rpartition(")")[2].split()
            if int(its_group) == group and state not in "ZX":
                return True
    return False


def ask_to_stop_when_orphaned(parent: int | None = None) -> None:
    """Ask the kernel, in a child of ``parent``, to send SIGTERM when the parent ends for any reason."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if parent is not None and os.getppid() != parent:  # the parent ended before this call
        os.kill(os.getpid(), signal.SIGTERM)


def end_with_parent(first: signal.Signals = signal.SIGTERM) -> None:
    """Watch the parent: when it ends, send ``first`` to this process, then SIGKILL.

    For processes that libraries start: torchrun's agent and vLLM's engine put theirs into sessions of their own, in
    which they would outlive everything. A thread does it: the kernel's signal comes when the parent's thread ends.
    """
    threading.Thread(target=_watch, args=(os.getppid(), first), name="parent", daemon=True).start()


def end_with_parent_if_spawned() -> None:
    """Apply ``end_with_parent`` in processes that multiprocessing spawns (vLLM's engine); call as a program starts."""
    if "--multiprocessing-fork" in sys.orig_argv:  # its parent_process() is not known yet
        end_with_parent(signal.SIGKILL)  # it has nothing to finish


def _watch(parent: int, first: signal.Signals) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os.kill(os.getpid(), first)
    time.sleep(PARENT_GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def last_line(log: Path, start: int, code: int) -> str:
    """Describe the end of a process that reported no outcome; its output starts at byte ``start`` of ``log``."""
    ended = f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read()[-4096:].decode(errors="replace").strip().splitlines()
    return f"{ended}; its last line: {lines[-1].strip()}" if lines else ended
