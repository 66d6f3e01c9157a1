"""Find, show and follow the stage logs in ``runs/<name>/logs``."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from eopd.pipeline.errors import RunError
from eopd.stages.stage import Job

TAIL_BYTES = 1 << 16
_OF_A_JOB = re.compile(r"^(?P<stage>[a-z_]+)-(?P<round>\d+)\b")


def log_name(job: Job, worker: int) -> str:
    """Return the name of a worker's log of a job."""
    return f"{job.log_stem}.worker-{worker}.log"


def find_logs(folder: Path, stage: str | None = None, round_: int | None = None) -> list[Path]:
    """List the logs of a run, the last changed at the end.

    Raises:
        RunError: there is none such; lists what there is.
    """
    every = sorted(path for path in folder.glob("*.log") if path.is_file())
    logs = [path for path in every if _is_of(path, stage, round_)]
    if not logs:
        wanted = " ".join([*([stage] if stage else []), *([f"round {round_}"] if round_ is not None else [])])
        there = ", ".join(path.name for path in every) or "none"
        raise RunError(f"no log{' of ' + wanted if wanted else ''} in {folder}; there is: {there}")
    return sorted(logs, key=lambda path: path.stat().st_mtime)


def _is_of(path: Path, stage: str | None, round_: int | None) -> bool:
    named = _OF_A_JOB.match(path.name)
    own_stage = named["stage"] if named else path.name.split(".")[0]
    if stage is not None and not own_stage.startswith(stage):
        return False
    return round_ is None or (named is not None and int(named["round"]) == round_)


def tail(path: Path, lines: int, end: int | None = None) -> list[str]:
    """Return the last ``lines`` lines before byte ``end`` (None: of the file), read from the last 64 KiB."""
    with path.open("rb") as file:
        end = file.seek(0, 2) if end is None else end
        start = max(end - TAIL_BYTES, 0)
        file.seek(start)
        text = file.read(end - start).decode("utf-8", errors="replace")
    return text.splitlines()[-lines:]


def follow(
    folder: Path, shown_to: Mapping[Path, int], stage: str | None, round_: int | None, poll: float
) -> Iterator[str]:
    """Yield new lines of the logs, including later logs, for ever; a heading where the log changes.

    Args:
        shown_to: bytes of each log that were shown already; the last one is that with the latest heading.
    """
    read = dict(shown_to)
    shown = next(reversed(read), None)
    while True:
        for path in sorted(path for path in folder.glob("*.log") if _is_of(path, stage, round_)):
            start = read.get(path, 0)
            if path.stat().st_size < start:
                start = 0  # the log was started again
            with path.open("rb") as file:
                file.seek(start)
                whole, newline, _ = file.read().rpartition(b"\n")
            read[path] = start + len(whole) + len(newline)
            if newline and path != shown:
                yield f"==> {path.name} <=="
                shown = path
            if newline:
                yield from whole.decode("utf-8", errors="replace").splitlines()
        time.sleep(poll)
