"""Self-BLEU and distinct-n against a plain reference."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eopd.stages.evaluate.summary import distinct, self_bleu


def ids(*tokens: int) -> np.ndarray:
    return np.asarray(tokens, dtype=np.int32)


def plain_bleu(hypothesis: list[int], references: list[list[int]]) -> float:
    """Papineni et al. 2002 with add-one smoothing above order one, written out with counters."""
    if not hypothesis:
        return 1.0 if [] in references else 0.0
    logs = []
    for n in range(1, 5):
        grams = Counter(tuple(hypothesis[i : i + n]) for i in range(len(hypothesis) - n + 1))
        if not grams:
            continue
        best: Counter[tuple[int, ...]] = Counter()
        for reference in references:
            best |= Counter(tuple(reference[i : i + n]) for i in range(len(reference) - n + 1))
        matched, total, smooth = sum((grams & best).values()), sum(grams.values()), int(n > 1)
        if matched + smooth == 0:
            return 0.0
        logs.append(math.log((matched + smooth) / (total + smooth)))
    closest = min((abs(len(r) - len(hypothesis)), len(r)) for r in references)[1]
    return math.exp(sum(logs) / len(logs)) * math.exp(min(0.0, 1 - closest / len(hypothesis)))


@given(st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=2, max_size=6))
@settings(max_examples=300, deadline=None)
def test_self_bleu_is_the_mean_of_plain_bleu(samples: list[list[int]]) -> None:
    expected = [plain_bleu(sample, samples[:i] + samples[i + 1 :]) for i, sample in enumerate(samples)]
    assert self_bleu([ids(*sample) for sample in samples]) == pytest.approx(np.mean(expected), abs=1e-12)


@given(st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=1, max_size=6), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_distinct_is_the_share_of_different_ngrams(samples: list[list[int]], n: int) -> None:
    grams = [tuple(s[i : i + n]) for s in samples for i in range(len(s) - n + 1)]
    share = distinct([ids(*sample) for sample in samples], n)
    if grams:
        assert share == pytest.approx(len(set(grams)) / len(grams))
    else:
        assert math.isnan(share)


def test_equal_samples_are_not_diverse_and_disjoint_ones_are() -> None:
    same = [ids(1, 2, 3, 4, 5)] * 4
    apart = [ids(*range(10 * k, 10 * k + 6)) for k in range(4)]
    assert self_bleu(same) == pytest.approx(1.0)
    assert self_bleu(apart) == 0.0
    assert distinct(apart) == 1.0
    assert distinct(same) == pytest.approx(0.25)
    assert math.isnan(self_bleu([ids(1, 2)]))
