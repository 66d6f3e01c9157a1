"""Whole rows to the last id: logits are integers, so that every product is exact, equals abound and order is known."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from eopd.stages.models.lm_head import LMHead
from eopd.stages.models.threads import OneThreadEach, torch_threads
from eopd.stages.score.draws import row_keys
from eopd.stages.score.token_batch import TokenBatch
from eopd.stages.score.token_statistics import TokenStatistics
from eopd.stages.score.whole_rows import WholeRows
from eopd.storage.teacher_record import LOGPROB_FLOOR, HeadRule


def _score(logits: np.ndarray, rule: HeadRule, sampled: np.ndarray | None = None) -> TokenStatistics:
    """Statistics of given logits [T, V]: hidden states that pick a column of the weight."""
    tokens, vocabulary = logits.shape
    head = LMHead(torch.from_numpy(logits.astype(np.float32)).T.contiguous(), None, 1.0, None, vocabulary)
    sampled = np.zeros(tokens, np.int64) if sampled is None else sampled
    with torch.inference_mode():
        return WholeRows(head, rule, 1.0, ())(
            torch.eye(tokens), TokenBatch(sampled, row_keys(0, (0,), np.arange(tokens)))
        )


def _probabilities(logits: np.ndarray) -> np.ndarray:
    mass = np.exp(logits - logits.max(1, keepdims=True))
    return mass / mass.sum(1, keepdims=True)


@pytest.mark.parametrize("above", [-1.0, 0.9, 99.0])
@pytest.mark.parametrize("k_max", [1, 5, 16, 64, 500])
@pytest.mark.parametrize("vocabulary", [1, 2, 15, 17, 64, 331])
def test_largest_first_and_lower_ids_first_among_equals(vocabulary: int, k_max: int, above: float) -> None:
    generator = np.random.default_rng(vocabulary)
    widths = np.asarray([0, 1, 3, 10, 40, 300])[:, None]  # from all equal to one that has everything
    logits = generator.integers(0, widths + 1, (6, vocabulary)).astype(np.float64)
    sampled = generator.integers(0, vocabulary, 6)
    found = _score(logits, HeadRule(k_max, 0.0301, above), sampled)
    p = _probabilities(logits)
    sizes = np.clip((p >= 0.0301).sum(1), 1, min(k_max, vocabulary))
    sizes[found.entropy > above] = min(k_max, vocabulary)
    order = np.argsort(-logits, axis=1, kind="stable")
    assert found.head_counts.tolist() == sizes.tolist()
    assert found.head_ids.tolist() == [v for row, size in zip(order, sizes, strict=True) for v in row[:size]]
    assert found.sampled_rank.tolist() == (logits > logits[np.arange(6), sampled][:, None]).sum(1).tolist()
    expected = [p[row, v] for row, size in enumerate(sizes) for v in order[row, :size]]
    with np.errstate(divide="ignore"):
        assert np.allclose(found.head_logprobs, np.maximum(np.log(expected), LOGPROB_FLOOR), atol=2e-6)


@pytest.mark.parametrize("vocabulary", [16, 100])
def test_systematic_draws_lie_under_their_points(vocabulary: int) -> None:
    generator = np.random.default_rng(0)
    logits = generator.integers(0, 5, (200, vocabulary)).astype(np.float64)
    found = _score(logits, HeadRule(4, 0.01, -1.0))
    p = _probabilities(logits)
    rows = np.arange(200)
    p[np.repeat(rows, 4), found.head_ids] = 0.0
    ends = p.cumsum(1)
    stops = np.cumsum(found.draw_counts)
    for row in rows:
        ids = found.draw_ids[stops[row] - found.draw_counts[row] : stops[row]]
        assert (p[row, ids] > 0.0).all()
        # between the points of neighbouring draws lie 0.01, so all of them fix one uniform
        lowest = (ends[row, ids] - p[row, ids] - 0.01 * np.arange(len(ids))).max()
        highest = (ends[row, ids] - 0.01 * np.arange(len(ids))).min()
        assert max(lowest, 0.0) <= min(highest, 0.01) + 1e-9


def test_a_probability_on_the_border_is_in_the_head() -> None:
    logits = np.zeros((1, 8))
    assert _score(logits, HeadRule(16, 0.125, 99.0)).head_counts.tolist() == [8]
    assert _score(logits, HeadRule(16, 0.1251, 99.0)).head_counts.tolist() == [1], "the least there can be"
    assert _score(np.zeros((1, 1)), HeadRule(16, 1.0, 99.0)).head_counts.tolist() == [1]


def test_the_widest_logits_are_still_ordered() -> None:
    logits = np.asarray([[-1e38, 1e38, 0.0, -1.5e38, 0.0]])
    assert _score(logits, HeadRule(4, 0.03, -1.0)).head_ids.tolist() == [1, 2, 4, 0]


def test_pieces_are_equal_and_as_many_for_each_thread() -> None:
    with torch_threads(2):
        even_size = OneThreadEach().even_size
        assert even_size(8512, 256, 1024) == 852  # ten pieces
        assert even_size(2048, 256, 1024) == 1024
        assert even_size(600, 256, 1024) == 300
        assert even_size(10, 256, 1024) == 256, "a small one is not divided"
        assert even_size(0, 256, 1024) == 256
    with torch_threads(1):
        assert OneThreadEach().even_size(1025, 256, 1024) == 513


def test_threads_are_kept_and_each_is_one_to_torch() -> None:
    with torch_threads(2):
        threads = OneThreadEach()

        def who(_: int) -> tuple[int, int]:
            time.sleep(0.01)
            return threading.get_ident(), torch.get_num_threads()

        first, second = threads.map(who, range(8)), threads.map(who, range(8))
        assert torch.get_num_threads() == 2
    assert {ident for ident, _ in first} == {ident for ident, _ in second}
    assert len({ident for ident, _ in first}) == 2
    assert {count for _, count in first} == {1}
