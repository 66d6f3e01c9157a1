"""Mathematics, graded by math-verify in processes that can be killed.

An answer can make the algebra behind it run for ever or fill the memory, in places that no signal handler reaches.
So every answer has a time limit, after which its process is killed and a new one started. The limit is wall time, and
a busy machine is slow: answers that pass it are graded once more, one at a time, when all others are done. One that
passes it again is wrong, with a reason that says so; after ``GIVE_UP_AFTER`` such in a row the rest are left at that.
"""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from eopd.stages.verifiers.answers import reference_answer
from eopd.stages.verifiers.verdict import Verdict
from eopd.storage.errors import InputError

MATH_RULES = 1
"""Version of the rules by which ``verifier: math`` grades. Raise it with every change of what is right: it enters the
keys of evaluations and verdicts.
"""
WORKER = "eopd.stages.verifiers.math_worker"
START_SECONDS = 120.0
RESTART_PAUSE_SECONDS = 1.0
GIVE_UP_AFTER = 20
TIMED_OUT = "the grader took too long"
DIED = "the grader died"


class WorkerDied(RuntimeError):
    """The grading process ended by itself (out of memory, or a crash of a library)."""


class NotStarted(RuntimeError):
    """A grading process did not come up."""


class MathVerifier:
    """Grades (response, answer) pairs on ``workers`` processes. Close it, or use it as a context manager."""

    def __init__(
        self, *, seconds: float, workers: int, command: Sequence[str] = (sys.executable, "-m", WORKER)
    ) -> None:
        """
        Args:
            seconds: limit for one answer.
            workers: processes; each is started when it is first needed.
        """
        self._seconds = seconds
        self._command = tuple(command)
        self._free: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._workers = workers
        self._version: str | None = None  # None until a process has started
        for _ in range(workers):
            self._free.put(None)

    def verify_many(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        distinct = list(dict.fromkeys(pairs))
        with ThreadPoolExecutor(self._workers) as threads:
            verdicts = dict(zip(distinct, threads.map(self._verify, distinct), strict=True))
        in_vain = 0
        for pair in [pair for pair, verdict in verdicts.items() if _timed_out(verdict)]:
            if in_vain == GIVE_UP_AFTER:
                break
            verdicts[pair] = self._verify(pair)
            in_vain = in_vain + 1 if _timed_out(verdicts[pair]) else 0
        return [verdicts[pair] for pair in pairs]

    def check_answer(self, answer: str) -> None:
        if not answer.strip():
            raise InputError("the reference answer is empty")
        [verdict] = self.verify_many([(rf"\boxed{{{reference_answer(answer)}}}", answer)])
        if not verdict.readable:
            raise InputError(f"the reference answer {answer!r} holds no answer")
        if verdict.reason == DIED or _timed_out(verdict):
            raise InputError(f"the reference answer {answer!r} cannot be read by math-verify: {verdict.reason}")
        if not verdict.correct:
            raise InputError(
                f"no response can match the reference answer {answer!r}: in a box of its own it is graded wrong",
                remedy="Are its braces balanced?",
            )

    def named(self) -> str:
        return f"math {MATH_RULES} (math-verify{f' {self._version}' if self._version else ''})"

    def close(self) -> None:
        for _ in range(self._workers):
            worker = self._free.get()
            if worker is not None:
                worker.kill()
            self._free.put(None)

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _verify(self, pair: tuple[str, str]) -> Verdict:
        response, answer = pair
        worker = self._free.get()
        try:
            if worker is None:
                worker = self._start()
            reply = worker.ask({"response": response, "answer": answer, "seconds": self._seconds}, self._seconds)
            return Verdict(bool(reply["correct"]), form=reply.get("form"), reason=reply.get("reason"))
        except TimeoutError:
            _kill(worker)
            worker = None
            return Verdict(False, reason=f"{TIMED_OUT} ({self._seconds:g} s)")
        except WorkerDied:
            _kill(worker)
            worker = None
            return Verdict(False, reason=DIED)
        finally:
            self._free.put(worker)

    def _start(self) -> _Worker:
        """Start a process. If the first one fails, all do (no math-verify); a later failure, after a kill, is the
        machine's (no memory, no time): it is tried again, then costs one answer."""
        try:
            worker = _Worker(self._command)
        except (OSError, NotStarted):
            if self._version is None:
                raise
            time.sleep(RESTART_PAUSE_SECONDS)
            try:
                worker = _Worker(self._command)
            except (OSError, NotStarted) as error:
                raise WorkerDied(str(error)) from error
        self._version = worker.version
        return worker


def _timed_out(verdict: Verdict) -> bool:
    return (verdict.reason or "").startswith(TIMED_OUT)


def _kill(worker: _Worker | None) -> None:
    if worker is not None:
        worker.kill()


class _Worker:
    """One grading process, started and ready."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._buffer = b""
        try:
            self.version = str(self._read(START_SECONDS).get("version", ""))
        except (TimeoutError, WorkerDied) as error:
            self.kill()
            raise NotStarted(
                f"the mathematics grader did not start ({error}): is math-verify installed? "
                f"Run `{' '.join(command)} < /dev/null` to see why."
            ) from error

    def ask(self, what: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Grade one answer. Raises TimeoutError or WorkerDied; either way the worker is of no further use."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerDied from error
        return self._read(seconds)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # an unsent question of a process that is gone
                continue

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError(f"no answer in {seconds:g} s")
            got = os.read(self._process.stdout.fileno(), 65536)
            if not got:
                raise WorkerDied("it ended")
            self._buffer += got
        line, self._buffer = self._buffer.split(b"\n", 1)
        reply: dict[str, Any] = json.loads(line)
        return reply
