"""From ``launcher.kind`` to what runs."""

from __future__ import annotations

from collections.abc import Sequence

from eopd.pipeline.config import ConfigError, RunSettings
from eopd.pipeline.launchers.base import Pool
from eopd.pipeline.launchers.inline import InlinePool
from eopd.pipeline.launchers.local import LocalPool
from eopd.pipeline.launchers.processes import Spawn
from eopd.pipeline.launchers.ray.pool import RayPool
from eopd.pipeline.launchers.slurm.launcher import SlurmLauncher
from eopd.pipeline.launchers.slurm.script import Place, dry_run
from eopd.pipeline.launchers.warm import WarmWorkers
from eopd.pipeline.plan import PlannedJob
from eopd.pipeline.progress import Display
from eopd.pipeline.runner import Runner
from eopd.pipeline.scheduler import run_jobs


def bring_to_end(work: Sequence[tuple[Runner, PlannedJob]], settings: RunSettings, display: Display) -> bool:
    """Run all jobs of ``work`` as ``settings.launcher`` says. False when they were only handed to a batch system.

    Raises:
        RunError: some could not be done; the message says which and why.
        Stopped: the process was asked to stop.
    """
    launcher = settings.launcher
    if launcher.kind == "slurm":
        return SlurmLauncher(launcher, display.open()).launch(work)
    with WarmWorkers() as workers:
        spawn = workers.spawn if launcher.warm else None
        run_jobs(work, _pool(settings, display, spawn), launcher.faults)
    return True


def _pool(settings: RunSettings, display: Display, spawn: Spawn | None) -> Pool:
    if settings.launcher.kind == "inline":
        return InlinePool(warm=settings.launcher.warm)
    if settings.launcher.kind == "ray":
        return RayPool(settings, display)
    return LocalPool(settings, display, spawn)


def show_submission(work: Sequence[tuple[Runner, PlannedJob]], settings: RunSettings) -> str:
    """What would be handed to a batch system, as text.

    Raises:
        ConfigError: the launcher hands over nothing.
    """
    if settings.launcher.kind != "slurm":
        raise ConfigError(
            f"--dry-run shows the scripts of launcher.kind=slurm; here it is {settings.launcher.kind}. "
            "`eopd plan CONFIG` shows what would be done."
        )
    launcher = settings.launcher
    return dry_run(work, launcher.slurm, launcher.faults.attempts, Place.here(launcher.slurm))
