"""`eopd status`: what of a run is being done now, how fast, and what went wrong. Read from the store and run folder.

Nothing has to be asked of the processes that do the work: parts under way are those whose claims are held, rates are
those of the latest commits, steps of training are in the run's metrics.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from eopd.pipeline.logs import LastWords, errors, last_line, tail
from eopd.pipeline.overview import Overview, look
from eopd.pipeline.plan import STAGES, PlannedJob, steps_of_round
from eopd.pipeline.plan_table import STYLES
from eopd.pipeline.runner import Runner
from eopd.pipeline.survey import JobState
from eopd.stages.format import duration, number, size
from eopd.storage import paths
from eopd.storage.claims import holder
from eopd.storage.jsonl import parse_lines

RECENT_PARTS = 16
RECENT_SECONDS = 3600.0


@dataclass(frozen=True)
class Activity:
    """A job that is under way."""

    run: str
    state: JobState
    workers: dict[str, list[int]]  # who holds which parts
    seconds_per_part: float | None  # between the latest commits; None: there were none lately
    step: dict[str, Any] | None  # of training: its last line of metrics
    steps: int = 0

    @property
    def left(self) -> float | None:
        """Seconds until it is done, if it goes on as lately."""
        if self.step is not None and self.steps:
            rate = self.step["tokens"] / max(self.step.get("tokens_per_s", 0.0), 1e-9)
            return max(self.steps - int(self.step["step"]) - 1, 0) * rate
        return None if self.seconds_per_part is None else self.state.missing * self.seconds_per_part


@dataclass(frozen=True)
class Status:
    overview: Overview
    activities: tuple[Activity, ...]
    last: LastWords | None
    errors: tuple[LastWords, ...]
    now: float


def take_status(runners: Sequence[Runner]) -> Status:
    overview = look(runners)
    by_name = {runner.settings.name: runner for runner in runners}
    under_way = []
    for row in overview.rows:
        runner = by_name[row.state.runs[0]]
        if not row.state.is_done and runner.artifact(row.state.job.output).folder.is_dir():
            under_way.append(_activity(runner, row.state))
    found = [last_line(runner.paths.logs) for runner in runners]
    last = max((words for words in found if words is not None), key=lambda words: words.when, default=None)
    wrong = [words for runner in runners for words in errors(runner.paths.logs)]
    wrong.sort(key=lambda words: words.when, reverse=True)
    return Status(overview, tuple(under_way), last, tuple(wrong[:3]), time.time())


def _activity(runner: Runner, state: JobState) -> Activity:
    artifact = runner.artifact(state.job.output)
    workers: dict[str, list[int]] = {}
    committed = artifact.committed()
    for part in sorted(paths.parts_named("\n".join(artifact.names()), paths.CLAIM)):
        if part not in committed and (who := holder(artifact, part)) is not None:
            workers.setdefault(who, []).append(part)
    step = _last_step(runner, state.job) if state.job.stage == "train" and workers else None
    return Activity(
        state.runs[0], state, workers, _pace(artifact.folder), step, steps_of_round(runner.settings, runner.facts)
    )


def _pace(folder: Path) -> float | None:
    """Seconds between the latest commits."""
    times = sorted(path.lstat().st_mtime for path in folder.glob("part-*.json"))[-RECENT_PARTS:]
    if len(times) < 2 or time.time() - times[-1] > RECENT_SECONDS:
        return None
    return (times[-1] - times[0]) / (len(times) - 1)


def _last_step(runner: Runner, job: PlannedJob) -> dict[str, Any] | None:
    if not runner.paths.metrics.is_file():
        return None
    for line in reversed(tail(runner.paths.metrics, 5)):
        for found in parse_lines(line.encode(errors="replace")):
            if found.get("round") == job.round:
                return found
    return None


# -- shown ---------------------------------------------------------------------------------------------------------


def status_view(status: Status) -> RenderableType:
    overview = status.overview
    names = ", ".join(overview.runs)
    total = overview.totals["all"]
    head = Text.assemble((names, "bold"), f": {total.done} of {total.jobs} jobs done, store {overview.store}")
    return Group(head, _stages(overview), Text(), *_under_way(status), *_words(status))


def _stages(overview: Overview) -> Table:
    table = Table.grid(padding=(0, 2))
    for stage in STAGES:
        total = overview.totals.get(stage)
        if total is None:
            continue
        done = total.parts - total.missing
        rate = overview.rates.get(stage)
        table.add_row(
            stage,
            ProgressBar(total.parts, done, width=28),
            f"{done:,}/{total.parts:,} parts",
            f"{'≤ ' if total.at_most else ''}{number(total.tokens)} tokens",
            "" if rate is None else f"{1 / rate.seconds_per_token:,.0f} tokens/s a worker",
        )
    return table


def _under_way(status: Status) -> Iterator[RenderableType]:
    overview = status.overview
    total = overview.totals["all"]
    if not total.missing:
        yield Text("Everything is done.", style=STYLES["complete"])
        return
    workers = {who for activity in status.activities for who in activity.workers}
    if not workers:
        text = "No part is claimed: a worker is starting up, or nothing runs (`eopd run` goes on where it stopped)."
        yield Text(text, style=STYLES["partly"])
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("under way", "parts", "each", "left", "who"):
        table.add_column(name, no_wrap=name != "who")
    for activity in status.activities:
        table.add_row(*_row(activity, several=len(overview.runs) > 1))
    if status.activities:
        yield table
    if total.unknown < total.jobs - total.done:
        # what is running is done by as many as hold claims; later jobs are taken to be, too
        seconds = total.seconds / max(len(workers), 1)
        unknown = f", and {total.unknown} jobs of which no rate is known yet" if total.unknown else ""
        yield Text(f"About {duration(seconds)} are left with {max(len(workers), 1)} at work{unknown}.")


def _row(activity: Activity, *, several: bool) -> list[str]:
    state, step = activity.state, activity.step
    name = f"{activity.run}: {state.job.name}" if several else state.job.name
    done = f"{state.done:,}/{state.parts:,}"
    each = "" if activity.seconds_per_part is None else duration(activity.seconds_per_part)
    if step is not None:
        done = f"step {int(step['step']) + 1}/{activity.steps}"
        each = f"{step.get('tokens_per_s', 0.0):,.0f} tokens/s, loss {step['loss']:.3g}"
    left = "" if activity.left is None or not activity.workers else duration(activity.left)
    who = "; ".join(
        who if state.job.stage == "train" else f"{who}: part {', '.join(map(str, parts[:4]))}"
        for who, parts in activity.workers.items()
    )
    return [name, done, each, left, who or "nobody"]


def _words(status: Status) -> Iterator[Text]:
    for row in status.overview.rows:
        for part, reason in row.state.set_aside.items():
            yield Text(f"Set aside: {row.state.job.name} part {part}: {reason}", style=STYLES["set aside"])
    for words in status.errors:
        ago = duration(status.now - words.when)
        yield Text(f"Error in {words.log.name}, {ago} ago: {words.line}", style=STYLES["set aside"])
    if status.last is not None:
        yield Text(f"{status.last.log.name}: {status.last.line}", style="dim")
    overview = status.overview
    yield Text(
        f"{size(overview.present_bytes)} of {'about ' if overview.totals['all'].missing else ''}"
        f"{size(overview.peak_bytes)} are there; {size(overview.free_bytes)} free.",
        style="dim",
    )
