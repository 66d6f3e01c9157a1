"""Background writing of a part; its claim is held until it is committed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack


class PartWriter:
    """One thread that encodes and writes; at most one part waits for it, so memory holds two.

    A part that was handed over is begun when the caller says so, at a moment when its own work leaves cores free.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="part-writer")
        self._next: tuple[Callable[[], None], ExitStack] | None = None
        self._last: Future[None] | None = None

    def write(self, task: Callable[[], None], claimed: ExitStack) -> None:
        """Hand over ``task`` once the previous one is done; raises what that one raised."""
        with claimed:
            self.finish()
            self._next = task, claimed.pop_all()

    def begin(self) -> None:
        """Let the thread begin the task that was handed over."""
        if self._next is not None:
            self._last, self._next = self._pool.submit(_run, *self._next), None

    def finish(self) -> None:
        """Wait for every task that was handed over; raises what they raised."""
        self.begin()
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Wait for the task that was handed over, and end the thread."""
        self.begin()
        self._pool.shutdown(wait=True)


def _run(task: Callable[[], None], held: ExitStack) -> None:
    with held:
        task()
