"""`eopd status` and the tables of `eopd plan`: the work in progress, its rates, and failures.

No worker is queried: parts in progress are those with held claims, rates come from the latest commits, steps of
training from the run's metrics, and failures from its jobs.jsonl.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from eopd.pipeline.forecast import Forecast, Row, Total, forecast
from eopd.pipeline.logs import tail
from eopd.pipeline.run import Run
from eopd.stages.format import duration, escaped, number, size
from eopd.stages.table import STAGES
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


# -- tables -----------------------------------------------------------------------------------------------------------

# Forecast and status as terminal tables.


STYLES = {"complete": "green", "shared": "cyan", "partly": "yellow", "missing": "", "set aside": "red"}
FOLDED_ABOVE = 2  # more rounds than this that look alike are folded
NARROWEST = 120  # columns of a table that is written to a pipe


def make_console(width: int | None = None) -> Console:
    """Make a console on stdout; in a pipe it is wide enough for the tables."""
    console = PlainConsole(highlight=False, width=width)
    if width is None and not console.is_terminal:
        console = PlainConsole(highlight=False, width=NARROWEST)
    return console


class PlainConsole(Console):
    """A console that escapes control characters, since names and messages may come from anybody."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escaped(segment.text), segment.style)


# -- the plan --------------------------------------------------------------------------------------------------------


def plan_table(forecast: Forecast, *, every_job: bool = False) -> RenderableType:
    """Show one line per job, consecutive rounds in the same state folded into one; below, the basis of the figures."""
    several = len(forecast.runs) > 1
    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    for name in ("run",) if several else ():
        table.add_column(name, no_wrap=True)
    table.add_column("round", justify="right", no_wrap=True)
    table.add_column("job", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("parts", "tokens", "bytes", "time left"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("artifact", style="dim", no_wrap=True, overflow="ellipsis")
    lines = list(_folded(forecast.rows, every_job))
    for rows in lines:
        cells: list[str | Text] = [_rounds(rows), _kind_of_job(rows[0]), _state(rows), *_figures(rows), _artifact(rows)]
        table.add_row(*([_run_names(rows, forecast)] if several else []), *cells)
    return Group(table, Text(), *_reading(lines), *_below(forecast))


def _reading(lines: Sequence[Sequence[Row]]) -> Iterator[Text]:
    """Explain what the column `parts` counts, where it is not the parts of one artifact of samples."""
    if any(len(rows) > 1 for rows in lines):
        yield Text("A line for several rounds adds up their jobs; --all shows every job.")
    if any(rows[0].stage.endswith("_summary") for rows in lines):
        yield Text("A summary is a job of one part: the figures of an evaluation or alignment, from all of its parts.")


def _folded(rows: Sequence[Row], every_job: bool) -> Iterator[list[Row]]:
    """Group rows of a kind of job in consecutive rounds that look alike, to be shown in one line."""
    for _, of_runs in groupby(rows, key=lambda row: row.runs):
        by_round: dict[int, list[Row]] = {}
        for row in of_runs:
            by_round.setdefault(row.round, []).append(row)
        for rounds in _alike(by_round.values()):
            trained = sum(row.job.is_prunable for group in rounds for row in group)
            if every_job or trained <= FOLDED_ABOVE:
                yield from ([row] for group in rounds for row in group)
            else:
                kinds = dict.fromkeys(
                    _kind_of_job(row) for group in sorted(rounds, key=len, reverse=True) for row in group
                )
                yield from ([row for group in rounds for row in group if _kind_of_job(row) == kind] for kind in kinds)


def _alike(rounds: Iterable[list[Row]]) -> list[list[list[Row]]]:
    """Group consecutive rounds, starting a new group where a stage looks different; not every round is evaluated."""
    groups: list[list[list[Row]]] = []
    looks: dict[str, object] = {}
    for rows in rounds:
        own: dict[str, object] = {_kind_of_job(row): _look(row) for row in rows}
        if not groups or any(looks.get(kind, look) != look for kind, look in own.items()):
            groups.append([])
            looks = {}
        groups[-1].append(rows)
        looks |= own
    return groups


def _kind_of_job(row: Row) -> str:
    """Name a row's stage, and the variant where the stage has several jobs in a round."""
    return row.stage + (f" ({row.job.variant})" if row.job.variant else "")


def _look(row: Row) -> tuple[object, ...]:
    done = row.done if row.state == "partly" else 0
    return (row.stage, row.state, tuple(row.set_aside), done, row.pruned)


def _rounds(rows: Sequence[Row]) -> str:
    return str(rows[0].round) if len(rows) == 1 else f"{rows[0].round}-{rows[-1].round}"


def _run_names(rows: Sequence[Row], forecast: Forecast) -> str:
    names = rows[0].runs
    if len(names) == 1:
        return names[0]
    return "all" if len(names) == len(forecast.runs) else f"{names[0]} + {len(names) - 1}"


def _state(rows: Sequence[Row]) -> Text:
    text = Text(rows[0].state, style=STYLES[rows[0].state])
    if any(row.pruned for row in rows):
        text.append(", pruned" if all(row.pruned == row.parts for row in rows) else ", partly pruned")
    aside = sum(len(row.set_aside) for row in rows)
    if aside:
        parts = ", ".join(map(str, list(rows[0].set_aside)[:4])) if len(rows) == 1 else str(aside)
        text.append(f", set aside: {parts}", style=STYLES["set aside"])
    return text


def _figures(rows: Sequence[Row]) -> list[str]:
    done, parts = sum(row.done for row in rows), sum(row.parts for row in rows)
    bound = "≤ " if any(row.size.at_most for row in rows) else ""
    seconds = [row.seconds for row in rows]
    left = "not known yet" if None in seconds else duration(sum(second or 0.0 for second in seconds))
    tokens = sum(row.size.tokens for row in rows)
    all_done = all(row.is_done for row in rows)
    return [
        f"{done:,}/{parts:,}",
        bound + number(tokens) if tokens else "",
        size(sum(row.size.bytes for row in rows)) if all_done else _bytes(rows),
        "" if all_done or not tokens else left,
    ]


def _bytes(rows: Sequence[Row]) -> str:
    """Format a bound if every job has one, else an estimate."""
    bounds = [row.size.most_bytes for row in rows]
    if None not in bounds:
        return "≤ " + size(sum(bound or 0 for bound in bounds))
    return "about " + size(sum(row.size.bytes for row in rows))


def _artifact(rows: Sequence[Row]) -> str:
    identity = rows[0].job.output
    if len(rows) > 1:
        return f"{len(rows)} of {identity.kind}"
    key, _, coverage = identity.key.partition("/")
    return f"{identity.kind}/{key[:10]}" + (f"/{coverage[:6]}" if coverage else "")


def _below(forecast: Forecast) -> Iterator[Text]:
    total, peak = forecast.totals["all"], forecast.peak_bytes()
    bound, about = "at most " if total.at_most else "", "about " if total.missing else ""
    yield Text(
        f"{total.jobs:,} jobs, {total.done:,} of them done; {total.parts:,} parts, {total.missing:,} missing; "
        f"{bound}{number(total.tokens)} tokens, {about}{size(total.bytes)}."
    )
    if forecast.planned > len(forecast.rows):
        twice = forecast.planned - len(forecast.rows)
        yield Text(f"{len(forecast.runs)} runs plan {forecast.planned} jobs; {twice} are common work, done once.")
    yield Text(_time(forecast, total))
    enough = "" if peak - forecast.present_bytes < forecast.free_bytes else ": NOT ENOUGH"
    yield Text(
        f"Disk: {about}{size(peak)} at the peak, {size(forecast.present_bytes)} of it there; "
        f"{size(forecast.free_bytes)} free at {forecast.store}{enough}.",
        style="red" if enough else "",
    )
    aside = list(_set_aside(forecast.rows))
    yield from aside[:8]
    if aside:
        yield Text("`eopd store verify --repair` re-queues what was set aside.")


def _time(forecast: Forecast, total: Total) -> str:
    if not total.missing:
        return "Nothing is left to do."
    missing = {stage for stage, part in forecast.totals.items() if part.missing}
    rates = "; ".join(
        f"{stage} {1 / rate.seconds_per_token:,.0f} tokens/s ({rate.jobs} job{'s' if rate.jobs > 1 else ''})"
        for stage, rate in forecast.rates.items()
        if stage in missing
    )
    if not rates:
        return "Time: not known yet; this run has finished no such job."
    unknown = f", and {total.unknown} jobs of which no rate is known yet" if total.unknown else ""
    return f"Time of one worker: {duration(total.seconds)}{unknown}. Measured: {rates}."


def _set_aside(rows: Sequence[Row]) -> Iterator[Text]:
    for row in rows:
        for part, reason in row.set_aside.items():
            yield Text(f"Set aside: {row.job.name} part {part}: {reason}", style=STYLES["set aside"])


# -- the status ------------------------------------------------------------------------------------------------------


def status_view(status: Status) -> RenderableType:
    forecast = status.forecast
    total = forecast.totals["all"]
    names = ", ".join(forecast.names)
    head = Text.assemble((names, "bold"), f": {total.done} of {total.jobs} jobs done, store {forecast.store}")
    return Group(head, _stages(forecast), Text(), *_under_way(status), *_problems(status), _disk(forecast))


def _stages(forecast: Forecast) -> Table:
    table = Table.grid(padding=(0, 2))
    for stage in STAGES:
        total = forecast.totals.get(stage.name)
        if total is None:
            continue
        done = total.parts - total.missing
        rate = forecast.rates.get(stage.name)
        table.add_row(
            stage.name,
            ProgressBar(total.parts, done, width=28),
            f"{done:,}/{total.parts:,} parts",
            f"{'≤ ' if total.at_most else ''}{number(total.tokens)} tokens" if total.tokens else "",
            "" if rate is None else f"{1 / rate.seconds_per_token:,.0f} tokens/s a worker",
        )
    return table


def _under_way(status: Status) -> Iterator[RenderableType]:
    forecast = status.forecast
    total = forecast.totals["all"]
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
        table.add_row(*_activity_cells(activity, several=len(forecast.runs) > 1))
    if status.activities:
        yield table
    if total.seconds:
        # later jobs are assumed to get as many workers as hold claims now
        seconds = total.seconds / max(len(workers), 1)
        unknown = f", and {total.unknown} jobs of which no rate is known yet" if total.unknown else ""
        yield Text(f"About {duration(seconds)} left with {max(len(workers), 1)} at work{unknown}.")


def _activity_cells(activity: Activity, *, several: bool) -> list[str]:
    row, step = activity.row, activity.step
    name = f"{row.run.name}: {row.job.name}" if several else row.job.name
    done = f"{row.done:,}/{row.parts:,}"
    each = "" if activity.seconds_per_part is None else duration(activity.seconds_per_part)
    if step is not None:
        done = f"step {int(step['step']) + 1}/{'≤' if activity.steps_at_most else ''}{activity.steps}"
        each = f"{step['tokens_per_s']:,.0f} tokens/s, loss {step['loss']:.3g}"
    seconds = activity.seconds_left
    left = "" if seconds is None or not activity.workers else duration(seconds)
    who = "; ".join(
        f"{who}: part {', '.join(map(str, parts[:4]))}" if row.job.stage.divisible else who
        for who, parts in activity.workers.items()
    )
    return [name, done, each, left, who or "nobody"]


def _problems(status: Status) -> Iterator[Text]:
    yield from _set_aside(status.forecast.rows)
    for failure in status.failures:
        ago = duration(status.now - failure.when)
        yield Text(f"{failure.job} failed {ago} ago: {failure.message}", style=STYLES["set aside"])


def _disk(forecast: Forecast) -> Text:
    about = "about " if forecast.totals["all"].missing else ""
    return Text(
        f"{size(forecast.present_bytes)} of {about}{size(forecast.peak_bytes())} are there; "
        f"{size(forecast.free_bytes)} free.",
        style="dim",
    )
