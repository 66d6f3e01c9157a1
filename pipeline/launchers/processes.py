"""Processes that do a task: what is started, how it is asked to stop, and what its end says.

Of every launcher, and of the processes themselves.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from eopd.pipeline.ends import EXIT_FULL, EXIT_INTERRUPTED

if TYPE_CHECKING:
    from eopd.pipeline.config import RunSettings
    from eopd.pipeline.launchers.base import Kind, Task
    from eopd.pipeline.plan import Stage

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


class Process(Protocol):
    """What the pool needs of a process; ``subprocess.Popen`` is one."""

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
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *command]


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


def spawn_process(arguments: list[str], environment: Mapping[str, str], output: IO[bytes]) -> Process:
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=ask_to_stop_when_orphaned if sys.platform == "linux" else None,
    )


def ask_to_stop_when_orphaned() -> None:
    """In a child: SIGTERM from the kernel when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def kind_of(code: int) -> Kind:
    """What a worker's exit code says of its end; negative: the signal that killed it."""
    if code == 0:
        return "done"
    if code == EXIT_FULL:
        return "full"
    return "lost" if code < 0 or code == EXIT_INTERRUPTED else "failed"


def last_words(log: Path, start: int, code: int) -> str:
    """How a process ended that did not say so itself; its output is in ``log`` from byte ``start`` on."""
    ended = f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read()[-4096:].decode(errors="replace").strip().splitlines()
    return f"{ended}; its last line: {lines[-1].strip()}" if lines else ended
