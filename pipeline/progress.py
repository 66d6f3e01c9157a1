"""What a person sees while a stage works: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_SECONDS = 15.0


def make_progress() -> TerminalProgress | LineProgress:
    return TerminalProgress() if sys.stderr.isatty() else LineProgress()


class TerminalProgress:
    """A rich progress bar on stderr."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._began = 0.0
        self._unit = "tokens"

    def start(self, what: str, total: int, unit: str = "tokens") -> None:
        self.close()
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
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._task = self._bar.add_task(what, total=max(total, 1), rate="", figures="")
        self._began, self._unit = time.monotonic(), unit
        self._bar.start()

    def advance(self, n: int, **figures: float) -> None:
        if self._bar is None:
            return
        done = self._bar.tasks[0].completed + n
        rate = done / max(time.monotonic() - self._began, 1e-9)
        if figures:
            self._bar.update(self._task, figures=_figures(figures))
        self._bar.update(self._task, advance=n, rate=f"{rate:,.0f} {self._unit}/s")

    def line(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class LineProgress:
    """Plain lines on stderr, for logs and pipes."""

    def __init__(self) -> None:
        self._what, self._unit = "", "tokens"
        self._total = self._done = 0
        self._began = self._spoken = 0.0

    def start(self, what: str, total: int, unit: str = "tokens") -> None:
        self._what, self._total, self._unit, self._done = what, total, unit, 0
        self._began = self._spoken = time.monotonic()

    def advance(self, n: int, **figures: float) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._spoken < LINE_EVERY_SECONDS:
            return
        self._spoken = now
        rate = self._done / max(now - self._began, 1e-9)
        left = max(self._total - self._done, 0) / max(rate, 1e-9)
        self.line(
            f"  {self._what}: {self._done:,} of {self._total:,} {self._unit}, {rate:,.0f} {self._unit}/s, "
            f"about {left:.0f} s left {_figures(figures)}".rstrip()
        )

    def line(self, text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        self._total = 0


def _figures(figures: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in figures.items())
