"""Writing a part in the background, its claim held until it is committed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from eopd.storage.artifacts import Artifact
from eopd.storage.claims import POLL_SECONDS, claim


def held_parts(artifact: Artifact, parts: Sequence[int]) -> Iterator[tuple[int, ExitStack]]:
    """As ``storage.claims.claimed_parts``, with the claim for the caller to close: when the part is committed."""
    waiting = list(parts)
    while waiting:
        held_by_others = []
        for part in waiting:
            if artifact.is_committed(part):
                continue
            held = ExitStack()
            if not held.enter_context(claim(artifact, part)):
                held.close()
                held_by_others.append(part)
            elif artifact.is_committed(part):
                held.close()
            else:
                yield part, held
        waiting = held_by_others
        if waiting:
            time.sleep(POLL_SECONDS)


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
