"""Number of torch threads, and independent pieces of work on several cores, one thread each.

A piece has no barrier within it, and none between it and the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Given = TypeVar("Given")
Found = TypeVar("Found")

_set_num_threads = torch.set_num_threads  # as torch has it: vLLM puts one in its place that does nothing


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Use ``count`` threads in the block and restore the number afterwards; None changes nothing."""
    before = torch.get_num_threads()
    _set_num_threads(count or before)
    try:
        yield
    finally:
        _set_num_threads(before)


class OneThreadEach:
    """A pool of as many threads as torch uses now, for pieces of work; threads keep their memory between calls."""

    def __init__(self) -> None:
        self._count = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._count, initializer=_set_num_threads, initargs=(1,))

    def even_size(self, total: int, least: int, most: int) -> int:
        """Return a piece size from ``least`` to ``most`` with which all threads finish ``total`` together."""
        rounds = -(-total // (most * self._count))
        return min(most, max(least, -(-total // max(1, rounds * self._count))))

    def map(self, function: Callable[[Given], Found], pieces: Iterable[Given]) -> list[Found]:
        """Apply ``function`` to every piece, in order. Raises what the first piece raised.

        Within ``function`` torch does not divide an operation over threads, and keeps no track of gradients.
        """

        def call(piece: Given) -> Found:
            with torch.inference_mode():
                return function(piece)

        if self._count == 1:
            return [call(piece) for piece in pieces]
        try:
            return list(self._pool.map(call, pieces))
        finally:
            _set_num_threads(self._count)  # what a new thread begins with is one number of the whole process
