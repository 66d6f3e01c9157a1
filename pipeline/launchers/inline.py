"""Jobs in this process, one after the other: nothing is imported or loaded twice."""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING

from eopd.pipeline.ends import is_refusal
from eopd.pipeline.launchers.base import Kind, Outcome, Task
from eopd.pipeline.launchers.processes import stage_command, trains_together
from eopd.pipeline.logs import log_name
from eopd.pipeline.plan import Stage
from eopd.storage.files import is_full

if TYPE_CHECKING:
    from eopd.stages.engines.kept import Engines


class InlinePool:
    """A pool of one: a task that was started runs while its end is waited for."""

    def __init__(self, *, warm: bool = True) -> None:
        self._task: Task | None = None
        self._warm = warm
        self._engines: Engines | None = None

    def room(self, stage: Stage) -> int:
        return 1 if self._task is None else 0

    def start(self, task: Task) -> None:
        assert self._task is None
        self._task = task

    def wait(self, seconds: float) -> list[Outcome]:
        task, self._task = self._task, None
        if task is None:
            time.sleep(seconds)
            return []
        kind, message = run_here(self._with_engines(task))
        return [Outcome(task, kind, message)]

    def close(self) -> None:
        self._task = None
        if self._engines is not None:
            self._engines.close()

    def _with_engines(self, task: Task) -> Task:
        if self._engines is None:
            from eopd.stages.engines.kept import Engines

            self._engines = Engines(keep=self._warm)
        return replace(task, runner=replace(task.runner, engines=self._engines))


def run_here(task: Task) -> tuple[Kind, str]:
    """Do ``task`` in this process; its kind of end and what to tell a person of it."""
    if trains_together(task):
        code = subprocess.run([sys.executable, *stage_command(task)], check=False).returncode
        return ("failed", f"its processes ended with exit code {code}") if code else ("done", "")
    try:
        task.runner.run(task.job, task.parts)
    except Exception as error:  # whatever a stage raises, it is the scheduler that decides what becomes of the run
        task.runner.progress.close()
        if is_full(error):
            return "full", str(error)
        log = task.runner.paths.logs / log_name(task.job.stage, task.job.round)
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        return "refused" if is_refusal(error) else "failed", f"{str(error) or type(error).__name__} (log: {log})"
    return "done", ""
