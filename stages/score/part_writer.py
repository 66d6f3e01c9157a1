"""Writing a part in the background, its claim held until it is committed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack


class PartWriter:
    """One thread that encodes and writes; at most one part waits for it, so memory holds two."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="part-writer")
        self._last: Future[None] | None = None

    def write(self, task: Callable[[], None], claimed: ExitStack) -> None:
        """Run ``task`` when the one before is done; raises what that one raised."""
        with claimed:
            self.finish()
            held = claimed.pop_all()
        self._last = self._pool.submit(_run, task, held)

    def finish(self) -> None:
        """Wait for the last task; raises what it raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Wait for what was begun, and end the thread."""
        self._pool.shutdown(wait=True)


def _run(task: Callable[[], None], held: ExitStack) -> None:
    with held:
        task()
