"""Shows how submitted jobs get on: what Slurm and the store say, as a bar and lines."""

from __future__ import annotations

from collections.abc import Mapping

from eopd.pipeline.launchers.slurm.arrays import Work, missing_count
from eopd.pipeline.launchers.slurm.queue import TaskState
from eopd.stages.job import Progress

COMMON_REASONS = {"None", "Dependency", "Priority", "Resources", "BeginTime", "JobArrayTaskLimit"}
SILENT_LOOKS = 3


class Watch:
    """Turns what Slurm and the store say into a bar and lines."""

    def __init__(self, work: Work, progress: Progress) -> None:
        self._open = [(runner, job) for runner, job in work if not runner.is_done(job)]
        self._progress = progress
        self._left = missing_count(self._open)
        self._silent, self._reason = 0, ""
        progress.start("slurm", self._left, unit="parts")

    def look(self, states: Mapping[tuple[int, int], TaskState] | None) -> bool:
        """Show it; whether anything is still in the queue."""
        self._tell_finished()
        left = missing_count(self._open)
        if states is None:
            self._silent += 1
            if self._silent == SILENT_LOOKS:
                self._progress.line("slurm: squeue does not answer; waiting for it")
            return True
        self._silent = 0
        live = [state for state in states.values() if not state.ended]
        waiting = [state for state in live if state.state == "PENDING"]
        self._progress.advance(self._left - left, running=len(live) - len(waiting), waiting=len(waiting))
        self._left = left
        reason = next((state.reason for state in waiting if state.reason not in COMMON_REASONS), "")
        if reason and reason != self._reason:
            self._progress.line(f"slurm: a job waits because of {reason}")
        self._reason = reason
        return bool(live)

    def _tell_finished(self) -> None:
        for runner, job in [pair for pair in self._open if pair[0].is_done(pair[1])]:
            self._progress.line(f"{job.name}: done -> {runner.artifact(job.output).folder}")
            self._open.remove((runner, job))
