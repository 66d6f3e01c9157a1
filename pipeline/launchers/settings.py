"""How jobs are started, and what is done when one fails. None of it enters an artifact's key."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from eopd.pipeline.launchers.ray.settings import RaySettings
from eopd.pipeline.launchers.slurm.settings import SlurmSettings
from eopd.stages.settings import COUNT, DAY, PROCESSES, Settings, setting


class FaultSettings(Settings):
    attempts: int = setting(3, "Failures after which a part counts as poisoned.", keyed=False, ge=1, le=1000)
    losses: int = setting(
        10,
        "Workers that may be lost over one part (killed, node gone) without any progress, before a further loss "
        "counts as a failure of it.",
        keyed=False,
        ge=1,
        le=COUNT,
    )
    backoff_seconds: float = setting(
        2.0, "Wait before the second attempt; doubled before each further one.", keyed=False, ge=0.0, le=DAY
    )
    backoff_limit_seconds: float = setting(300.0, "The longest such wait.", keyed=False, ge=0.0, le=DAY)
    poisoned: Literal["stop", "set_aside"] = setting(
        "stop",
        "A part that failed `attempts` times. stop: everything that can be done without it is done, then the run "
        "ends. set_aside: it is committed empty, by name, and the run goes on without its responses.",
        keyed=False,
    )
    full_poll_seconds: float = setting(
        5.0, "How often the free space is looked at while a full disk holds the run up.", keyed=False, gt=0.0, le=DAY
    )


class LauncherSettings(Settings):
    kind: Literal["inline", "local", "ray", "slurm"] = setting(
        "local",
        "inline: every stage in this process. local: sub-processes (which give their memory back), one a GPU. ray: "
        "tasks on a Ray cluster. slurm: job arrays on a Slurm cluster.",
        keyed=False,
    )
    gpus: list[Annotated[int, Field(ge=0, le=PROCESSES)]] | None = setting(
        None, "local: numbers of the GPUs to use, one job on each. Null: all that are visible.", keyed=False
    )
    workers: int = setting(1, "local, without GPUs: how many tasks run at once.", keyed=False, ge=1, le=PROCESSES)
    warm: bool = setting(
        True,
        "Workers stay up between tasks, with what they imported and the engines they opened; a new student's weights "
        "are taken in place and probed. False: a fresh process (inline: a fresh engine) for every task.",
        keyed=False,
    )
    faults: FaultSettings = setting(FaultSettings, "What is done when a job fails.", keyed=False)
    ray: RaySettings = setting(RaySettings, "What the ray launcher asks for.", keyed=False)
    slurm: SlurmSettings = setting(SlurmSettings, "What the slurm launcher asks for.", keyed=False)
