"""Who computed which part, told by the interpreter and not by the code under test.

Every Python process that is started with ``auditing`` in its environment writes a line to a log before it makes the
folder of a part: when, which, and whether that part had been committed already. A part is computed before its folder
is made, so a line about a committed part is work done twice.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LOG_VARIABLE = "EOPD_AUDIT_LOG"
_PART = re.compile(r"^(part-\d{5,})\.[0-9a-f]{16}$")


@dataclass(frozen=True)
class Begun:
    """A part's folder was about to be made."""

    seconds: float  # since the epoch
    process: int
    artifact: str  # folder
    part: str  # "part-00003"
    committed: bool  # its marker was there already


def install() -> None:
    """In this process and those it forks: log to the file that the environment names."""
    log = os.environ[LOG_VARIABLE]

    def hear(event: str, arguments: tuple[object, ...]) -> None:
        if event != "os.mkdir" or not isinstance(arguments[0], (str, os.PathLike)):
            return
        folder, name = os.path.split(os.fspath(arguments[0]))
        match = _PART.match(str(name))
        if match is None or not os.path.isdir(folder) or os.path.exists(os.path.join(folder, name)):
            return  # no part, or a call that makes no folder
        committed = os.path.exists(os.path.join(folder, f"{match.group(1)}.json"))
        line = f"{time.time():.6f} {os.getpid()} {int(committed)} {match.group(1)} {folder}\n"
        handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(handle, line.encode())
        os.close(handle)

    sys.addaudithook(hear)


def auditing(log: Path) -> Mapping[str, str]:
    """Environment variables under which every Python process keeps this log."""
    folder = log.parent / "audit-hook"
    folder.mkdir(exist_ok=True)
    root = Path(__file__).resolve().parent.parent
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({str(root)!r})\nfrom benchmarks.audit import install\ninstall()\n"
    )
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {LOG_VARIABLE: str(log), "PYTHONPATH": os.pathsep.join(path)}


def begun(log: Path) -> list[Begun]:
    """What the log says so far."""
    if not log.exists():
        return []
    collected = []
    for line in log.read_text(encoding="utf-8").splitlines():
        seconds, process, committed, part, artifact = line.split(" ", 4)
        collected.append(Begun(float(seconds), int(process), artifact, part, committed == "1"))
    return collected
