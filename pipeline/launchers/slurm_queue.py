"""Slurm's commands: sbatch, squeue, sacct and scancel."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from eopd.pipeline.config import ConfigError
from eopd.pipeline.errors import RunError

ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip


class NotAccepted(RunError):
    """Slurm refused a job; the message is Slurm's."""


@dataclass(frozen=True)
class TaskState:
    state: str  # Slurm's word, such as PENDING
    reason: str  # why it waits, or "None"

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def submit(script: Path, dependency: str | None) -> int:
    """Submit a job array and return its id."""
    after = [f"--dependency={dependency}"] if dependency else []
    result = _call(["sbatch", "--parsable", *after, str(script)])
    if result.returncode:
        raise NotAccepted(f"sbatch {script}: {result.stderr.strip()}")
    return int(result.stdout.strip().partition(";")[0])


def look(jobs: Iterable[int]) -> Mapping[tuple[int, int], TaskState] | None:
    """Return the state of every array task of ``jobs`` that Slurm remembers; None if Slurm does not answer.

    Ended ones are remembered for a few minutes (MinJobAge).
    """
    wanted = set(jobs)
    result = _call(["squeue", "--me", "--states=all", "--array", "--noheader", "--format=%F|%K|%T|%r"])
    if result.returncode:
        return None
    states = {}
    for line in result.stdout.splitlines():
        job, index, state, reason = line.strip().split("|", 3)
        if int(job) in wanted:
            states[int(job), int(index)] = TaskState(state, reason)
    return states


def ended_as(job: int, index: int) -> str:
    """Return the final state of a task that left the queue, from the accounting if the cluster keeps one."""
    result = _call(["sacct", f"--jobs={job}_{index}", "--allocations", "--noheader", "--parsable2", "--format=State"])
    lines = result.stdout.split() if result.returncode == 0 else []
    return lines[0] if lines else "unknown"


def exit_code(job: int, index: int) -> int | None:
    """Return the exit code of a task's script; None if Slurm does not know it."""
    result = _call(["scontrol", "--oneliner", "show", "job", f"{job}_{index}"])
    match = re.search(r"\bExitCode=(\d+):(\d+)", result.stdout)
    return None if match is None or int(match.group(2)) else int(match.group(1))


def cancel(jobs: Iterable[int]) -> None:
    _call(["scancel", *map(str, jobs)])


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError(
            f"launcher.kind is slurm, but there is no {command[0]} here",
            setting="launcher.kind",
            remedy="Run this on a login node; `eopd run CONFIG --dry-run` shows the scripts anywhere.",
        ) from error
