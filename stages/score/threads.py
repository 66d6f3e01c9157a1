"""Pieces of work on several cores, each on one thread: no barrier within a piece, none between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Given = TypeVar("Given")
Found = TypeVar("Found")

_set_num_threads = torch.set_num_threads  # as torch has it: vLLM puts another in its place


def map_one_thread_each(function: Callable[[Given], Found], pieces: Iterable[Given]) -> list[Found]:
    """``function`` of every piece, in order, on as many threads as torch uses now. Raises what the first piece raised.

    Within ``function`` torch does not divide an operation over threads, and keeps no track of gradients.
    """
    threads = torch.get_num_threads()

    def call(piece: Given) -> Found:
        with torch.inference_mode():
            return function(piece)

    if threads == 1:
        return [call(piece) for piece in pieces]
    with ThreadPoolExecutor(threads, initializer=_set_num_threads, initargs=(1,)) as pool:
        try:
            return list(pool.map(call, pieces))
        finally:
            _set_num_threads(threads)  # what a new thread begins with is one number of the whole process
