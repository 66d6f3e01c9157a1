"""Number of torch threads, and how many of them decoding on a CPU should use."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

set_threads = torch.set_num_threads  # as torch has it: vLLM puts one in its place that does nothing

WEIGHT_BYTES_PER_THREAD = 32 * 2**20
"""A model with fewer bytes of weights is fastest on one thread; twice as many keep two busy."""
WINDOW_SECONDS = 0.25
"""How long the load of the machine is watched, at least."""
SHARE = 0.75
"""A core counts as free if other processes leave this much of it."""


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Use ``count`` threads in the block and restore the number afterwards; None changes nothing."""
    before = torch.get_num_threads()
    set_threads(count or before)
    try:
        yield
    finally:
        set_threads(before)


class DecodingThreads:
    """Number of threads for decoding on a CPU: torch's, at most one per free core, and few for a small model.

    Each token takes hundreds of short parallel regions, and each region ends when its last thread has been scheduled.
    With a thread for every core, one other busy process makes decoding several times slower than it is on one thread.
    The load is that of the time since the last look, which is at first the time since this object was made.

    Args:
        chosen: the user's number, which always holds.
        weight_bytes: size of the model.
    """

    def __init__(self, chosen: int | None, weight_bytes: int) -> None:
        self._chosen = chosen
        self._most = max(1, weight_bytes // WEIGHT_BYTES_PER_THREAD)
        self._free: int | None = None
        self._mark = _Usage.now()

    def count(self) -> int:
        """Return the number of threads to use now."""
        if self._chosen is not None:
            return self._chosen
        most = min(self._most, torch.get_num_threads(), _cpu_quota())
        return most if most == 1 else min(most, self._free_cores())

    def _free_cores(self) -> int:
        if self._free is None:
            time.sleep(max(0.0, self._mark.time + WINDOW_SECONDS - time.monotonic()))
        now = _Usage.now()
        if self._free is None or now.time - self._mark.time >= WINDOW_SECONDS:
            idle = len(now.cores) - now.of_others_since(self._mark)
            self._free = max(1, math.floor(idle + 1.0 - SHARE))
            self._mark = now
        return self._free


class _Usage:
    """Processor seconds so far: of the cores that this process may run on, and of this process."""

    def __init__(self, cores: list[int], busy: float) -> None:
        self.time, self.own = time.monotonic(), time.process_time()
        self.cores, self.busy = cores, busy

    @classmethod
    def now(cls) -> _Usage:
        cores = (
            sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        )
        return cls(cores, _busy_seconds(cores))

    def of_others_since(self, before: _Usage) -> float:
        """Return how many cores other processes have kept busy on average; 0 where the system does not say."""
        used = self.busy - before.busy - (self.own - before.own)
        return max(0.0, used / max(self.time - before.time, 1e-9))


def _busy_seconds(cores: list[int], stat: Path = Path("/proc/stat")) -> float:
    """Return the seconds in which ``cores`` were not idle, in total since the system's start (Linux; else 0)."""
    busy = 0
    with suppress(OSError):
        for line in stat.read_text(encoding="ascii").splitlines():
            name, *values = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
                user, nice, system, _idle, _wait, interrupts, soft_interrupts, stolen = map(int, values[:8])
                busy += user + nice + system + interrupts + soft_interrupts + stolen
    return busy / os.sysconf("SC_CLK_TCK")


def _cpu_quota(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return the cores that the container may use at once; a large number without a quota."""
    with suppress(OSError, ValueError):
        quota, period = limit.read_text(encoding="ascii").split()
        return max(1, int(quota) // int(period))
    return 2**16
