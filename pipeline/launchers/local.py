"""Jobs on this machine: sub-processes that give their memory back, one on each GPU, or a few on the CPU.

A worker is the command of its stage, as a person would give it on any machine. It runs in a session of its own, so
that Ctrl-C reaches it once and through us; if we are killed, the kernel asks it to stop after the part in hand.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from eopd.pipeline.config import RunSettings
from eopd.pipeline.ends import EXIT_FULL, EXIT_INTERRUPTED
from eopd.pipeline.launchers.base import Kind, Outcome, Task
from eopd.pipeline.plan import Stage
from eopd.pipeline.progress import EVENTS_VARIABLE, Display, Replay
from eopd.storage.files import naming_full_disks

POLL_SECONDS = 0.05
PATIENCE_SECONDS = 5.0
"""For workers to clean up after themselves, when they are stopped at once."""
THREADS_VARIABLE = "OMP_NUM_THREADS"
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


@dataclass(frozen=True)
class Worker:
    task: Task
    process: Process
    gpus: tuple[str, ...]
    slot: int
    log: Path
    log_start: int  # bytes that were in the log before
    replay: Replay


class LocalPool:
    """Processes of this machine."""

    def __init__(self, settings: RunSettings, display: Display, spawn: Spawn | None = None) -> None:
        gpus = settings.launcher.gpus
        self._gpus = visible_gpus() if gpus is None else [str(gpu) for gpu in gpus]
        self._settings = settings
        self._display = display
        self._spawn = spawn or spawn_process
        self._workers: list[Worker] = []
        self._events = Path(tempfile.mkdtemp(prefix="eopd-"))
        self._started = 0

    def room(self, stage: Stage) -> int:
        if not self._gpus:
            return max(self._settings.launcher.workers - len(self._workers), 0)
        free = len(self._free_gpus()) // gpus_of(self._settings, stage)
        if free == 0 and not self._workers:
            return 1  # asks for more than there are: let it run, and say so itself
        return free

    def start(self, task: Task) -> None:
        gpus = tuple(self._free_gpus()[: gpus_of(self._settings, task.job.stage)])
        slot = min(set(range(len(self._workers) + 1)) - {worker.slot for worker in self._workers})
        task.runner.paths.logs.mkdir(parents=True, exist_ok=True)
        log = task.runner.paths.logs / f"{task.job.stage}-{task.job.round}.worker-{slot}.log"
        self._started += 1
        events = self._events / f"{self._started}.jsonl"
        environment = {**os.environ, EVENTS_VARIABLE: str(events)}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        elif self._settings.launcher.workers > 1:
            environment.setdefault(THREADS_VARIABLE, str(threads_each(self._settings.launcher.workers)))
        with naming_full_disks(log), log.open("ab") as output:
            start = output.tell()
            process = self._spawn(stage_command(task), environment, output)
        replay = Replay(events, self._display.open())
        self._workers.append(Worker(task, process, gpus, slot, log, start, replay))

    def wait(self, seconds: float) -> list[Outcome]:
        until = time.monotonic() + seconds
        while True:
            ended = [worker for worker in self._workers if worker.process.poll() is not None]
            for worker in self._workers:
                worker.replay.catch_up()
            if ended or time.monotonic() >= until:
                return [self._outcome(worker) for worker in ended]
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        try:
            for worker in self._workers:
                worker.process.send_signal(signal.SIGTERM)  # a process started in the background may be deaf to SIGINT
            while self._workers:
                self.wait(1.0)
        finally:
            self._stop_at_once()
            shutil.rmtree(self._events, ignore_errors=True)

    def _stop_at_once(self) -> None:
        """A second signal ends a worker without its part; who does not heed it is killed."""
        for worker in self._workers:
            worker.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + PATIENCE_SECONDS
        while self._workers and time.monotonic() < until:
            self.wait(POLL_SECONDS)
        for worker in self._workers:
            worker.process.send_signal(signal.SIGKILL)
            worker.process.wait()

    def _outcome(self, worker: Worker) -> Outcome:
        self._workers.remove(worker)
        worker.replay.close()
        code = worker.process.wait()
        kind, message = worker.replay.end or (kind_of(code), "")
        if kind == "done" or code == 0:
            return Outcome(worker.task, "done")
        words = message or last_words(worker.log, worker.log_start, code)
        return Outcome(worker.task, kind, f"{words} (log: {worker.log})")

    def _free_gpus(self) -> list[str]:
        busy = {gpu for worker in self._workers for gpu in worker.gpus}
        return [gpu for gpu in self._gpus if gpu not in busy]


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


def threads_each(workers: int) -> int:
    """This machine's cores, shared out. Threads of several processes on one core would spin for each other."""
    return max(len(os.sched_getaffinity(0)) // workers, 1)


def visible_gpus() -> list[str]:
    """Names of this machine's GPUs, without importing torch: CUDA_VISIBLE_DEVICES, else what nvidia-smi lists."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    listed = subprocess.run([smi, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, check=False)
    return listed.stdout.decode().split() if listed.returncode == 0 else []


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
