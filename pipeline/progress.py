"""Progress display: bars on a terminal, occasional lines elsewhere, events from workers.

Workers in other processes write what they would show to a file, one JSON event a line; ``replay`` shows it here.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

from rich.console import Console
from rich.progress import (
    BarColumn,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from eopd.pipeline.errors import Outcome
from eopd.stages.format import duration, escaped
from eopd.stages.job import NullProgress, Progress
from eopd.storage.jsonl import append_line, parse_lines
from eopd.storage.stopping import stop_wished

LINE_EVERY_SECONDS = 15.0
EVENT_EVERY_SECONDS = 0.2
RATE_SECONDS = 30.0


_bars: WeakSet[_Bar] = WeakSet()  # what this process shows


def seconds_in_hand() -> float | None:
    """Return the seconds until the parts in progress are committed, by this process's bars; None if unknown."""
    left = [bar.seconds_in_hand() for bar in list(_bars)]
    return max((seconds for seconds in left if seconds is not None), default=None)


class _Bar:
    """Units done of a total (0: unknown), at the rate of the last ``RATE_SECONDS``."""

    def __init__(self) -> None:
        self.total = self.done = self.in_hand = 0
        self.estimated = False
        self._moments: deque[tuple[float, int]] = deque()
        _bars.add(self)

    def start(self, total: int) -> None:
        self.total, self.done, self.in_hand, self.estimated = total, 0, 0, False
        self._moments = deque([(time.monotonic(), 0)])

    def expect(self, total: int, in_hand: int) -> None:
        self.estimated = self.estimated or total != self.total
        self.total, self.in_hand = max(total, self.done), in_hand

    def advance(self, n: int) -> None:
        self.done += n
        self.in_hand = max(self.in_hand - n, 0)
        now = time.monotonic()
        if not self._moments or now - self._moments[-1][0] >= 1.0:
            self._moments.append((now, self.done))
        while len(self._moments) > 2 and self._moments[0][0] < now - RATE_SECONDS:
            self._moments.popleft()

    @property
    def rate(self) -> float:
        began, done = self._moments[0] if self._moments else (0.0, 0)
        return (self.done - done) / max(time.monotonic() - began, 1e-9)

    def seconds_left(self) -> float | None:
        return (self.total - self.done) / self.rate if self.rate and self.total > self.done else None

    def seconds_in_hand(self) -> float | None:
        return self.in_hand / self.rate if self.rate and self.in_hand else None


class Display(Protocol):
    """A place to show the progress of several jobs at once."""

    def open(self) -> Progress:
        """Open a place for one job."""


@dataclass(frozen=True)
class SingleDisplay:
    """A display of one job that already has a place."""

    progress: Progress

    def open(self) -> Progress:
        return self.progress


def make_display() -> Display:
    return TerminalDisplay() if sys.stderr.isatty() else LineDisplay()


class TerminalDisplay:
    """rich progress bars on stderr, one per job, removed when nothing runs."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._bars: Bars | None = None

    def open(self) -> TerminalProgress:
        return TerminalProgress(self)

    def bars(self) -> Bars:
        if self._bars is None:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TextColumn("{task.fields[figures]}", style="dim"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bars = Bars(*columns, console=self.console, transient=True)
            self._bars.start()
        return self._bars

    def remove(self, task: TaskID) -> None:
        bars = self.bars()
        bars.remove_task(task)
        if not bars.tasks:
            bars.stop()
            self._bars = None


class TerminalProgress:
    """One bar of a display."""

    def __init__(self, display: TerminalDisplay) -> None:
        self._display = display
        self._task: TaskID | None = None
        self._bar, self._unit = _Bar(), "tokens"

    def start(self, what: str, total: int, unit: str = "tokens") -> None:
        self.close()
        self._task = self._display.bars().add_task(what, total=total or None, rate="", figures="")
        self._bar.start(total)
        self._unit = unit

    def advance(self, n: int, **figures: float) -> None:
        if self._task is None:
            return
        self._bar.advance(n)
        if figures:
            self._display.bars().update(self._task, figures=_figures(figures))
        self._display.bars().update(self._task, advance=n, rate=f"{self._bar.rate:,.0f} {self._unit}/s")

    def expect(self, total: int, in_hand: int = 0) -> None:
        self._bar.expect(total, in_hand)
        if self._task is not None:
            self._display.bars().update(self._task, total=total or None)

    def line(self, text: str) -> None:
        self._display.console.print(escaped(text), highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.start(0)
        if self._task is not None:
            self._display.remove(self._task)
            self._task = None


class LineDisplay:
    def open(self) -> LineProgress:
        return LineProgress()


class LineProgress:
    """Plain lines on stderr, for logs and pipes."""

    def __init__(self) -> None:
        self._what, self._unit = "", "tokens"
        self._bar = _Bar()
        self._spoken = 0.0

    def start(self, what: str, total: int, unit: str = "tokens") -> None:
        self._what, self._unit = what, unit
        self._bar.start(total)
        self._spoken = time.monotonic()

    def advance(self, n: int, **figures: float) -> None:
        self._bar.advance(n)
        if time.monotonic() - self._spoken < LINE_EVERY_SECONDS:
            return
        self._spoken = time.monotonic()
        total = f"of {'about ' if self._bar.estimated else ''}{self._bar.total:,} " if self._bar.total else ""
        texts = [
            f"  {self._what}: {self._bar.done:,} {total}{self._unit}",
            f"{self._bar.rate:,.0f} {self._unit}/s",
        ]
        left, in_hand = self._bar.seconds_left(), self._bar.seconds_in_hand()
        if stop_wished() and in_hand is not None:
            texts.append(f"stopping in about {duration(in_hand)}")
        elif left is not None:
            texts.append(f"about {duration(left)} left")
        self.line(", ".join([*texts, *filter(None, [_figures(figures)])]))

    def expect(self, total: int, in_hand: int = 0) -> None:
        self._bar.expect(total, in_hand)

    def line(self, text: str) -> None:
        sys.stderr.write(escaped(text) + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        self._bar.start(0)


class EventProgress:
    """Progress of a worker, as events in a file that its parent reads. Failed writes to the file are ignored.

    Started bars and lines are also printed to stderr, which is the worker's log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._moved, self._told = 0, 0.0
        self._figures: dict[str, float] = {}
        self._expected: list[int] | None = None

    def start(self, what: str, total: int, unit: str = "tokens") -> None:
        sys.stderr.write(f"{what}: {total:,} {unit}\n" if total else f"{what}\n")
        self._tell(start=[what, total, unit])

    def advance(self, n: int, **figures: float) -> None:
        self._moved += n
        self._figures |= figures
        if time.monotonic() - self._told >= EVENT_EVERY_SECONDS:
            self._flush()

    def expect(self, total: int, in_hand: int = 0) -> None:
        self._expected = [total, in_hand]  # goes with the next advance

    def line(self, text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
        self._tell(line=text)

    def close(self) -> None:
        self._tell(close=True)

    def end(self, outcome: Outcome) -> None:
        """Report how the task ended."""
        self._tell(**outcome.to_json())

    def _flush(self) -> None:
        moved, self._moved = self._moved, 0
        self._told = time.monotonic()
        self._write({"advance": moved, "figures": self._figures})
        if self._expected is not None:
            self._write({"expect": self._expected})
            self._expected = None

    def _tell(self, **event: Any) -> None:
        if self._moved:
            self._flush()
        self._write(event)

    def _write(self, event: dict[str, Any]) -> None:
        with suppress(OSError):
            append_line(self._path, event)


class Replay:
    """Show the events of one worker's file as they arrive. ``outcome``: the reported end of its task, if any."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self._path, self._progress = path, progress
        self._read = 0
        self.outcome: Outcome | None = None

    def catch_up(self) -> None:
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return
        whole, newline, _ = new.rpartition(b"\n")
        self._read += len(whole) + len(newline)
        for event in parse_lines(whole):
            if "outcome" in event:
                self.outcome = Outcome.from_json(event)
            else:
                replay(event, self._progress)

    def close(self) -> None:
        self.catch_up()
        self._progress.close()


def read_outcome(path: Path) -> Outcome | None:
    """Return the last outcome in a worker's events file; None if there is none."""
    reader = Replay(path, NullProgress())
    reader.catch_up()
    return reader.outcome


def replay(event: dict[str, Any], progress: Progress) -> None:
    """Show one event of an ``EventProgress``."""
    if "start" in event:
        progress.start(*event["start"])
    elif "advance" in event:
        progress.advance(event["advance"], **event["figures"])
    elif "expect" in event:
        progress.expect(*event["expect"])
    elif "line" in event:
        progress.line(event["line"])
    elif "close" in event:
        progress.close()


def _figures(figures: dict[str, float]) -> str:
    shown = {name: f"{value:,.0f}" if value == round(value) else f"{value:.4g}" for name, value in figures.items()}
    return " ".join(f"{name} {text}" for name, text in shown.items())
