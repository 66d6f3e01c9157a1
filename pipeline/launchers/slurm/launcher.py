"""Brings a plan to its end through Slurm: all of it is submitted at once, as job arrays that wait for each other.

Nothing has to stay up for the work to go on: tasks put themselves back into the queue, and the store says what is
done. Whoever follows only shows how it gets on, and submits anew what was lost when the queue has run dry.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

from eopd.pipeline.errors import RunError
from eopd.pipeline.launchers.settings import LauncherSettings
from eopd.pipeline.launchers.slurm import queue
from eopd.pipeline.launchers.slurm.arrays import Array, Work, arrays_of, missing_count
from eopd.pipeline.launchers.slurm.failures import Failure, failures, set_aside
from eopd.pipeline.launchers.slurm.script import Place, dependency, render, script_path
from eopd.pipeline.launchers.slurm.settings import SlurmSettings
from eopd.pipeline.launchers.slurm.watch import Watch
from eopd.stages.job import Progress
from eopd.storage.files import replace_atomically
from eopd.storage.stopping import Stopped

SUBMITTED = "submitted.json"
NAMED_FAILURES = 5


class SlurmLauncher:
    def __init__(self, settings: LauncherSettings, progress: Progress) -> None:
        self._settings, self._slurm, self._progress = settings, settings.slurm, progress
        self._jobs: list[int] = []  # in the queue, as far as we know

    def launch(self, work: Work) -> bool:
        """Submit what is missing and, unless ``slurm.wait`` is off, follow it to its end. Whether it has ended.

        Raises:
            RunError: Slurm refused the first job, or the queue has run dry and what is missing did not become
                less; names the failed tasks and their logs.
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
        while arrays := arrays_of(work := _as_it_is_now(work), slurm):
            before = _standing(work)
            submitted = self._submit(arrays)
            if not slurm.wait:
                self._progress.line(
                    f"slurm: submitted {len(submitted)} arrays (jobs {_ids(submitted)}); the same command follows them"
                )
                return False
            self._follow(work)
            work = _as_it_is_now(work)
            slurm = self._after(work, list(failures(submitted)), gained=_standing(work) != before)
        return True

    def _submit(self, arrays: Sequence[Array]) -> dict[int, Array]:
        """Submit in order; when Slurm takes no more (limits on queued jobs), what is left waits for the next time."""
        submitted: dict[int, Array] = {}
        self._jobs = []
        ids: dict[Array, int] = {}
        for array in arrays:
            path = script_path(array)
            array.runner.paths.logs.mkdir(parents=True, exist_ok=True)
            text = render(array, self._slurm, self._settings.faults.attempts, Place.here(self._slurm))
            replace_atomically(path, text)
            array.runner.artifact(array.job.output).begin()  # so that no task finds other scores that serve as well
            try:
                job = queue.submit(path, dependency(array, ids))
            except queue.NotAccepted as refused:
                if not submitted:
                    raise
                self._progress.line(
                    f"slurm: took {len(submitted)} of {len(arrays)} arrays, the rest comes later: {refused}"
                )
                break
            ids[array] = job
            submitted[job] = array
            self._jobs.append(job)
            replace_atomically(path.parent / SUBMITTED, json.dumps({"jobs": list(submitted)}) + "\n")
        return submitted

    def _queued(self, work: Work) -> list[int]:
        """Jobs of an earlier submission that have not ended."""
        jobs: set[int] = set()
        for folder in {runner.paths.slurm for runner, _ in work}:
            with suppress(FileNotFoundError):
                jobs.update(json.loads((folder / SUBMITTED).read_text(encoding="utf-8"))["jobs"])
        states = queue.look(jobs) if jobs else {}
        if states is None:
            raise RunError(
                f"squeue does not answer, and jobs {_ids(jobs)} of an earlier submission may still be in the queue. "
                "Try again when it does."
            )
        return sorted({job for (job, _), state in states.items() if not state.ended})

    def _follow(self, work: Work) -> None:
        """Show how the jobs get on until none is in the queue."""
        watch = Watch(work, self._progress)
        try:
            while watch.look(queue.look(self._jobs)):
                time.sleep(self._slurm.poll_seconds)
        finally:
            self._progress.close()

    def _leave(self) -> None:
        ids = " ".join(map(str, self._jobs))
        with suppress(KeyboardInterrupt, Stopped, EOFError):
            if sys.stdin.isatty() and input("\nCancel the jobs as well? [y/N] ").strip().lower() in {"y", "yes"}:
                queue.cancel(self._jobs)
                self._progress.line("slurm: cancelled; parts in hand are committed first")
                return
        self._progress.line(
            f"slurm: the jobs go on without this command. The same command follows them; `scancel {ids}` cancels them."
        )

    def _after(self, work: Work, failed: Sequence[Failure], *, gained: bool) -> SlurmSettings:
        """The queue has run dry: name what failed, and say how what is missing is submitted again.

        Where nothing was gained, part by part, so that a part that is to blame ends up alone; and that in vain, it is
        set aside or the run stops, as the settings say.
        """
        for failure in failed[:NAMED_FAILURES]:
            self._progress.line(f"slurm: {failure}")
        if len(failed) > NAMED_FAILURES:
            self._progress.line(f"slurm: and {len(failed) - NAMED_FAILURES} more tasks")
        left = missing_count(work)
        aside = set_aside(failed) if self._settings.faults.poisoned == "set_aside" else []
        for line in aside:
            self._progress.line(f"slurm: {line}")
        several = any(len(failure.asked) > 1 and failure.array.job.stage != "train" for failure in failed)
        if left and not gained and not aside and not several:
            what = failed[0] if failed else "no task has failed; were they cancelled?"
            raise RunError(
                f"{left} parts are missing, and running them again gained nothing: {what}. What was committed is "
                "kept; the same command goes on from there."
            )
        if left:
            self._progress.line(f"slurm: {left} parts are missing; submitting them again")
        return self._slurm if gained or aside else self._slurm.model_copy(update={"parts_per_task": 1})


def _as_it_is_now(work: Work) -> Work:
    """With runners that look at the store anew: what was pruned and wanted when they began may be so no longer."""
    runners = {id(runner): replace(runner) for runner, _ in work}
    return [(runners[id(runner)], job) for runner, job in work]


def _standing(work: Work) -> tuple[int, list[int]]:
    """What changes whenever something is gained: parts missing, and the steps that unfinished trainings have kept."""
    training = [runner.states(job).committed() for runner, job in work if job.stage == "train"]
    return missing_count(work), [max(steps, default=-1) for steps in training]


def _ids(jobs: Iterable[int]) -> str:
    return ", ".join(map(str, jobs))
