"""Stop tokens merged or swapped: what the batch says is what merging a dense teacher gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from eopd.stages.train.objectives.base import TeacherBatch
from eopd.stages.train.objectives.layout import LOG_ZERO, TAIL_RESOLUTION, SupportPlan
from eopd.stages.train.stops import StopHandling, class_entropy, swap_stops
from eopd.storage.errors import InputError
from eopd.storage.teacher_record import HeadRule
from tests.raises import raises
from tests.stages.dense_oracle import rows_of

E = StopHandling("class", (3, 7), (5, 3))  # ids 3, 5 and 7 are one outcome
RULE = HeadRule(6, 0.02, -1.0)


def teacher_of(probs: list[list[float]]) -> torch.Tensor:
    """Log-probs [T, 12] from the first entries of each row; what is left is spread over the others."""
    p = torch.full((len(probs), 12), -1.0, dtype=torch.float64)
    for t, row in enumerate(probs):
        p[t, : len(row)] = torch.tensor(row, dtype=torch.float64)
        free = p[t] < 0
        p[t, free] = (1 - p[t, ~free].sum()) / free.sum()
    return p.log()


def batch_of(teacher: torch.Tensor, ids: list[int], plan: SupportPlan, stops: StopHandling = E, rule: HeadRule = RULE):
    rows = rows_of(teacher, torch.tensor(ids), rule, stops.union, np.zeros((len(ids), 0), int), 0)
    return rows, TeacherBatch.build(rows, rule, stops, plan, 12)


def test_entropy_after_merging_is_exact() -> None:
    teacher = (torch.randn(50, 12, dtype=torch.float64) * 3).log_softmax(dim=1)
    logp = teacher.numpy()
    entropy = -(np.exp(logp) * logp).sum(axis=1)
    apart = np.delete(logp, E.union, axis=1)
    merged = np.concatenate([apart, np.logaddexp.reduce(logp[:, list(E.union)], axis=1)[:, None]], axis=1)
    expected = -(np.exp(merged) * merged).sum(axis=1)
    assert np.allclose(class_entropy(entropy, logp[:, list(E.union)]), expected, atol=1e-12)
    certain = np.asarray([[-50.0, 0.0, -50.0]])
    assert class_entropy(np.zeros(1), certain)[0] == 0.0


@pytest.mark.parametrize(
    ("row", "in_head"),
    [
        ([0.3, 0.2, 0.1, 0.15, 0.05, 0.1, 0.02], True),  # two members in the head, one in the tail
        ([0.3, 0.2, 0.1, 0.0001, 0.1, 0.0001, 0.1, 0.0001], False),  # none near it
        ([0.2, 0.1, 0.1, 0.06, 0.1, 0.06, 0.1, 0.06, 0.1, 0.1], True),  # each too small, together in
    ],
)
def test_the_merged_outcome_joins_the_head_where_it_belongs(row: list[float], in_head: bool) -> None:
    teacher = teacher_of([row])
    _, batch = batch_of(teacher, [0], SupportPlan(head_k=None))
    p = teacher.exp()[0]
    stop = p[list(E.union)].sum()
    assert bool(batch.in_head[0, 0]) is in_head
    if in_head:
        assert batch.logprob[0, 0].exp().item() == pytest.approx(stop.item(), rel=1e-6)
    kept = batch.in_head[0].logical_and(batch.logprob[0] > LOG_ZERO)
    total = batch.logprob[0][kept].exp().sum() + batch.tail[0].exp()
    assert total.item() == pytest.approx(1.0, abs=1e-12)
    ids = set(batch.support_ids.tolist()) - {0}
    assert not ids & set(E.union)


def test_top_k_is_that_of_the_merged_distribution() -> None:
    teacher = teacher_of([[0.2, 0.15, 0.1, 0.07, 0.09, 0.07, 0.12, 0.01, 0.08]])  # merged stops: 0.15
    for k in (1, 2, 3, 4):
        _, batch = batch_of(teacher, [0], SupportPlan(head_k=k))
        others = sorted((p for i, p in enumerate(teacher.exp()[0].tolist()) if i not in E.union), reverse=True)
        expected = sorted([*others, 0.1499999], reverse=True)[:k]
        ordered = sorted(batch.logprob[0][batch.in_head[0]].exp().tolist(), reverse=True)
        assert ordered == pytest.approx(expected, abs=1e-5)
        assert batch.tail.exp().item() == pytest.approx(1 - sum(expected), abs=1e-5)


def test_sampled_stop_is_the_merged_outcome() -> None:
    teacher = (torch.randn(4, 12, dtype=torch.float64)).log_softmax(dim=1)
    _, batch = batch_of(teacher, [3, 5, 7, 1], SupportPlan())
    merged = teacher[:, list(E.union)].logsumexp(dim=1)
    assert batch.sampled[:3].tolist() == pytest.approx(merged[:3].tolist(), abs=1e-6)
    assert batch.sampled_column[:3].tolist() == [0, 0, 0]
    assert batch.sampled[3].item() == pytest.approx(teacher[3, 1].item(), abs=1e-6)
    assert batch.sampled_column[3].item() > 0


def test_a_tail_that_rounding_ate_keeps_a_floor() -> None:
    teacher = teacher_of([[0.9, 0.0, 0.0, 0.06, 0.0, 0.0399999, 0.0, 0.0]]).clamp_min(-40)
    rows, _ = batch_of(teacher, [0], SupportPlan(), rule=HeadRule(2, 0.02, -1.0))
    rounded = replace(rows, tail_logmass=rows.tail_logmass - 0.004)  # an error within the cache's promise
    batch = TeacherBatch.build(rounded, HeadRule(2, 0.02, -1.0), E, SupportPlan(), 12)
    assert batch.tail.exp().item() == pytest.approx(0.04 * TAIL_RESOLUTION, rel=0.02)


def test_remap_swaps_the_main_stop_ids_everywhere() -> None:
    stops = StopHandling("remap", (3,), (5, 3))
    teacher = teacher_of([[0.1, 0.1, 0.1, 0.001, 0.05, 0.5], [0.1, 0.1, 0.1, 0.001, 0.05, 0.5]])
    rows = rows_of(teacher, torch.tensor([3, 5]), RULE, stops.union, np.asarray([[3, 1], [5, 2]]), 0)
    swapped = swap_stops(rows, stops)
    p = teacher.exp()[0]
    assert np.exp(swapped.sampled_logprob).tolist() == pytest.approx([p[5].item(), p[3].item()], rel=1e-6)
    assert swapped.head_ids[0] == 3
    assert 5 not in swapped.head_ids
    assert np.exp(swapped.extra_logprobs).tolist() == pytest.approx(p[[5, 1, 3, 2]].tolist(), rel=1e-6)
    assert swapped.extra_ids.tolist() == rows.extra_ids.tolist()
    back = swap_stops(swap_stops(rows, stops), stops)
    assert back.head_ids.tolist() == rows.head_ids.tolist()


def test_models_that_agree_are_left_alone() -> None:
    teacher = (torch.randn(3, 12, dtype=torch.float64)).log_softmax(dim=1)
    for stops in (StopHandling("class", (3,), (3,)), StopHandling("remap", (3,), (3,)), StopHandling()):
        rows, batch = batch_of(teacher, [3, 3, 1], SupportPlan(), stops)
        assert len(batch.stop_columns) == 0
        assert batch.entropy.tolist() == pytest.approx(rows.entropy.tolist())
        assert batch.sampled.tolist() == pytest.approx(rows.sampled_logprob.tolist())


def test_missing_stop_ids_and_strange_tokens_are_refused() -> None:
    teacher = (torch.randn(1, 12, dtype=torch.float64)).log_softmax(dim=1)
    rows, _ = batch_of(teacher, [1], SupportPlan())
    with raises(InputError, r"\[3, 11\]", setting="train.objective.stops", remedy="score again"):
        TeacherBatch.build(rows, RULE, StopHandling("class", (3,), (11,)), SupportPlan(), 12)
    with pytest.raises(ValueError, match="sampled token 1 is outside the student's 1 ids"):
        TeacherBatch.build(rows, RULE, E, SupportPlan(), 1)


def test_teacher_ids_that_the_student_lacks_fall_to_the_tail() -> None:
    teacher = teacher_of([[0.1, 0.1, 0.1, 0.01, 0.1, 0.01, 0.1, 0.01, 0.1, 0.1, 0.2]])
    rows = rows_of(teacher, torch.tensor([1]), RULE, E.union, np.zeros((1, 0), int), 0)
    batch = TeacherBatch.build(rows, RULE, E, SupportPlan(), 10)
    assert batch.support_ids.max() < 10
    head = np.exp(rows.head_logprobs[rows.head_ids < 10]).sum()
    assert batch.tail.exp().item() == pytest.approx(1 - head, abs=1e-6)


def test_stops_that_the_student_lacks_altogether_are_no_outcome() -> None:
    teacher = (torch.randn(3, 12, dtype=torch.float64)).log_softmax(dim=1)
    stops = StopHandling("class", (), (10, 11))
    rows = rows_of(teacher, torch.tensor([0, 1, 2]), RULE, stops.union, np.zeros((3, 0), int), 0)
    batch = TeacherBatch.build(rows, RULE, stops, SupportPlan(), 10)
    assert len(batch.stop_columns) == 0
    assert batch.logprob.shape[1] == batch.width
