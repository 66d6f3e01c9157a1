"""`eopd status`: the work in progress, its rates, and failures.

No worker is queried: parts in progress are those with held claims, rates come from the latest commits, steps of
training from the run's metrics, and failures from its jobs.jsonl.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eopd.pipeline.forecast import Forecast, Row, forecast
from eopd.pipeline.logs import tail
from eopd.pipeline.run import Run
from eopd.storage import paths
from eopd.storage.claims import holder
from eopd.storage.jsonl import parse_lines, read_lines

RECENT_PARTS = 16
RECENT_SECONDS = 3600.0
SHOWN_ERRORS = 3


@dataclass(frozen=True)
class Activity:
    """A job in progress."""

    row: Row
    workers: dict[str, list[int]]  # who holds which parts
    seconds_per_part: float | None  # between the latest commits; None: there were none lately
    step: dict[str, Any] | None  # of training: its last line of metrics
    steps: int = 0
    steps_at_most: bool = False  # training reads a selection, whose size is known once it has begun

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the job is done, at the latest rate."""
        if self.step is not None and self.steps:
            rate = self.step["tokens"] / max(self.step["tokens_per_s"], 1e-9)
            return max(self.steps - int(self.step["step"]) - 1, 0) * rate
        return None if self.seconds_per_part is None else self.row.missing * self.seconds_per_part


@dataclass(frozen=True)
class Failure:
    """A task that failed and whose parts were not done since."""

    job: str
    message: str
    when: float  # seconds since the epoch


@dataclass(frozen=True)
class Status:
    forecast: Forecast
    activities: tuple[Activity, ...]
    failures: tuple[Failure, ...]
    now: float


def take_status(runs: Sequence[Run]) -> Status:
    rows = forecast(runs)
    under_way = [
        _activity(row) for row in rows.rows if not row.is_done and row.run.artifact(row.job.output).folder.is_dir()
    ]
    failures = sorted((failure for run in runs for failure in _failures(run)), key=lambda one: -one.when)
    return Status(rows, tuple(under_way), tuple(failures[:SHOWN_ERRORS]), time.time())


def _activity(row: Row) -> Activity:
    artifact = row.run.artifact(row.job.output)
    workers: dict[str, list[int]] = {}
    committed = artifact.committed()
    for part in sorted(paths.parts_named("\n".join(artifact.names()), paths.CLAIM)):
        if part not in committed and (who := holder(artifact, part)) is not None:
            workers.setdefault(who, []).append(part)
    trains = row.job.scratch is not None and bool(workers)
    step = _last_step(row) if trains else None
    experiment = row.run.experiment
    return Activity(
        row,
        workers,
        _seconds_per_part(artifact.folder),
        step,
        steps=experiment.most_steps(row.round),
        steps_at_most=experiment.settings.selects_by_verdict,
    )


def _seconds_per_part(folder: Path) -> float | None:
    times = sorted(path.lstat().st_mtime for path in folder.glob("part-*.json"))[-RECENT_PARTS:]
    if len(times) < 2 or time.time() - times[-1] > RECENT_SECONDS:
        return None
    return (times[-1] - times[0]) / (len(times) - 1)


def _last_step(row: Row) -> dict[str, Any] | None:
    metrics = row.run.paths.metrics
    if not metrics.is_file():
        return None
    for line in reversed(tail(metrics, 5)):
        for step in parse_lines(line.encode(errors="replace")):
            if step.get("round") == row.round and _is_step(step):
                return step
    return None


def _is_step(line: dict[str, Any]) -> bool:
    """True for a line of metrics with the numbers that are shown; the loss alone may be infinite or NaN."""
    shown = [line.get(name) for name in ("step", "tokens", "tokens_per_s")]
    return isinstance(line.get("loss"), (int, float)) and all(
        isinstance(value, (int, float)) and math.isfinite(value) for value in shown
    )


def _failures(run: Run) -> Iterator[Failure]:
    """Return the last failure of each job of a run, unless the job made progress afterwards."""
    last: dict[str, Failure | None] = {}  # by the job's name
    for line in read_lines(run.paths.jobs):
        job, when = f"{line.get('stage')} {line.get('round')}", line.get("time")
        if "outcome" in line:
            at = float(when) if isinstance(when, (int, float)) and math.isfinite(when) else 0.0
            last[job] = Failure(job, str(line.get("message", "")), at)
        elif line.get("made"):
            last[job] = None
    yield from (failure for failure in last.values() if failure is not None)
