"""What becomes of parts that did not end well: every rule of ``pipeline.retries`` at its edges."""

from __future__ import annotations

import pytest

from eopd.pipeline.launchers.settings import FaultSettings
from eopd.pipeline.scheduler import Batch, backoff, judge

POLICY = FaultSettings(attempts=3, losses=2, backoff_seconds=2.0, backoff_limit_seconds=5.0)


def drive(poison: set[int], parts: int, policy: FaultSettings = POLICY) -> tuple[set[int], set[int], int]:
    """Work as the scheduler does on parts of which some always fail: (poisoned, done, tasks that were started)."""
    batches, poisoned, done, tasks = [Batch(tuple(range(parts)))], set(), set(), 0
    while batches:
        batch = batches.pop(0)
        tasks += 1
        left = list(batch.parts)
        while left and left[0] not in poison:
            done.add(left.pop(0))
        if not left:
            continue
        progress = len(left) < len(batch.parts)
        verdict = judge(batch, tuple(left), "failed", policy, 0.0, progress=progress, whole=False)
        batches += verdict.again
        if verdict.poisoned is not None:
            poisoned.add(verdict.poisoned)
    return poisoned, done, tasks


@pytest.mark.parametrize("whole", [True, False])
def test_what_was_refused_is_not_tried_again(whole: bool) -> None:
    assert judge(Batch((7,)), (7,), "refused", POLICY, 9.0, progress=False, whole=whole).poisoned == 7
    verdict = judge(Batch((1, 2, 3, 4)), (1, 2, 3, 4), "refused", POLICY, 9.0, progress=False, whole=False)
    assert [batch.parts for batch in verdict.again] == [(1, 2), (3, 4)]
    assert {batch.not_before for batch in verdict.again} == {9.0}


def test_a_poisoned_part_is_found_among_many_and_costs_no_other() -> None:
    for culprit in (0, 1, 31, 63):
        poisoned, done, tasks = drive({culprit}, 64)
        assert poisoned == {culprit}
        assert done == set(range(64)) - {culprit}
        assert tasks <= 20  # a search by halves, not one part at a time


def test_several_poisoned_parts_are_all_found() -> None:
    poisoned, done, _ = drive({3, 4, 20}, 32)
    assert poisoned == {3, 4, 20}
    assert done == set(range(32)) - {3, 4, 20}


def test_a_part_alone_has_three_attempts_with_growing_waits() -> None:
    batch, waits = Batch((7,)), []
    for _ in range(2):
        verdict = judge(batch, (7,), "failed", POLICY, 100.0, progress=False, whole=False)
        assert verdict.poisoned is None
        (batch,) = verdict.again
        waits.append(batch.not_before - 100.0)
    assert waits == [2.0, 4.0]
    assert judge(batch, (7,), "failed", POLICY, 100.0, progress=False, whole=False).poisoned == 7
    assert backoff(POLICY, 10) == POLICY.backoff_limit_seconds


def test_what_was_committed_meanwhile_forgives_what_happened_before() -> None:
    verdict = judge(Batch((1, 2), failures=2), (2,), "failed", POLICY, 0.0, progress=True, whole=False)
    assert verdict.poisoned is None
    assert verdict.again[0].failures == 1


def test_lost_workers_are_no_failures_until_there_are_too_many() -> None:
    batch = Batch((5,))
    outcomes = []
    for _ in range(2 + 3):
        verdict = judge(batch, (5,), "lost", POLICY, 0.0, progress=False, whole=False)
        outcomes.append(verdict.poisoned)
        if verdict.again:
            (batch,) = verdict.again
    assert outcomes == [None, None, None, None, 5]  # two losses are free, then three that count


def test_training_is_never_divided() -> None:
    verdict = judge(Batch((0, 1)), (0, 1), "failed", POLICY, 0.0, progress=False, whole=True)
    assert [batch.parts for batch in verdict.again] == [(0, 1)]
