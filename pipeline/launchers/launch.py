"""Dispatch by ``launcher.kind``, and the pool that does every task in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from eopd.pipeline import worker
from eopd.pipeline.config import ConfigError, RunSettings
from eopd.pipeline.errors import Outcome
from eopd.pipeline.launchers.local import LocalPool
from eopd.pipeline.launchers.ray import RayPool
from eopd.pipeline.launchers.slurm import SlurmLauncher
from eopd.pipeline.launchers.slurm_arrays import Place, dry_run
from eopd.pipeline.progress import Display
from eopd.pipeline.scheduler import run_jobs
from eopd.pipeline.tasks import Pool, Task, Work
from eopd.stages.stage import Stage

if TYPE_CHECKING:
    from eopd.stages.engines.kept import Engines


def launch(work: Work, settings: RunSettings, display: Display) -> bool:
    """Do all jobs of ``work`` as ``settings.launcher`` says. Returns False if a batch system took them over.

    Raises:
        RunError: some could not be done; the message says which and why.
        Stopped: the process was asked to stop.
    """
    launcher = settings.launcher
    if launcher.kind == "slurm":
        return SlurmLauncher(launcher, display.open()).launch(work)
    pools: dict[str, Callable[[RunSettings, Display], Pool]]
    pools = {"inline": InlinePool, "local": LocalPool, "ray": RayPool}
    run_jobs(work, pools[launcher.kind](settings, display), launcher.faults)
    return True


def show_submission(work: Work, settings: RunSettings) -> str:
    """Return the text that would be submitted to a batch system.

    Raises:
        ConfigError: the launcher is no batch system.
    """
    launcher = settings.launcher
    if launcher.kind != "slurm":
        raise ConfigError(
            f"--dry-run shows the scripts of launcher.kind=slurm; here it is {launcher.kind}",
            setting="--dry-run",
            remedy="`eopd plan CONFIG` shows what would be done.",
        )
    return dry_run(work, launcher.slurm, launcher.faults.attempts, Place.here(launcher.slurm))


class InlinePool:
    """A pool of one task in this process; the task runs inside ``wait``."""

    def __init__(self, settings: RunSettings, display: Display) -> None:
        self._task: Task | None = None
        self._warm = settings.launcher.warm
        self._engines: Engines | None = None

    def room(self, stage: Stage) -> int:
        return 1 if self._task is None else 0

    def start(self, task: Task) -> None:
        assert self._task is None
        self._task = task

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        from eopd.stages.engines.kept import Engines

        task, self._task = self._task, None
        if task is None:
            time.sleep(seconds)
            return []
        if self._engines is None:
            self._engines = Engines(keep=self._warm)
        return [(task, worker.do(task, self._engines))]

    def close(self) -> None:
        self._task = None
        if self._engines is not None:
            self._engines.close()
