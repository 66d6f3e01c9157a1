"""Brings planned jobs to their end through a pool of workers: what is ready is started, what fails is tried again.

A job is ready when its inputs are there (a part of scores: when its part of the rollouts is). Jobs with equal
outputs are one job. Everything is read from the store's commit markers, so that other processes may do parts of the
same jobs at the same time, and a scheduler that was killed goes on where the store is.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from eopd.pipeline.config import ConfigError
from eopd.pipeline.launchers.base import Outcome, Pool, Task
from eopd.pipeline.launchers.settings import FaultSettings
from eopd.pipeline.plan import SUMMED_UP, PlannedJob
from eopd.pipeline.runner import Runner
from eopd.storage import stopping
from eopd.storage.artifacts import Identity

WAIT_SECONDS = 0.5


@dataclass
class Node:
    """A job that is not complete."""

    runner: Runner
    job: PlannedJob
    running: set[int] = field(default_factory=set)
    failures: int = 0
    not_before: float = 0.0


def run_jobs(work: Sequence[tuple[Runner, PlannedJob]], pool: Pool, policy: FaultSettings) -> None:
    """Do every job that is not complete, in the order given where there is a choice.

    Raises:
        ConfigError: a job failed for good; all that could be done without it is done.
        Stopped: the process was asked to stop; the parts in hand are committed.
    """
    try:
        Scheduler(work, pool, policy).run()
    finally:
        pool.close()


class Scheduler:
    def __init__(self, work: Sequence[tuple[Runner, PlannedJob]], pool: Pool, policy: FaultSettings) -> None:
        self._pool, self._policy = pool, policy
        self._nodes: dict[tuple[str, str], Node] = {}
        for runner, job in work:
            if runner.is_done(job):
                runner.progress.line(f"{job.name}: complete already -> {runner.artifact(job.output).folder}")
            else:
                self._nodes.setdefault((job.output.kind, job.output.key), Node(runner, job))

    def run(self) -> None:
        while self._nodes:
            stopping.check()
            self._start_what_is_ready()
            for outcome in self._pool.wait(WAIT_SECONDS):
                self._take_in(outcome)
            for key in [key for key, node in self._nodes.items() if not node.running and node.runner.is_done(node.job)]:
                del self._nodes[key]

    def _start_what_is_ready(self) -> None:
        for node in self._nodes.values():
            if time.monotonic() < node.not_before:
                continue
            room = self._pool.room(node.job.stage)
            parts = self._ready(node) if room else []
            summary = node.job.output.parts - 1
            if node.job.stage in SUMMED_UP and (node.running or (room > 1 and len(parts) > 1)):
                parts = [part for part in parts if part != summary]  # whoever ends last writes it
            for share in _shares(parts, room if node.job.stage != "train" else 1):
                node.running |= set(share)
                self._pool.start(Task(node.runner, node.job, tuple(share)))

    def _ready(self, node: Node) -> list[int]:
        """Parts that are missing, not being worked on, and whose inputs are committed."""
        job, output = node.job, node.runner.artifact(node.job.output)
        done = output.committed()
        if job.side is not None and job.stage == "rollout":
            done &= node.runner.artifact(job.side).committed()
        missing = [part for part in range(output.parts) if part not in done]
        if job.stage == "train" and node.running:
            return []
        for identity in job.inputs:
            made = node.runner.artifact(identity).committed()
            if job.stage == "score" and identity.kind == "rollouts":
                missing = [part for part in missing if part in made and _side_is_there(node, part)]
            elif len(made) < identity.parts:
                return []
        return [part for part in missing if part not in node.running]

    def _take_in(self, outcome: Outcome) -> None:
        task = outcome.task
        node = self._nodes[task.job.output.kind, task.job.output.key]
        node.running -= set(task.parts)
        if outcome.kind == "done":
            node.failures = 0
            return
        node.failures += 1
        told = f"{task.name}: {outcome.kind}: {outcome.message}"
        if node.failures >= self._policy.attempts:
            raise ConfigError(f"{told}. What was committed is kept; the same command goes on from there.")
        wait = min(self._policy.backoff_seconds * 2 ** (node.failures - 1), self._policy.backoff_limit_seconds)
        node.not_before = time.monotonic() + wait
        node.runner.progress.line(f"{told}; trying again in {wait:.0f} s")


def _shares(parts: Sequence[int], count: int) -> list[list[int]]:
    """At most ``count`` runs of neighbouring parts, as equal as can be."""
    count = min(count, len(parts))
    edges = [round(len(parts) * number / count) for number in range(count + 1)] if count else [0]
    return [list(parts[start:stop]) for start, stop in itertools.pairwise(edges)]


def _side_is_there(node: Node, part: int) -> bool:
    side: Identity | None = node.job.side
    return side is None or node.runner.artifact(side).is_committed(part)
