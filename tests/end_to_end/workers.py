"""Finding the processes of a run at work, wherever a launcher has put them on this machine."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any


def worker_of(
    config: Path, run: subprocess.Popen[str], stage: str | None = None, variable: tuple[str, str] | None = None
) -> int:
    """Process id of a worker that does a task of ``config`` (of ``stage``) and has ``variable`` in its environment."""
    while run.poll() is None:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                task = task_in((folder / "cmdline").read_text().split("\0"))
                if task is None or task["config"] != str(config) or stage not in (None, task["stage"]):
                    continue
                if variable is None or variables(int(folder.name)).get(variable[0]) == variable[1]:
                    return int(folder.name)
            except (FileNotFoundError, ProcessLookupError):
                continue
        time.sleep(0.05)
    raise AssertionError(f"the run ended before a worker was seen: {run.communicate()[1]}")


def task_in(command: list[str]) -> dict[str, Any] | None:
    """The task that a command line of ``eopd.pipeline.worker`` names, itself or by a number in a file."""
    if "python" not in command[0] or "eopd.pipeline.worker" not in command:
        return None
    first, *more = command[command.index("eopd.pipeline.worker") + 1 :]
    if first.startswith("{"):
        task: dict[str, Any] = json.loads(first)
    elif first == "--serve":
        return None
    else:
        task = json.loads(Path(first).read_text())[more[0]]
    return task


def started_with(name: str, value: str) -> list[int]:
    """Processes that were started with a variable in their environment, and that still run."""
    collected = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if variables(int(folder.name)).get(name) == value and is_alive(int(folder.name)):
                collected.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return collected


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def variables(process: int) -> dict[str, str]:
    """Its environment."""
    entries = Path(f"/proc/{process}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def parent_of(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("PPid:")).split()[1])
