"""Tasks over worker processes, one thread each: models and imports stay in memory from task to task."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType

from eopd.storage.stopping import heeding
from examples.study.design import Task
from examples.study.errors import StudyError

TRIES = 2  # of a task whose worker dies
PATIENCE_SECONDS = 10.0  # between asking a worker to end and killing it


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold ``lock``: two studies over one work folder would delete each other's stores.

    Raises:
        StudyError: another process holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StudyError(
                f"a study is running already (it holds {lock}): wait for it, or give another --work"
            ) from error
        yield


def run_all(tasks: Sequence[Task], work: Path, folder: Path, workers: int, say: Callable[[str], None]) -> list[str]:
    """Make the results of ``tasks``, in their order; returns what failed and why. A failure stops nothing else.

    A task whose worker dies is begun again once, after all others. A seed's store is deleted when all of its tasks are
    done, and stays for the next attempt where one failed or another run of the seed was begun and stopped. SIGINT and
    SIGTERM end the workers too.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the workers, which are started anew
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    log = _Log(tasks, work, say)
    waiting = deque(tasks)
    pool: list[_Worker] = []
    with heeding(_end):
        try:
            pool += [_Worker(work, folder) for _ in range(min(workers, len(tasks)))]
            while waiting or any(worker.task for worker in pool):
                for worker in pool:
                    if worker.task is None and waiting:
                        worker.give(waiting.popleft())
                ready = wait([worker.pipe for worker in pool if worker.task])
                for place, worker in enumerate(pool):
                    if worker.pipe in ready:
                        task, answer = worker.take()
                        if isinstance(answer, float):
                            log.done(task, answer)
                        elif answer:
                            log.failed(task, answer)
                        else:
                            if log.died(task, worker.end()):
                                waiting.append(task)
                            pool[place] = _Worker(work, folder)
        finally:
            for worker in pool:
                worker.end()
    return log.failures


class _Log:
    """What became of every task: says it, and deletes the stores that nothing reads any more."""

    def __init__(self, tasks: Sequence[Task], work: Path, say: Callable[[str], None]) -> None:
        self.failures: list[str] = []
        self._left = Counter(task.seed for task in tasks)
        self._deaths: Counter[str] = Counter()
        self._tasks, self._ended = len(tasks), 0
        self._work, self._say = work, say
        self._began = time.monotonic()

    def done(self, task: Task, seconds: float) -> None:
        self._ended += 1
        elapsed = time.monotonic() - self._began
        remaining = elapsed / self._ended * (self._tasks - self._ended)
        self._say(
            f"[{self._ended}/{self._tasks}] {task.name}: {seconds:.0f} s; "
            f"{elapsed / 60:.1f} min so far, about {remaining / 60:.0f} min left"
        )
        self._left[task.seed] -= 1
        begun = any((self._work / "runs").glob(f"*-seed{task.seed}"))  # by a process that was stopped
        if not self._left[task.seed] and not begun:
            shutil.rmtree(self._work / f"store-seed{task.seed}", ignore_errors=True)

    def failed(self, task: Task, why: str) -> None:
        self._ended += 1
        self.failures.append(f"{task.name}: {why}")
        self._say(f"[{self._ended}/{self._tasks}] {self.failures[-1]}")

    def died(self, task: Task, how: str) -> bool:
        """Whether the task is to be tried again."""
        self._deaths[task.name] += 1
        if self._deaths[task.name] < TRIES:
            self._say(f"{task.name}: its process {how}; it goes on after the others")
            return True
        self.failed(task, f"its process {how}, {TRIES} times")
        return False


class _Worker:
    """A process that does one task after another."""

    def __init__(self, work: Path, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.task: Task | None = None
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, work, folder))
        self._process.start()
        theirs.close()  # so that the pipe ends when the process does

    def give(self, task: Task) -> None:
        self.task = task
        with suppress(OSError):  # it is dead: take() says so
            self.pipe.send(task)

    def take(self) -> tuple[Task, float | str | None]:
        """The task, and the seconds it took, or why it failed; None: the process is dead."""
        assert self.task is not None
        task, self.task = self.task, None
        try:
            return task, self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(PATIENCE_SECONDS)
            return task, None

    def end(self) -> str:
        """End the process if it has not ended; how it did."""
        self.pipe.close()
        if self.task is None:  # it waits for one, and the end of the pipe ends it
            self._process.join(PATIENCE_SECONDS)
        self._process.terminate()
        self._process.join(PATIENCE_SECONDS)
        self._process.kill()
        self._process.join()
        code = self._process.exitcode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _serve(pipe: Connection, work: Path, folder: Path) -> None:
    import torch

    from eopd.pipeline.processes import ask_to_stop_when_orphaned
    from examples.study.run import commit, run

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    if sys.platform == "linux":
        ask_to_stop_when_orphaned()
    torch.set_num_threads(1)
    commit()
    while (task := _next(pipe)) is not None:
        began = time.monotonic()
        try:
            run(task, work, folder)
        except Exception as error:  # whatever it is: the other tasks go on, and this one is named
            pipe.send(f"{type(error).__name__}: {error}")
        else:
            pipe.send(time.monotonic() - began)


def _next(pipe: Connection) -> Task | None:
    """The next task; None when there is none to come."""
    try:
        task: Task = pipe.recv()
    except EOFError:
        return None
    return task


def _end(number: int, frame: FrameType | None) -> None:
    """A signal ends the study, and with it its workers."""
    raise SystemExit(128 + number)
