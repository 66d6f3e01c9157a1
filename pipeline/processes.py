"""Worker processes: starting, stopping and cleaning up after them. Used by every launcher."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eopd.pipeline.tasks import Task

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
