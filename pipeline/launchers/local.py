"""Jobs on this machine: in this process, in a sub-process that gives its memory back, or in several at once."""

from __future__ import annotations

import os
import subprocess
import sys

from eopd.pipeline.config import ConfigError
from eopd.pipeline.plan import PlannedJob
from eopd.pipeline.runner import Runner


def launch(runner: Runner, job: PlannedJob) -> None:
    """Run ``job`` to its end as the settings say.

    Raises:
        ConfigError: the sub-process failed; it has said why.
    """
    if trains_together(runner, job):
        train_together(runner, job)
    elif runner.settings.launcher.kind == "inline":
        runner.run(job)
    else:
        _call(job, [sys.executable, *_stage_command(runner, job)])


def trains_together(runner: Runner, job: PlannedJob) -> bool:
    """Whether this is the process that has to start the several ones of a training job."""
    return job.stage == "train" and runner.settings.train.processes > 1 and "WORLD_SIZE" not in os.environ


def train_together(runner: Runner, job: PlannedJob) -> None:
    """Start ``train.processes`` processes of one training job through torchrun."""
    processes = str(runner.settings.train.processes)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    _call(job, [sys.executable, *torchrun, *_stage_command(runner, job)])


def rank() -> int:
    """Number of this process among those that train together; 0 when it is alone."""
    return int(os.environ.get("RANK", "0"))


def _stage_command(runner: Runner, job: PlannedJob) -> list[str]:
    return ["-m", "eopd.pipeline.cli", job.stage, str(runner.paths.config), "--round", str(job.round)]


def _call(job: PlannedJob, command: list[str]) -> None:
    code = subprocess.run(command, check=False).returncode
    if code:
        ended = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        raise ConfigError(f"{job.name} {ended}. What was committed is kept; the same command goes on from there.")
