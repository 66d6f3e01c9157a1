"""Processes that do a task: what is started, how it is asked to stop, and what its end says.

Of every launcher, and of the processes themselves.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from eopd.pipeline.ends import EXIT_FULL, EXIT_INTERRUPTED, EXIT_REFUSED

if TYPE_CHECKING:
    from eopd.pipeline.config import RunSettings
    from eopd.pipeline.launchers.base import Kind, Task
    from eopd.pipeline.plan import Stage

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
TORCHRUN = ("-m", "torch.distributed.run", f"--log-dir={os.devnull}")  # or it leaves a folder in the temporary place
TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"
"""Set by torchrun's agent for the processes that it starts."""
PARENT_POLL_SECONDS = 0.5
PARENT_GRACE_SECONDS = 60.0
"""For an orphaned process to finish what is in hand (a training step, and its state), before it is killed."""
GROUP_SECONDS = 10.0
"""For what a worker left behind to clean up after itself, before it is killed."""


class Process(Protocol):
    """What the pool needs of a process; ``Leader`` is one."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def send_signal(self, sig: int) -> None: ...
    def wait(self) -> int: ...


Spawn = Callable[[list[str], Mapping[str, str], IO[bytes]], Process]
"""Starts ``python ARGUMENTS`` with an environment, its output going to a file."""


def stage_command(task: Task) -> list[str]:
    """Arguments of ``python`` that do ``task``; training in several processes goes through torchrun."""
    command = ["-m", "eopd.pipeline.cli", *task.arguments()]
    processes = task.runner.settings.train.processes
    if task.job.stage != "train" or processes == 1:
        return command
    return [*TORCHRUN, "--standalone", "--nproc-per-node", str(processes), *command]


def trains_together(task: Task) -> bool:
    """Whether this is the process that has to start the several ones of a training job."""
    return task.job.stage == "train" and task.runner.settings.train.processes > 1 and "WORLD_SIZE" not in os.environ


def rank() -> int:
    """Number of this process among those that train together; 0 when it is alone."""
    return int(os.environ.get("RANK", "0"))


def gpus_of(settings: RunSettings, stage: Stage) -> int:
    """How many GPUs a task of ``stage`` works on at once."""
    if stage == "train":
        return settings.train.processes
    if stage == "align":
        alignment = settings.evaluate.alignment if settings.evaluate else None
        both = (alignment.engine_options, alignment.teacher_engine_options) if alignment else ()
        return max((options.tensor_parallel for options in both), default=1)  # they share the devices
    if stage == "evaluate":
        return settings.evaluate.engine_options.tensor_parallel if settings.evaluate else 1
    return (settings.rollout if stage == "rollout" else settings.score).engine_options.tensor_parallel


class Leader(subprocess.Popen[bytes]):
    """``python ARGUMENTS``, asked to stop when we end, in a group of its own that ends with it.

    vLLM's processes outlive a worker that is killed, and keep the memory of its GPU.
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
    """End all processes of the group that ``leader``, which has ended, was the first of."""
    with suppress(ProcessLookupError, PermissionError):
        try:
            os.killpg(leader, signal.SIGTERM)
            until = time.monotonic() + GROUP_SECONDS
            while _any_runs(leader) and time.monotonic() < until:
                time.sleep(0.02)
        finally:
            os.killpg(leader, signal.SIGKILL)


def _any_runs(group: int) -> bool:
    """Whether a process of ``group`` has not ended; one that nobody waits for keeps its group."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group, *_ = file.read_text(errors="replace").rpartition(")")[2].split()
            if int(its_group) == group and state not in "ZX":
                return True
    return False


def spawn_process(arguments: list[str], environment: Mapping[str, str], output: IO[bytes]) -> Process:
    return Leader(arguments, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def ask_to_stop_when_orphaned(parent: int | None = None) -> None:
    """In a child of ``parent``: SIGTERM comes from the kernel when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if parent is not None and os.getppid() != parent:  # it ended before it could be asked
        os.kill(os.getpid(), signal.SIGTERM)


def end_with_parent(first: signal.Signals = signal.SIGTERM) -> None:
    """From now on watch the parent: when it ends, ``first`` comes at once, and SIGKILL if that does not help.

    Of processes that libraries start: torchrun's agent and vLLM's engine put theirs into sessions of their own, in
    which they outlive everything. By a thread, because the kernel's signal comes when the parent's thread ends.
    """
    threading.Thread(target=_watch, args=(os.getppid(), first), name="parent", daemon=True).start()


def end_with_parent_if_spawned() -> None:
    """Call this where a program of ours is imported: multiprocessing does so in what it spawns, as vLLM's engine is."""
    if "--multiprocessing-fork" in sys.orig_argv:  # its parent_process() is not known yet
        end_with_parent(signal.SIGKILL)  # it has nothing to finish


def _watch(parent: int, first: signal.Signals) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os.kill(os.getpid(), first)
    time.sleep(PARENT_GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def kind_of(code: int) -> Kind:
    """What a worker's exit code says of its end; negative: the signal that killed it."""
    if code == 0:
        return "done"
    if code == EXIT_FULL:
        return "full"
    if code == EXIT_REFUSED:
        return "refused"
    return "lost" if code < 0 or code == EXIT_INTERRUPTED else "failed"


def last_words(log: Path, start: int, code: int) -> str:
    """How a process ended that did not say so itself; its output is in ``log`` from byte ``start`` on."""
    ended = f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read()[-4096:].decode(errors="replace").strip().splitlines()
    return f"{ended}; its last line: {lines[-1].strip()}" if lines else ended
