"""What of a plan is there: one state per job, from listings of the store's folders alone. No part is read.

A survey may cover the plans of several runs (a sweep): a job that several of them ask for has one key and appears once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from eopd.pipeline.plan import Plan, PlannedJob
from eopd.storage.artifacts import Artifact, Identity
from eopd.storage.jsonl import read_lines
from eopd.storage.paths import RunPaths

State = Literal["complete", "shared", "partly", "missing"]


@dataclass(frozen=True)
class Found:
    """What a listing of an artifact's folder shows."""

    committed: Collection[int] = frozenset()
    pruned: Collection[int] = frozenset()  # committed once, their data given up since
    set_aside: Mapping[int, str] = field(default_factory=dict)  # committed empty after failing too often: why
    elsewhere: bool = False  # in a store that is only read


Listing = Callable[[Identity], Found]


@dataclass(frozen=True)
class JobState:
    """One job of the plan. Only counts are kept, so that a survey of many parts stays small."""

    job: PlannedJob
    runs: tuple[str, ...]  # that ask for it; the first is the one that would do it
    state: State
    done: int  # parts, those that were pruned since among them
    pruned: int = 0
    set_aside: Mapping[int, str] = field(default_factory=dict)
    maker: str = ""  # of a shared one: the run that did it, where one of `runs` has noted that
    elsewhere: bool = False  # it lies in a store that is only read

    @property
    def parts(self) -> int:
        return self.job.output.parts

    @property
    def missing(self) -> int:
        return self.parts - self.done

    @property
    def is_done(self) -> bool:
        return self.state in ("complete", "shared")


def store_listing(
    find: Callable[[Identity], Artifact], is_own: Callable[[Artifact], bool], again: Collection[tuple[str, int]] = ()
) -> Listing:
    """The listing of real stores: of the artifact that ``find`` says serves an identity (``Runner.artifact``).

    Args:
        is_own: whether an artifact is in the store that is written to (``Runner.is_own``).
        again: pruned parts (key, part) that something needs; they count as missing.
    """

    def listing(identity: Identity) -> Found:
        artifact = find(identity)
        standing = artifact.standing()
        pruned = {part for part in standing.pruned if (identity.key, part) not in again}
        return Found(standing.committed, pruned, artifact.reasons_aside(standing), not is_own(artifact))

    return listing


def survey(plans: Mapping[str, Plan], listing: Listing, done_by: Mapping[str, str]) -> list[JobState]:
    """State of every job of the plans of ``run name -> plan``, each once, in the order of the first that asks.

    Args:
        done_by: artifact key -> run that noted doing it (``read_makers``).
    """
    wanted: dict[tuple[str, ...], tuple[PlannedJob, list[str]]] = {}
    for run, plan in plans.items():
        for job in plan.jobs:
            wanted.setdefault(job.makes, (job, []))[1].append(run)
    return [_state(job, runs, _found(job, listing), done_by) for job, runs in wanted.values()]


def _found(job: PlannedJob, listing: Listing) -> Found:
    """Of a rollout that makes a side artifact too, the parts of which both are there."""
    found = listing(job.output)
    if job.stage != "rollout" or job.side is None:
        return found
    beside = listing(job.side)
    return replace(found, committed=set(found.committed) & set(beside.committed))


def _state(job: PlannedJob, runs: Sequence[str], found: Found, done_by: Mapping[str, str]) -> JobState:
    done = len(found.committed) + len(found.pruned)
    maker = ""
    state: State = "partly" if done else "missing"
    if done == job.output.parts:
        maker = done_by.get(job.output.key, "")
        state = "complete" if maker in runs else "shared"
    return JobState(
        job,
        tuple(runs),
        state,
        done,
        len(found.pruned),
        found.set_aside,
        maker if state == "shared" else "",
        found.elsewhere,
    )


def read_makers(runs: Path, first: Sequence[str]) -> dict[str, str]:
    """Artifact key -> the run below ``runs`` whose ``jobs.jsonl`` says that it did it; runs in ``first`` win."""
    found: dict[str, str] = {}
    others = sorted(path.parent.name for path in runs.glob("*/jobs.jsonl"))
    for run in [*first, *(name for name in others if name not in first)]:
        for line in read_lines(RunPaths(runs / run).jobs):
            if "key" in line:
                found.setdefault(str(line["key"]), run)
    return found
