"""Jobs on this machine: sub-processes that give their memory back, one on each GPU, or a few on the CPU.

A worker is the command of its stage, as a person would give it on any machine. It runs in a session of its own, so
that Ctrl-C reaches it once and through us; if we are killed, the kernel asks it to stop after the part in hand.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from eopd.pipeline.config import RunSettings
from eopd.pipeline.launchers.base import Outcome, Task
from eopd.pipeline.launchers.processes import (
    Process,
    Spawn,
    gpus_of,
    kind_of,
    last_words,
    spawn_process,
    stage_command,
)
from eopd.pipeline.logs import log_name
from eopd.pipeline.plan import Stage
from eopd.pipeline.progress import EVENTS_VARIABLE, Display, Replay
from eopd.storage.files import naming_full_disks

POLL_SECONDS = 0.05
PATIENCE_SECONDS = 5.0
"""For workers to clean up after themselves, when they are stopped at once."""
THREADS_VARIABLE = "OMP_NUM_THREADS"


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
        self._events = Path(tempfile.mkdtemp(prefix="eopd-events-"))
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
        log = task.runner.paths.logs / log_name(task.job.stage, task.job.round, slot)
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
