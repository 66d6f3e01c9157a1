"""How much memory there is, how much weights take, and giving a GPU's back. Needs no torch on import."""

from __future__ import annotations

import gc
from pathlib import Path

from eopd.stages.models.weight_files import weight_files


def free_memory() -> int:
    """Bytes; what Linux thinks can be had without swapping. 0 where it does not say."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return 0
    lines = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return int(lines.get("MemAvailable", "0 kB").split()[0]) * 1024


def weight_bytes(folder: Path) -> int:
    """Bytes of a model folder's weight files."""
    return sum(file.stat().st_size for file in weight_files(folder))


def give_back_gpu_memory() -> None:
    """Hand the GPU what torch keeps of it for models that are gone, and the next engine finds taken.

    Does nothing without one.
    """
    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
