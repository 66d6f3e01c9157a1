"""Free memory, what nvidia-smi says, size of weights, and releasing a GPU's memory. Needs no torch on import."""

from __future__ import annotations

import gc
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.stages.models.weight_files import weight_files

if TYPE_CHECKING:
    import torch


def free_memory() -> int:
    """Return the bytes that Linux estimates as available without swapping; 0 if unknown."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return 0
    lines = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return int(lines.get("MemAvailable", "0 kB").split()[0]) * 1024


def nvidia_smi(field: str) -> list[str] | None:
    """Query a field of each GPU of this machine, without importing torch; None if nvidia-smi is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split() if done.returncode == 0 else None


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a model folder's weight files."""
    return sum(file.stat().st_size for file in weight_files(folder))


def gpu_bytes(device: torch.device) -> int:
    """Return the memory of a GPU, in bytes; 0 for a CPU."""
    import torch

    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return int(torch.cuda.get_device_properties(device).total_memory)


def give_back_gpu_memory() -> None:
    """Release the GPU memory that torch caches for deleted models, so that the next engine can use it.

    Does nothing without one.
    """
    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
