"""Finding the processes of a run at work, wherever a launcher has put them on this machine."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path


def worker_of(config: Path, run: subprocess.Popen[str], *words: str, variable: tuple[str, str] | None = None) -> int:
    """Process id of a worker of ``run`` whose command line holds ``words`` and whose environment ``variable``."""
    wanted = {"eopd.pipeline.cli", str(config), "--round", *words}
    while run.poll() is None:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if not wanted <= set((folder / "cmdline").read_text().split("\0")):
                    continue
                if variable is None or variables(int(folder.name)).get(variable[0]) == variable[1]:
                    return int(folder.name)
            except (FileNotFoundError, ProcessLookupError):
                continue
        time.sleep(0.05)
    raise AssertionError(f"the run ended before a worker was seen: {run.communicate()[1]}")


def variables(process: int) -> dict[str, str]:
    """Its environment."""
    entries = Path(f"/proc/{process}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def parent_of(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("PPid:")).split()[1])
