"""Warm workers for the local launcher: processes that do one task after another (``pipeline.worker``).

``WarmWorkers.spawn`` stands in for the start of a process per task; what it returns looks like that process to the
pool, and ends with the task. A worker that dies ends its task with its signal and is replaced by the next task.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import IO

from eopd.pipeline.launchers.processes import Leader, Process, spawn_process
from eopd.pipeline.progress import EVENTS_VARIABLE
from eopd.pipeline.worker import Order

CLOSING_SECONDS = 10.0
COMMAND = ["-m", "eopd.pipeline.cli"]
SAMPLING = ("rollout", "evaluate")
"""Stages that share one engine: a worker that has done one of them does the other without opening another."""


class WarmWorkers:
    """All warm workers of a pool. Closing it ends them; so does the end of this process."""

    def __init__(self) -> None:
        self._workers: list[WarmWorker] = []

    def __enter__(self) -> WarmWorkers:
        return self

    def __exit__(self, *ended: object) -> None:
        self.close()

    def spawn(self, arguments: list[str], environment: Mapping[str, str], output: IO[bytes]) -> Process:
        """Give the command of a stage to a worker that is free, or to a new one.

        Training in several processes is a command of another kind and gets processes of its own. A worker keeps the
        GPUs it was started with; free ones that hold memory of a GPU that is wanted otherwise are ended first.
        """
        gpus = environment.get("CUDA_VISIBLE_DEVICES")
        for worker in [worker for worker in self._workers if not worker.is_alive]:
            worker.close()
            self._workers.remove(worker)
        idle = [worker for worker in self._workers if worker.is_idle]
        order = _order(arguments, environment, output)
        for worker in list(idle):
            if _share_a_gpu(worker.gpus, gpus) and (order is None or worker.gpus != gpus):
                worker.close()
                idle.remove(worker)
                self._workers.remove(worker)
        if order is None:
            return spawn_process(arguments, environment, output)
        able = [worker for worker in idle if worker.gpus == gpus]
        if not able:
            able = [WarmWorker(environment, gpus)]
            self._workers += able
        return max(able, key=lambda worker: worker.last_did(order.stage)).give(order)

    def close(self) -> None:
        for worker in self._workers:  # all at once: each frees its engines first
            worker.end_input()
        for worker in self._workers:
            worker.close()
        self._workers.clear()


class WarmWorker:
    """One process and what it is at."""

    def __init__(self, environment: Mapping[str, str], gpus: str | None) -> None:
        self.gpus = gpus
        self._done: list[str] = []  # kinds of the tasks it was given
        self.task: Given | None = None
        answers, theirs = os.pipe()
        own = {name: value for name, value in environment.items() if name != EVENTS_VARIABLE}
        try:
            self.process = Leader(
                ["-m", "eopd.pipeline.worker", str(theirs)],
                env=own,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs],
            )
        finally:
            os.close(theirs)
        self.answers = answers

    @property
    def is_alive(self) -> bool:
        """Whether it takes tasks: it ends after one that failed."""
        failed = self.task is not None and bool(self.task.poll())
        return not failed and self.process.poll() is None

    @property
    def is_idle(self) -> bool:
        return self.task is None or self.task.poll() is not None

    def last_did(self, stage: str) -> int:
        """How long ago it did something of this kind, in tasks; 0 the last one, less the longer ago."""
        kind = _kind(stage)
        return -self._done[::-1].index(kind) if kind in self._done else -sys.maxsize

    def give(self, order: Order) -> Given:
        assert self.is_idle
        self._done.append(_kind(order.stage))
        self.task = Given(self)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(order.to_json().encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.process.wait()  # it died since it was looked at: the task ends as its process did
        return self.task

    def end_input(self) -> None:
        """No more tasks: it ends after the one in hand."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def close(self) -> None:
        """Let it end by itself, or end it."""
        self.end_input()
        try:
            self.process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.answers)


class Given:
    """A task in a worker's hands: to the pool, a process that ends with it."""

    def __init__(self, worker: WarmWorker) -> None:
        self._worker = worker
        self._code: int | None = None

    @property
    def pid(self) -> int:
        return self._worker.process.pid

    def poll(self) -> int | None:
        if self._code is None:
            self._look(0.0)
        return self._code

    def wait(self) -> int:
        while self._code is None:
            self._look(1.0)
        return self._code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            self._worker.process.send_signal(sig)

    def _look(self, seconds: float) -> None:
        ready = self._has_answered(seconds)
        if not ready:
            if self._worker.process.poll() is None:
                return
            ready = self._has_answered(0.0)  # perhaps just before it ended
        answer = os.read(self._worker.answers, 4096) if ready else b""  # a line is shorter than a pipe writes at once
        # none, but the end of the pipe (or a child that holds it open): how the worker ended is how the task did
        self._code = json.loads(answer)["code"] if answer else self._worker.process.wait() or -signal.SIGKILL

    def _has_answered(self, seconds: float) -> bool:
        return bool(select.select([self._worker.answers], [], [], seconds)[0])


def _order(arguments: list[str], environment: Mapping[str, str], output: IO[bytes]) -> Order | None:
    """The order that a stage's command amounts to; None for another command."""
    if arguments[: len(COMMAND)] != COMMAND:
        return None
    stage, config, _, round_, *more = arguments[len(COMMAND) :]
    parts = [int(part) for part in more[1].split(",")] if more else None
    log = os.path.realpath(output.name)
    return Order(stage, config, int(round_), parts, environment.get(EVENTS_VARIABLE), log)  # type: ignore[arg-type]


def _kind(stage: str) -> str:
    return "sampling" if stage in SAMPLING else stage


def _share_a_gpu(ours: str | None, theirs: str | None) -> bool:
    return bool(set((ours or "").split(",")) & set((theirs or "").split(",")) - {""})
