"""Number of torch threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
