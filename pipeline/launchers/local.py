"""Worker processes of this machine: one per GPU, or a few on the CPU.

A worker does one task after another and keeps what they share (``pipeline.worker``); training in several processes, and
every task with ``launcher.warm: false``, gets processes of its own, which give their memory back. Workers run in
sessions of their own, so that Ctrl-C reaches them once and through us.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from eopd.pipeline.config import RunSettings
from eopd.pipeline.errors import Outcome
from eopd.pipeline.logs import log_name
from eopd.pipeline.processes import Leader, last_line, worker_command
from eopd.pipeline.progress import Display, Replay
from eopd.pipeline.tasks import Task
from eopd.stages.models.memory import nvidia_smi
from eopd.stages.stage import Stage
from eopd.storage.files import naming_full_disks

POLL_SECONDS = 0.05
PATIENCE_SECONDS = 5.0
"""How long workers that are stopped at once may take to clean up."""
CLOSING_SECONDS = 10.0
THREADS_VARIABLE = "OMP_NUM_THREADS"


class Handle(Protocol):
    """A process, or a warm worker while it does a task."""

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def send_signal(self, sig: int) -> None: ...


@dataclass(frozen=True)
class Running:
    """A task that a worker is doing."""

    task: Task
    handle: Handle
    gpus: tuple[str, ...]
    slot: int
    log: Path
    log_start: int  # bytes that were in the log before
    replay: Replay


class LocalPool:
    def __init__(self, settings: RunSettings, display: Display) -> None:
        gpus = settings.launcher.gpus
        self._gpus = visible_gpus() if gpus is None else [str(gpu) for gpu in gpus]
        self._settings = settings
        self._display = display
        self._running: list[Running] = []
        self._warm: list[WarmWorker] = []
        self._events = Path(tempfile.mkdtemp(prefix="eopd-events-"))
        self._started = 0

    # -- the pool ------------------------------------------------------------------------------------------------

    def room(self, stage: Stage) -> int:
        gpus = stage.gpus(self._settings)
        if not self._gpus or not gpus:
            most = self._settings.launcher.workers if not self._gpus else len(self._gpus) + 1
            return max(most - len(self._running), 0)
        free = len(self._free_gpus()) // gpus
        if free == 0 and not self._running:
            return 1  # it needs more GPUs than there are: let it run, and say so itself
        return free

    def start(self, task: Task) -> None:
        run, stage = task.run, task.job.stage
        gpus = tuple(self._free_gpus()[: stage.gpus(self._settings)])
        slot = min(set(range(len(self._running) + 1)) - {running.slot for running in self._running})
        run.paths.logs.mkdir(parents=True, exist_ok=True)
        log = run.paths.logs / log_name(task.job, slot)
        self._started += 1
        events = self._events / f"{self._started}.jsonl"
        with naming_full_disks(log), log.open("ab") as output:
            start = output.tell()
        text = task.to_json(events=events, log=log.absolute())
        handle = self._hand_over(task, text, self._environment(gpus), log)
        replay = Replay(events, self._display.open())
        self._running.append(Running(task, handle, gpus, slot, log, start, replay))

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        until = time.monotonic() + seconds
        while True:
            ended = [running for running in self._running if running.handle.poll() is not None]
            for running in self._running:
                running.replay.catch_up()
            if ended or time.monotonic() >= until:
                return [(running.task, self._outcome(running)) for running in ended]
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        try:
            for running in self._running:
                running.handle.send_signal(signal.SIGTERM)  # a process started in the background may ignore SIGINT
            while self._running:
                self.wait(1.0)
        finally:
            self._stop_at_once()
            for worker in self._warm:  # all at once: each frees its engines first
                worker.end_input()
            for worker in self._warm:
                worker.close()
            self._warm.clear()
            shutil.rmtree(self._events, ignore_errors=True)

    def _stop_at_once(self) -> None:
        """Stop workers without waiting for their parts, after a second signal; kill a worker that ignores it."""
        for running in self._running:
            running.handle.send_signal(signal.SIGTERM)
        until = time.monotonic() + PATIENCE_SECONDS
        while self._running and time.monotonic() < until:
            self.wait(POLL_SECONDS)
        for running in self._running:
            running.handle.send_signal(signal.SIGKILL)
            running.handle.wait()

    def _outcome(self, running: Running) -> Outcome:
        self._running.remove(running)
        running.replay.close()
        code = running.handle.wait()
        outcome = running.replay.outcome
        if outcome is None:
            outcome = Outcome.from_exit(code, last_line(running.log, running.log_start, code))
        if outcome.kind == "done":
            return outcome
        return replace(outcome, message=f"{outcome.message} (log: {running.log})")

    # -- workers -------------------------------------------------------------------------------------------------

    def _environment(self, gpus: tuple[str, ...]) -> dict[str, str]:
        environment = dict(os.environ)
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        elif self._settings.launcher.workers > 1:
            environment.setdefault(THREADS_VARIABLE, str(threads_each(self._settings.launcher.workers)))
        return environment

    def _hand_over(self, task: Task, text: str, environment: Mapping[str, str], log: Path) -> Handle:
        """Give a task to the warm worker whose engine fits best, or to a new one, or to processes of its own.

        A warm worker keeps the GPUs it was started with; idle ones that hold memory of a GPU that is needed otherwise
        are ended first.
        """
        gpus = environment.get("CUDA_VISIBLE_DEVICES", "")
        alone = task.processes > 1 or not self._settings.launcher.warm
        for worker in [worker for worker in self._warm if not worker.is_alive]:
            worker.close()
            self._warm.remove(worker)
        for worker in [worker for worker in self._warm if worker.is_idle and _overlap(worker.gpus, gpus)]:
            if alone or worker.gpus != gpus:
                worker.close()
                self._warm.remove(worker)
        if alone:
            with log.open("ab") as output:
                return Leader(
                    worker_command(task.processes, text),
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
        fitting = [worker for worker in self._warm if worker.is_idle and worker.gpus == gpus]
        if not fitting:
            fitting = [WarmWorker(environment, gpus)]
            self._warm += fitting
        engine = task.job.stage.engine or task.job.stage.name
        return max(fitting, key=lambda worker: worker.last_used(engine)).give(text, engine)

    def _free_gpus(self) -> list[str]:
        busy = {gpu for running in self._running for gpu in running.gpus}
        return [gpu for gpu in self._gpus if gpu not in busy]


@dataclass
class WarmWorker:
    """A process that does one task after another. It is also the handle of its current task."""

    environment: Mapping[str, str]
    gpus: str
    _used: list[str] = field(default_factory=list)  # engines of the tasks it was given
    _busy: bool = False
    _code: int | None = None  # of the last task

    def __post_init__(self) -> None:
        self._answers, theirs = os.pipe()
        try:
            self.process = Leader(
                worker_command(1, "--serve", str(theirs)),
                env=dict(self.environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs],
            )
        finally:
            os.close(theirs)

    @property
    def is_alive(self) -> bool:
        """True if the process takes tasks: it exits after a failed one."""
        return self._code in (None, 0) and self.process.poll() is None

    @property
    def is_idle(self) -> bool:
        return not self._busy

    def last_used(self, engine: str) -> float:
        """Recency of an engine: 0 if the last task used it, lower the longer ago."""
        return -float(self._used[::-1].index(engine)) if engine in self._used else -float("inf")

    def give(self, text: str, engine: str) -> WarmWorker:
        assert self.is_idle
        self._used.append(engine)
        self._busy, self._code = True, None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(text.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.process.wait()  # it died since it was looked at: the task ends as its process did
        return self

    # -- as a handle of the task ---------------------------------------------------------------------------------

    def poll(self) -> int | None:
        if self._busy:
            self._look(0.0)
        return self._code

    def wait(self) -> int:
        while self._busy:
            self._look(1.0)
        assert self._code is not None
        return self._code

    def send_signal(self, sig: int) -> None:
        if self._busy:
            self.process.send_signal(sig)

    def _look(self, seconds: float) -> None:
        ready = self._has_answered(seconds)
        if not ready:
            if self.process.poll() is None:
                return
            ready = self._has_answered(0.0)  # it may have answered just before it ended
        answer = os.read(self._answers, 1) if ready else b""
        # no answer, but the end of the pipe: the task ended as the worker did
        self._code = {b"+": 0, b"-": 1}.get(answer) if answer else self.process.wait() or -signal.SIGKILL
        self._busy = False

    def _has_answered(self, seconds: float) -> bool:
        return bool(select.select([self._answers], [], [], seconds)[0])

    # -- the end -------------------------------------------------------------------------------------------------

    def end_input(self) -> None:
        """Close the input, so that the process exits after its current task."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def close(self) -> None:
        """Let the process exit by itself, or kill it."""
        self.end_input()
        try:
            self.process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._answers)


def _overlap(ours: str, theirs: str) -> bool:
    return bool(set(ours.split(",")) & set(theirs.split(",")) - {""})


def threads_each(workers: int) -> int:
    """Return the threads of each of several processes: sharing cores would make threads spin for each other."""
    return max(len(os.sched_getaffinity(0)) // workers, 1)


def visible_gpus() -> list[str]:
    """List this machine's GPUs without importing torch: CUDA_VISIBLE_DEVICES, else what nvidia-smi lists."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return nvidia_smi("index") or []
