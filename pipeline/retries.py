"""Retry policy for parts of failed tasks. Pure: no clock, no store.

A failed task of several parts is tried again whole, then in halves, so that the part at fault ends up alone; a part
that has failed ``attempts`` times is poisoned. A task that refuses its input would do so again: it is halved at once,
and a part that is refused alone is poisoned. A lost worker tells nothing about its parts: they are tried again without
blame, until so many workers were lost without any progress that the parts must be suspected after all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eopd.pipeline.launchers.settings import FaultSettings


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
