"""The scheduler: does planned jobs with a pool of workers, starting ready parts and retrying failed ones.

A part is ready when its inputs are committed. Jobs of several runs that make the same artifact are one job. All state
is read from the store's commit markers and claims, so that other processes may work on the same jobs at the same time,
and a restarted scheduler continues from the store.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from eopd.pipeline.errors import Outcome, RunError
from eopd.pipeline.launchers.settings import FaultSettings
from eopd.pipeline.run import Run
from eopd.pipeline.tasks import Pool, Task, Work, few_parts
from eopd.stages.stage import Job
from eopd.storage import stopping
from eopd.storage.artifacts import Artifact
from eopd.storage.claims import Patience, claim, holder
from eopd.storage.errors import StoreFull
from eopd.storage.files import NO_INODES, Free, free_of
from eopd.storage.sources import filled_parts

# -- retries ----------------------------------------------------------------------------------------------------------

# Retry policy for parts of failed tasks. Pure: no clock, no store.
#
# A failed task of several parts is tried again whole, then in halves, so that the part at fault ends up alone; a part
# that has failed ``attempts`` times is poisoned. A task that refuses its input would do so again: it is halved at
# once, and a part that is refused alone is poisoned. A lost worker tells nothing about its parts: they are tried
# again without blame, until so many workers were lost without any progress that the parts must be suspected after
# all.


@dataclass(frozen=True)
class Batch:
    """Parts that were tried together and will be retried together."""

    parts: tuple[int, ...]
    failures: int = 0  # tasks in a row that failed over these parts
    losses: int = 0  # workers in a row that were lost over them
    not_before: float = 0.0  # seconds, of the scheduler's clock


@dataclass(frozen=True)
class Verdict:
    again: tuple[Batch, ...] = ()
    poisoned: int | None = None


def judge(
    batch: Batch,
    left: tuple[int, ...],
    kind: Literal["failed", "refused", "lost"],
    policy: FaultSettings,
    now: float,
    *,
    progress: bool,
    whole: bool,
) -> Verdict:
    """Decide about the parts ``left`` of ``batch``, whose task ended as ``kind``.

    Args:
        progress: something was committed meanwhile, so that what happened before is forgiven.
        whole: the parts are one piece of work (training) that cannot be divided.
    """
    losses, failures = (0, 0) if progress else (batch.losses, batch.failures)
    if kind == "lost" and losses < policy.losses:
        return Verdict((Batch(left, failures, losses + 1, now + backoff(policy, losses + 1)),))
    failures += 1
    alone = whole or len(left) == 1
    if alone and (failures >= policy.attempts or kind == "refused"):
        return Verdict(poisoned=left[0])
    later = now if kind == "refused" else now + backoff(policy, failures)
    if alone or (kind != "refused" and failures == 1 < policy.attempts):
        return Verdict((Batch(left, failures, losses, later),))
    middle = len(left) // 2
    known = min(failures, policy.attempts - 1)  # a part is given up only for failures that it has alone
    return Verdict(tuple(Batch(half, known, losses, later) for half in (left[:middle], left[middle:])))


def backoff(policy: FaultSettings, times: int) -> float:
    """Return the seconds to wait after ``times`` failures in a row."""
    return min(policy.backoff_seconds * 2.0 ** (times - 1), policy.backoff_limit_seconds)


# -- disk pause -------------------------------------------------------------------------------------------------------

# Pause on a full disk: no new task starts until there is space again.


ROOM_BYTES = 1 << 20
"""So much more than there was when the disk was full is worth another try."""
ROOM_INODES = 32
"""The same if inodes were short. Elsewhere they say nothing: some file systems derive them from the free bytes."""
FIRST_TRY_SECONDS, LAST_TRY_SECONDS = 10.0, 600.0
"""Waits before a try at an unchanged disk, doubled from one pause to the next: a quota shows in no figure, and space
may have been freed between the failure and the first look at it."""


class DiskPause:
    """A pause that begins when a worker ran out of disk space; it reports its start and its end."""

    def __init__(self, run: Run, message: str, poll_seconds: float, before: int = 0) -> None:
        """
        Args:
            before: pauses since a task was last done.
        """
        self._wait = min(FIRST_TRY_SECONDS * 2.0**before, LAST_TRY_SECONDS)
        self._line = run.progress.line
        self._folders = [folder for folder in (run.store, run.paths.folder) if folder.exists()]
        self._poll, self._looked, self._began = poll_seconds, time.monotonic(), time.monotonic()
        self._by_inodes = False
        self.renew(message)
        free = "; ".join(f"{folder.resolve()} has {free_of(folder)}" for folder in self._folders)
        remedy = "Remove some files" if self._by_inodes else "Free some space"
        self._line(
            f"paused: {message}\n  {free}. {remedy} and the run goes on by itself (a quota, which these figures do not "
            f"show, is tried again in {self._wait:.0f} s); Ctrl-C ends it, and the same command goes on later."
        )

    def renew(self, message: str) -> None:
        """Record today's free space as insufficient: the disk was full again for tasks that were still running."""
        self._free = [free_of(folder) for folder in self._folders]
        few = any(free.inodes is not None and free.inodes < ROOM_INODES for free in self._free)
        self._by_inodes = self._by_inodes or few or NO_INODES in message

    def is_over(self) -> bool:
        """Return True if space was freed or the waiting time has passed. Cheap to call at any time."""
        now = time.monotonic()
        if now - self._looked < self._poll:
            return False
        self._looked = now
        for folder, before in zip(self._folders, self._free, strict=True):
            free = free_of(folder)
            if self._is_room(before, free):
                self._line(f"going on: {folder.resolve()} has {free}")
                return True
        if now - self._began < self._wait:
            return False
        self._line(f"going on: the disk is tried again after {self._wait:.0f} s")
        return True

    def _is_room(self, before: Free, now: Free) -> bool:
        if now.bytes >= before.bytes + ROOM_BYTES:
            return True
        if not self._by_inodes or before.inodes is None:
            return False
        return now.inodes is None or now.inodes >= before.inodes + ROOM_INODES


# -- the scheduler ----------------------------------------------------------------------------------------------------

WAIT_SECONDS = 0.5
BROKEN_AFTER = 3
"""Parts that must fail for good, none being done, before the job itself counts as broken."""


def run_jobs(work: Work, pool: Pool, policy: FaultSettings) -> None:
    """Do every job that is not complete, in the order given where there is a choice.

    Raises:
        RunError: parts failed for good, and all that could be done without them is done; names them.
        Stopped: the process was asked to stop; the parts in hand are committed.
    """
    with stopping.in_hand():
        try:
            Scheduler(work, pool, policy).run()
        finally:
            pool.close()


class Scheduler:
    def __init__(self, work: Work, pool: Pool, policy: FaultSettings) -> None:
        self._pool, self._policy = pool, policy
        self._pause: DiskPause | None = None
        self._pauses = 0  # since a task was last done
        self._open: dict[tuple[str, str], OpenJob] = {}
        for run, job in work:
            if run.is_done(job):
                artifact = run.artifact(job.output)
                if run.is_own(artifact):
                    artifact.finish()  # its last writer may have been killed between the last commit and the manifest
                run.progress.line(f"{job.name}: complete already -> {artifact.folder}")
            else:
                self._open.setdefault(job.key, OpenJob(run, job))

    def run(self) -> None:
        while self._open:
            stopping.check()
            if self._pause is not None and self._pause.is_over():
                self._pause = None
            alive = self._start_ready()
            for task, outcome in self._pool.wait(WAIT_SECONDS):
                self._handle(task, outcome)
                alive = True
            for key, open_job in list(self._open.items()):
                if not (open_job.running or open_job.is_untouched) and open_job.run.is_done(open_job.job):
                    del self._open[key]
                    alive = True
            if not alive:
                raise RunError(self._what_failed())

    def _start_ready(self) -> bool:
        """Start as many tasks as there is room for; True if anything runs or may still run."""
        alive = self._pause is not None
        untouched: set[tuple[str, str]] = set()
        for key, open_job in self._open.items():
            if open_job.is_untouched and not untouched.isdisjoint(open_job.read):
                untouched.add(key)  # nobody can have made a part of it, so its folder need not be listed
                continue
            if open_job.poisoned and self._policy.poisoned == "set_aside":
                alive = open_job.set_poisoned_aside() or alive
            batches = [] if open_job.is_broken() else open_job.batches()
            alive = alive or bool(batches) or open_job.running
            room = self._pool.room(open_job.job.stage) if batches and self._pause is None else 0
            for batch in self._fitting(open_job, batches, room):
                self._start(open_job, batch)
            if open_job.is_untouched:
                untouched.add(key)
        return alive

    def _fitting(self, open_job: OpenJob, batches: Sequence[Batch], room: int) -> list[Batch]:
        """Return up to ``room`` batches to start now; parts that were never tried are divided over the room."""
        now = time.monotonic()
        due = [batch for batch in batches if batch.not_before <= now] if room else []
        free = open_job.unclaimed([part for batch in due for part in batch.parts])
        fitting: list[Batch] = []
        for batch in due:
            parts = tuple(part for part in batch.parts if part in free)
            if not parts:
                continue
            if batch.failures or batch.losses or not open_job.job.stage.divisible:
                fitting.append(Batch(parts, batch.failures, batch.losses))
            else:
                fitting += [Batch(share) for share in shares(parts, room - len(fitting))]
        return fitting[:room]

    def _start(self, open_job: OpenJob, batch: Batch) -> None:
        if self._pause is not None:
            return
        task = Task(open_job.run, open_job.job, batch.parts)
        try:
            # a worker makes its own plan: once the artifact is begun, it cannot choose other scores that would serve
            open_job.output.begin()
            self._pool.start(task)
        except StoreFull as full:
            self._hold_up(task, str(full))
            return
        open_job.begin(batch)

    def _hold_up(self, task: Task, message: str) -> None:
        if self._pause is None:
            self._pause = DiskPause(task.run, message, self._policy.full_poll_seconds, before=self._pauses)
            self._pauses += 1
        else:
            self._pause.renew(message)

    def _handle(self, task: Task, outcome: Outcome) -> None:
        open_job = self._open[task.job.key]
        batch, progress = open_job.end(task.parts)
        if outcome.kind == "done" or progress:
            self._pauses = 0
        missing = open_job.run.missing_parts(task.job)
        left = tuple(part for part in task.parts if part in missing)
        if not left:
            return
        whole = not task.job.stage.divisible
        left = task.parts if whole else left
        if outcome.kind == "full":
            open_job.retries.append(Batch(left, batch.failures, batch.losses))
            self._hold_up(task, outcome.message)
            return
        kind = retry_kind(outcome)
        message = outcome.message
        if outcome.kind == "done":
            message = f"{few_parts(left)} not committed. Was {open_job.run.paths.config} changed by another run?"
        now = time.monotonic()
        verdict = judge(batch, left, kind, self._policy, now, progress=progress, whole=whole)
        name = Task(task.run, task.job, left).name
        line = f"{name} {'lost its worker' if kind == 'lost' else 'failed'}: {message}"
        if kind == "refused" and open_job.is_refused_whole(left, message):
            open_job.give_up(message)
            line += "\n  given up: other parts were refused in the same way, so trying again would not help"
        elif verdict.poisoned is not None:
            open_job.poisoned[verdict.poisoned] = message
            why = "at once, as it would fail again" if kind == "refused" else f"after {self._policy.attempts} failures"
            line += f"\n  given up {why}; the run goes on as far as it can without it"
        else:
            open_job.retries += verdict.again
            wait = max(again.not_before for again in verdict.again) - now
            line += "\n  retrying in halves" if kind == "refused" else f"\n  retrying in {wait:.0f} s"
        open_job.run.progress.line(line)

    def _what_failed(self) -> str:
        failed = [
            f"{Task(open_job.run, open_job.job, tuple(parts)).name}: {message}"
            for open_job in self._open.values()
            for message, parts in open_job.reasons().items()
        ]
        stuck = ", ".join(open_job.job.name for open_job in list(self._open.values())[:4])
        what = "; ".join(failed) or f"nothing more can be done for {stuck}: their inputs are not made by this plan"
        hint = " launcher.faults.poisoned=set_aside goes on without parts that fail." if failed else ""
        return f"{what}. What was committed is kept: the same command tries again.{hint}"


@dataclass
class OpenJob:
    """A job that is not complete: its parts in progress, to be retried, and given up."""

    run: Run
    job: Job
    retries: list[Batch] = field(default_factory=list)
    poisoned: dict[int, str] = field(default_factory=dict)  # part -> why it was given up
    refusals: dict[str, frozenset[int]] = field(default_factory=dict)  # message -> parts that ended with it
    given_up: bool = False  # the job as a whole, and not single parts of it
    is_untouched: bool = False  # no part of it was made, tried or given up when it was last looked at
    _running: dict[tuple[int, ...], tuple[Batch, object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.output: Artifact = self.run.artifact(self.job.output)
        self._patience = Patience(self.run.progress.line)
        self.read = {(input_.identity.kind, input_.identity.key) for input_ in self.job.inputs.values()}

    @property
    def running(self) -> bool:
        return bool(self._running)

    def batches(self) -> list[Batch]:
        """Return the batches that may be tried: each earlier failure apart, then all other ready parts."""
        in_work = {part for parts in self._running for part in parts}
        self.is_untouched = not (in_work or self.poisoned or self.retries or self.output.standing().made)
        ready = self.run.ready_parts(self.job) - self.poisoned.keys() - in_work
        if not self.job.stage.divisible:
            if not ready or self.running or self.poisoned:
                return []
            return self.retries[:1] or [Batch(tuple(sorted(ready)))]
        self.retries = [kept for batch in self.retries if (kept := _only(batch, ready)).parts]
        fresh = sorted(ready - {part for batch in self.retries for part in batch.parts})
        return [*self.retries, *([Batch(tuple(fresh))] if fresh else [])]

    def begin(self, batch: Batch) -> None:
        """Note that ``batch``, or its unclaimed parts, was started."""
        self.is_untouched = False
        self._running[batch.parts] = (batch, self._mark(batch.parts))
        rest = set(range(self.output.parts)) - set(batch.parts)
        self.retries = [kept for old in self.retries if (kept := _only(old, rest)).parts]

    def end(self, parts: tuple[int, ...]) -> tuple[Batch, bool]:
        """Return the batch of an ended task, and whether anything was committed meanwhile."""
        batch, mark = self._running.pop(parts)
        return batch, self._mark(parts) != mark

    def is_refused_whole(self, parts: Sequence[int], message: str) -> bool:
        """True if no part is done and other parts were refused with the same message: the job is at fault."""
        before = self.refusals.setdefault(message, frozenset(parts))
        self.refusals[message] = before & frozenset(parts) or before
        return before.isdisjoint(parts) and not self._any_done()

    def give_up(self, message: str) -> None:
        """Give up every missing part. None of them is set aside, since most were never tried."""
        self.poisoned |= dict.fromkeys(self.run.missing_parts(self.job), message)
        self.retries.clear()
        self.given_up = True

    def _mark(self, parts: Sequence[int]) -> object:
        return self.output.committed() & set(parts), self.run.scratch_steps(self.job)

    def unclaimed(self, parts: Sequence[int]) -> set[int]:
        """Return those of ``parts`` that no other process works on; if there are none, report who does."""
        claimed = parts if self.job.stage.divisible else [0]
        held = {part for part in claimed if holder(self.output, part) is not None}
        if held and not self.running and held.issuperset(claimed):
            self._patience.say(self.output, sorted(held))
        return set() if held and not self.job.stage.divisible else set(parts) - held

    def set_poisoned_aside(self) -> bool:
        """Commit given-up parts empty once all others are done; False if the job cannot do without them.

        An indivisible job cannot. A job none of whose parts could be done has another fault than a poisoned part.
        """
        if not self.job.stage.divisible or self.run.missing_parts(self.job) != self.poisoned.keys():
            return False
        if self.given_up or not self._any_done():
            return False
        for part, reason in self.poisoned.items():
            with claim(self.output, part) as ours:
                if ours and not self.output.is_committed(part):
                    self.output.set_aside(part, reason)
        self.poisoned.clear()
        return True

    def reasons(self) -> dict[str, list[int]]:
        """Map each reason for giving up to its parts."""
        by_reason: dict[str, list[int]] = {}
        for part, message in sorted(self.poisoned.items()):
            by_reason.setdefault(message, []).append(part)
        return by_reason

    def _any_done(self) -> bool:
        return any(True for _ in filled_parts(self.output))

    def is_broken(self) -> bool:
        """True if several parts were given up and none is done: the job fails, not its parts."""
        return len(self.poisoned) >= BROKEN_AFTER and len(self.run.missing_parts(self.job)) == self.output.parts


def _only(batch: Batch, parts: set[int]) -> Batch:
    kept = tuple(part for part in batch.parts if part in parts)
    return Batch(kept, batch.failures, batch.losses, batch.not_before)


def retry_kind(outcome: Outcome) -> Literal["failed", "refused", "lost"]:
    """Return the kind of failure for ``retries.judge``; a task that claims to be done and is not has failed."""
    if outcome.kind in ("refused", "lost"):
        return outcome.kind
    return "failed"


def shares(parts: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Divide parts into at most ``count`` runs of neighbours of about equal size."""
    count = min(count, len(parts))
    edges = [round(len(parts) * number / count) for number in range(count + 1)] if count > 0 else [0]
    return [tuple(parts[start:stop]) for start, stop in itertools.pairwise(edges)]
