"""Number of torch threads, and how many of them decoding on a CPU should use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

set_threads = torch.set_num_threads  # as torch has it: vLLM puts one in its place that does nothing

WEIGHT_BYTES_PER_THREAD = 32 * 2**20
"""A model with fewer bytes of weights is fastest on one thread; twice as many keep two busy."""


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Use ``count`` threads in the block and restore the number afterwards; None changes nothing."""
    before = torch.get_num_threads()
    set_threads(count or before)
    try:
        yield
    finally:
        set_threads(before)


def decoding_threads(chosen: int | None, weight_bytes: int) -> int:
    """Return the number of threads for decoding on a CPU: torch's, and fewer for a small model.

    It does not depend on the load of the machine: the number of threads changes the last bits of logits.

    Args:
        chosen: the user's number, which always holds.
        weight_bytes: size of the model.
    """
    if chosen is not None:
        return chosen
    return min(max(1, weight_bytes // WEIGHT_BYTES_PER_THREAD), torch.get_num_threads(), _cpu_quota())


def _cpu_quota(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return the cores that the container may use at once; a large number without a quota."""
    with suppress(OSError, ValueError):
        quota, period = limit.read_text(encoding="ascii").split()
        return max(1, int(quota) // int(period))
    return 2**16
