"""From ``launcher.kind`` to what runs."""

from __future__ import annotations

from collections.abc import Sequence

from eopd.pipeline.config import RunSettings
from eopd.pipeline.launchers.base import Pool
from eopd.pipeline.launchers.inline import InlinePool
from eopd.pipeline.launchers.local import LocalPool
from eopd.pipeline.plan import PlannedJob
from eopd.pipeline.progress import Display
from eopd.pipeline.runner import Runner
from eopd.pipeline.scheduler import run_jobs


def bring_to_end(work: Sequence[tuple[Runner, PlannedJob]], settings: RunSettings, display: Display) -> None:
    """Run all jobs of ``work`` as ``settings.launcher`` says.

    Raises:
        ConfigError: some could not be done; the message says which and why.
        Stopped: the process was asked to stop.
    """
    launcher = settings.launcher
    pool: Pool = InlinePool() if launcher.kind == "inline" else LocalPool(settings, display)
    run_jobs(work, pool, launcher.faults)
