"""Brings planned jobs to their end through a pool of workers: what is ready is started, what fails is tried again.

A job is ready when its inputs are there (a part of scores: when its part of the rollouts is). Jobs that make
the same are one job. Everything is read from the store's commit markers and claims, so that other processes may do
parts of the same jobs at the same time, and a scheduler that was killed goes on where the store is.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Literal

from eopd.pipeline.errors import RunError
from eopd.pipeline.fullness import Pause
from eopd.pipeline.launchers.base import Outcome, Pool, Task, few_parts
from eopd.pipeline.launchers.settings import FaultSettings
from eopd.pipeline.node import Node
from eopd.pipeline.plan import PlannedJob
from eopd.pipeline.retries import Batch, judge
from eopd.pipeline.runner import Runner
from eopd.storage import stopping
from eopd.storage.errors import StoreFull

WAIT_SECONDS = 0.5


def run_jobs(work: Sequence[tuple[Runner, PlannedJob]], pool: Pool, policy: FaultSettings) -> None:
    """Do every job that is not complete, in the order given where there is a choice.

    Raises:
        RunError: parts failed for good; all that could be done without them is done. Names them.
        Stopped: the process was asked to stop; the parts in hand are committed.
    """
    with stopping.in_hand():
        try:
            Scheduler(work, pool, policy).run()
        finally:
            pool.close()


class Scheduler:
    def __init__(self, work: Sequence[tuple[Runner, PlannedJob]], pool: Pool, policy: FaultSettings) -> None:
        self._pool, self._policy = pool, policy
        self._pause: Pause | None = None
        self._nodes: dict[tuple[str, ...], Node] = {}
        for runner, job in work:
            if runner.is_done(job):
                runner.progress.line(f"{job.name}: complete already -> {runner.artifact(job.output).folder}")
            else:
                self._nodes.setdefault(job.makes, Node(runner, job))

    def run(self) -> None:
        while self._nodes:
            stopping.check()
            if self._pause is not None and self._pause.is_over():
                self._pause = None
            hopeful = self._start_what_is_ready()
            for outcome in self._pool.wait(WAIT_SECONDS):
                self._take_in(outcome)
                hopeful = True
            for key, node in list(self._nodes.items()):
                if not node.running and node.runner.is_done(node.job):
                    del self._nodes[key]
                    hopeful = True
            if not hopeful:
                raise RunError(self._what_failed())

    def _start_what_is_ready(self) -> bool:
        """Whether anything runs or may come to run."""
        hopeful = self._pause is not None
        for node in self._nodes.values():
            if node.poisoned and self._policy.poisoned == "set_aside":
                hopeful = node.settle() or hopeful
            batches = [] if node.is_broken() else node.batches()
            hopeful = hopeful or bool(batches) or node.running
            room = self._pool.room(node.job.stage) if batches and self._pause is None else 0
            for batch in self._fitting(node, batches, room):
                self._start(node, batch)
        return hopeful

    def _fitting(self, node: Node, batches: Sequence[Batch], room: int) -> list[Batch]:
        """Up to ``room`` batches to start now; what was never tried is divided over the room there is."""
        now = time.monotonic()
        free = [batch for batch in batches if batch.not_before <= now] if room else []
        parts = node.not_held([part for batch in free for part in batch.parts]) - self._sampled_beside(node)
        found: list[Batch] = []
        for batch in free:
            able = tuple(part for part in batch.parts if part in parts)
            if not able:
                continue
            if batch.failures or batch.losses or node.job.stage == "train":
                found.append(Batch(able, batch.failures, batch.losses))
            else:
                found += [Batch(share) for share in shares(able, room - len(found))]
        return found[:room]

    def _sampled_beside(self, node: Node) -> set[int]:
        """Parts of the same rollouts that are at work for runs that want another side artifact of them, or none."""
        same = (other for other in self._nodes.values() if other is not node and other.output.key == node.output.key)
        return {part for other in same for part in other.parts_running}

    def _start(self, node: Node, batch: Batch) -> None:
        if self._pause is not None:
            return
        task = Task(node.runner, node.job, batch.parts)
        try:
            # or a worker that plans later may find scores that serve as well
            node.runner.artifact(node.job.output).begin()
            self._pool.start(task)
        except StoreFull as full:
            self._hold_up(task, str(full))
            return
        node.begin(batch)

    def _hold_up(self, task: Task, message: str) -> None:
        if self._pause is None:
            self._pause = Pause(task.runner, message, self._policy.full_poll_seconds)
        else:
            self._pause.renew(message)

    def _take_in(self, outcome: Outcome) -> None:
        task = outcome.task
        node = self._nodes[task.job.makes]
        batch, progress = node.end(task.parts)
        missing = set(node.missing())
        left = tuple(part for part in task.parts if part in missing)
        if not left:
            return
        whole = task.job.stage == "train"
        left = task.parts if whole else left
        if outcome.kind == "full":
            node.again.append(Batch(left, batch.failures, batch.losses))
            self._hold_up(task, outcome.message)
            return
        kind: Literal["failed", "refused", "lost"] = "failed" if outcome.kind == "done" else outcome.kind
        message = outcome.message
        if outcome.kind == "done":
            message = f"{few_parts(left)} not committed. Was {node.runner.paths.config} changed by another run?"
        now = time.monotonic()
        verdict = judge(batch, left, kind, self._policy, now, progress=progress, whole=whole)
        name = Task(task.runner, task.job, left).name
        told = f"{name} {'lost its worker' if kind == 'lost' else 'failed'}: {message}"
        if kind == "refused" and node.is_refused_whole(left, message):
            node.give_up(message)
            told += "\n  given up: other parts were refused in the same way, so trying again would not help"
        elif verdict.poisoned is not None:
            node.poisoned[verdict.poisoned] = message
            attempts = self._policy.attempts
            told += "\n  given up at once, as it would fail again" if kind == "refused" else ""
            told += f"\n  given up after {attempts} failures" if kind != "refused" else ""
            told += "; the rest goes on as far as it can without it"
        else:
            node.again += verdict.again
            wait = max(again.not_before for again in verdict.again) - now
            told += "\n  trying again in halves" if kind == "refused" else f"\n  trying again in {wait:.0f} s"
        node.runner.progress.line(told)

    def _what_failed(self) -> str:
        failed = [
            f"{Task(node.runner, node.job, (part,)).name}: {message}"
            for node in self._nodes.values()
            for part, message in node.poisoned.items()
        ]
        unsure = ", ".join(node.job.name for node in list(self._nodes.values())[:4])
        told = "; ".join(failed) or f"nothing more can be done for {unsure}: their inputs are not made by this plan"
        hint = " launcher.faults.poisoned=set_aside goes on without parts that fail." if failed else ""
        return f"{told}. What was committed is kept: the same command tries again.{hint}"


def shares(parts: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """At most ``count`` runs of neighbouring parts, as equal as can be."""
    count = min(count, len(parts))
    edges = [round(len(parts) * number / count) for number in range(count + 1)] if count > 0 else [0]
    return [tuple(parts[start:stop]) for start, stop in itertools.pairwise(edges)]
