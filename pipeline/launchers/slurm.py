"""The Slurm launcher: submits the whole plan at once, as job arrays that depend on each other.

No process has to stay up: tasks requeue themselves, and the store records what is done. The process that follows the
jobs only shows their progress, and resubmits lost tasks once the queue is empty.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from eopd.pipeline.config import ConfigError
from eopd.pipeline.errors import EXIT_CODES, RunError
from eopd.pipeline.launchers.settings import LauncherSettings, SlurmSettings
from eopd.pipeline.launchers.slurm_arrays import Array, Place, arrays_of, dependency, missing_count, render
from eopd.pipeline.logs import tail
from eopd.pipeline.progress import read_outcome
from eopd.pipeline.scheduler import OpenJob
from eopd.pipeline.tasks import Work, few_parts
from eopd.stages.job import Progress
from eopd.storage.files import replace_atomically
from eopd.storage.stopping import Stopped

# -- Slurm's commands -------------------------------------------------------------------------------------------------

# Slurm's commands: sbatch, squeue, sacct and scancel.


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


# -- the launcher -----------------------------------------------------------------------------------------------------

SUBMITTED = "submitted.json"
NAMED_FAILURES = 5
KILLED = 128  # a shell's exit codes from here on: ended by a signal
COMMON_REASONS = {"None", "Dependency", "Priority", "Resources", "BeginTime", "JobArrayTaskLimit"}
SILENT_LOOKS = 3


class SlurmLauncher:
    def __init__(self, settings: LauncherSettings, progress: Progress) -> None:
        self._settings, self._slurm, self._progress = settings, settings.slurm, progress
        self._jobs: list[int] = []  # in the queue, as far as we know

    def launch(self, work: Work) -> bool:
        """Submit what is missing and, unless ``slurm.wait`` is off, follow it to its end. True if it has ended.

        Raises:
            RunError: Slurm refused the first job, or the queue has run dry and nothing more was done; names the failed
                tasks and their logs.
            Stopped: whoever follows has left; the jobs go on.
        """
        try:
            return self._launch(work)
        except (KeyboardInterrupt, Stopped):
            if self._jobs:
                self._leave()
            raise

    def _launch(self, work: Work) -> bool:
        self._jobs = self._queued(work)
        if self._jobs:
            self._progress.line(f"slurm: jobs {_ids(self._jobs)} of an earlier submission are in the queue")
            if not self._slurm.wait:
                return False
            self._follow(work)
        slurm = self._slurm
        while arrays := arrays_of(work := _reopened(work), slurm):
            before = _state(work)
            submitted = self._submit(arrays)
            if not slurm.wait:
                self._progress.line(
                    f"slurm: submitted {len(submitted)} arrays (jobs {_ids(submitted)}); the same command follows them"
                )
                return False
            self._follow(work)
            work = _reopened(work)
            slurm = self._after(work, list(failures(submitted)), gained=_state(work) != before)
        return True

    def _submit(self, arrays: Sequence[Array]) -> dict[int, Array]:
        """Submit in order. If Slurm refuses more (limits on queued jobs), the rest is submitted later."""
        submitted: dict[int, Array] = {}
        self._jobs = []
        ids: dict[Array, int] = {}
        for array in arrays:
            array.run.paths.logs.mkdir(parents=True, exist_ok=True)
            text = render(array, self._slurm, self._settings.faults.attempts, Place.here(self._slurm))
            replace_atomically(array.script, text)
            replace_atomically(array.tasks_file, array.tasks_text())
            for index in array.chunks:
                array.events(index).unlink(missing_ok=True)
            array.run.artifact(array.job.output).begin()  # so that no task settles on other scores that would serve
            try:
                job = submit(array.script, dependency(array, ids))
            except NotAccepted as refused:
                if not submitted:
                    raise
                self._progress.line(
                    f"slurm: took {len(submitted)} of {len(arrays)} arrays, the rest comes later: {refused}"
                )
                break
            ids[array] = job
            submitted[job] = array
            self._jobs.append(job)
            replace_atomically(array.script.parent / SUBMITTED, json.dumps({"jobs": list(submitted)}) + "\n")
        return submitted

    def _queued(self, work: Work) -> list[int]:
        """Return the jobs of an earlier submission that have not ended."""
        jobs: set[int] = set()
        for folder in {run.paths.slurm for run, _ in work}:
            with suppress(FileNotFoundError):
                jobs.update(json.loads((folder / SUBMITTED).read_text(encoding="utf-8"))["jobs"])
        states = look(jobs) if jobs else {}
        if states is None:
            raise RunError(
                f"squeue does not answer, and jobs {_ids(jobs)} of an earlier submission may still be in the queue",
                remedy="Try again when it does.",
            )
        return sorted({job for (job, _), state in states.items() if not state.ended})

    def _follow(self, work: Work) -> None:
        """Show the progress of the jobs until none is in the queue."""
        watch = Watch(work, self._progress)
        try:
            while watch.look(look(self._jobs)):
                time.sleep(self._slurm.poll_seconds)
        finally:
            self._progress.close()

    def _leave(self) -> None:
        ids = " ".join(map(str, self._jobs))
        with suppress(KeyboardInterrupt, Stopped, EOFError):
            if sys.stdin.isatty() and input("\nCancel the jobs as well? [y/N] ").strip().lower() in {"y", "yes"}:
                cancel(self._jobs)
                self._progress.line("slurm: cancelled; parts in hand are committed first")
                return
        self._progress.line(
            f"slurm: the jobs go on without this command. The same command follows them; `scancel {ids}` cancels them."
        )

    def _after(self, work: Work, failed: Sequence[Failure], *, gained: bool) -> SlurmSettings:
        """Handle an empty queue: name the failures, and say how missing parts are submitted again.

        If nothing was gained it is submitted part by part, so that a part to blame ends up alone; if that gains nothing
        either, the part is set aside or the run stops, as the settings say.
        """
        for failure in failed[:NAMED_FAILURES]:
            self._progress.line(f"slurm: {failure}")
        if len(failed) > NAMED_FAILURES:
            self._progress.line(f"slurm: and {len(failed) - NAMED_FAILURES} more tasks")
        left = missing_count(work)
        aside = set_aside(failed) if self._settings.faults.poisoned == "set_aside" else []
        for line in aside:
            self._progress.line(f"slurm: {line}")
        several = any(len(failure.requested) > 1 and failure.array.job.stage.divisible for failure in failed)
        if left and not gained and not aside and not several:
            what = failed[0] if failed else "no task has failed; were they cancelled?"
            raise RunError(
                f"{left} parts are missing, and running them again gained nothing: {what}",
                remedy="What was committed is kept; the same command goes on from there.",
            )
        if left:
            self._progress.line(f"slurm: {left} parts are missing; submitting them again")
        return self._slurm if gained or aside else self._slurm.model_copy(update={"parts_per_task": 1})


def _reopened(work: Work) -> Work:
    """Open the runs again on the current store: pruned parts may no longer have to be rebuilt."""
    runs = {id(run): replace(run) for run, _ in work}
    return [(runs[id(run)], job) for run, job in work]


def _state(work: Work) -> tuple[int, list[int]]:
    """Return a value that changes with any progress: missing parts, and kept steps of unfinished training."""
    return missing_count(work), [run.scratch_steps(job) for run, job in work]


def _ids(jobs: Iterable[int]) -> str:
    return ", ".join(map(str, jobs))


# -- failures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A task that started and left parts undone."""

    array: Array
    task: str  # in Slurm's notation: 12_3
    requested: tuple[int, ...]
    undone: tuple[int, ...]
    state: str  # Slurm's word for its end
    log: Path
    code: int | None
    message: str

    def __str__(self) -> str:
        what = f"{self.array.job.name}, {few_parts(self.undone)}"
        return f"{what}: task {self.task} {self.state}: {self.message} (log: {self.log})"

    @property
    def blames_a_part(self) -> bool:
        """True if the task failed by itself (not killed, no full disk) and had one part only."""
        failed = self.code is not None and 0 < self.code < KILLED and self.code != EXIT_CODES["full"]
        return failed and len(self.requested) == 1 and self.array.job.stage.divisible


def failures(submitted: Mapping[int, Array]) -> Iterator[Failure]:
    """List the failed tasks of jobs that are no longer in the queue."""
    states = look(submitted) or {}
    for job, array in submitted.items():
        missing = array.run.missing_parts(array.job)
        for index, parts in array.chunks.items():
            undone = tuple(part for part in parts if part in missing)
            log = array.log(str(job), str(index))
            if undone and log.exists():  # without a log it never began: a dependency has failed
                known = states.get((job, index))
                state = known.state if known else ended_as(job, index)
                outcome = read_outcome(array.events(index))
                message = outcome.message if outcome and outcome.message else _last_line(log)
                code = exit_code(job, index)
                yield Failure(array, f"{job}_{index}", parts, undone, state, log, code, message)


def set_aside(failed: Sequence[Failure]) -> list[str]:
    """Set the parts at fault aside if all others of their job are done; returns lines that name them."""
    lines = []
    for array in {failure.array for failure in failed}:
        poisoned = {one.undone[0]: str(one) for one in failed if one.array is array and one.blames_a_part}
        if poisoned and OpenJob(array.run, array.job, poisoned=dict(poisoned)).set_poisoned_aside():
            lines.append(f"{array.job.name}: {few_parts(sorted(poisoned))} set aside")
    return lines


def _last_line(log: Path) -> str:
    """Return the last log line of a task that reported no outcome."""
    lines = [line.strip() for line in tail(log, 200) if line.strip()]
    return lines[-1] if lines else "no output"


# -- progress --------------------------------------------------------------------------------------------------------


class Watch:
    """Displays the state of Slurm and the store as a bar and lines."""

    def __init__(self, work: Work, progress: Progress) -> None:
        self._open = [(run, job) for run, job in work if not run.is_done(job)]
        self._progress = progress
        self._left = missing_count(self._open)
        self._silent, self._reason = 0, ""
        progress.start("slurm", self._left, unit="parts")

    def look(self, states: Mapping[tuple[int, int], TaskState] | None) -> bool:
        """Update the display; returns True if anything is still in the queue."""
        for run, job in [pair for pair in self._open if pair[0].is_done(pair[1])]:
            self._progress.line(f"{job.name}: done -> {run.artifact(job.output).folder}")
            self._open.remove((run, job))
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
