"""Needs against coverages: met, or refused with what is missing and what adds it."""

from __future__ import annotations

import re

import pytest

from eopd.storage.coverage import (
    Coverage,
    DrawsNeed,
    EntropyNeed,
    ExtraIdsNeed,
    HeadNeed,
    Need,
    NeedNotMet,
    SampledNeed,
    StopsNeed,
    able,
)
from eopd.storage.teacher_record import HeadRule
from tests.raises import raises

AWARE = Coverage(HeadRule(k_max=16, min_prob=0.03, full_head_above=0.4), (7,), vocab_size=1000)
FIXED = Coverage(HeadRule(k_max=64, full_head_above=-1.0, draws="none"), (7,), extra_k=8, vocab_size=1000)
SAMPLED = Coverage(HeadRule(k_max=1, draws="full", n_draws=50), (7,), vocab_size=1000)
IMPORTED = Coverage(HeadRule(k_max=64, draws="none"), entropy=False, sampled=False, vocab_size=1000)
WHOLE = Coverage(HeadRule(k_max=32, full_head_above=-1.0, draws="none"), vocab_size=32)


@pytest.mark.parametrize(
    ("coverage", "need"),
    [
        (AWARE, EntropyNeed()),
        (AWARE, SampledNeed()),
        (AWARE, StopsNeed()),
        (AWARE, HeadNeed(16, 0.8)),
        (AWARE, HeadNeed(8, 0.4)),
        (AWARE, HeadNeed(1)),
        (AWARE, DrawsNeed("beyond_head")),
        (AWARE, DrawsNeed("beyond_head", max_weight=0.03)),
        (FIXED, HeadNeed(16)),
        (FIXED, HeadNeed(16, 0.4, 0.001)),
        (AWARE, HeadNeed(16, 0.8, 0.03)),
        (FIXED, HeadNeed(64)),
        (FIXED, ExtraIdsNeed(8)),
        (SAMPLED, DrawsNeed("full", n=50)),
        (WHOLE, HeadNeed(64)),
    ],
)
def test_met(coverage: Coverage, need: Need) -> None:
    assert coverage.lacks(need) is None
    coverage.require([need], "here")


@pytest.mark.parametrize(
    ("coverage", "need", "what", "settings"),
    [
        (AWARE, HeadNeed(17, 0.8), "heads of 17 entries .*16", {"score.head.k_max": 17}),
        (AWARE, HeadNeed(16, 0.2), r"entropy > 0\.2 .*> 0\.4", {"score.head.full_head_above": 0.2}),
        (AWARE, HeadNeed(2), "entropy > -1 ", {"score.head.full_head_above": -1.0}),
        (AWARE, HeadNeed(16, 0.8, 0.01), r"probability 0\.01 .*0\.03", {"score.head.min_prob": 0.01}),
        (AWARE, DrawsNeed("beyond_head", max_weight=0.01), r"at most 0\.01 .*0\.03", {"score.head.min_prob": 0.01}),
        (AWARE, DrawsNeed("full", n=50), "50 draws", {"score.head.draws": "full", "score.head.n_draws": 50}),
        (AWARE, ExtraIdsNeed(4), "student's top-4 .*0", {"rollout.student_topk": 4}),
        (FIXED, DrawsNeed("beyond_head"), "beyond the head .*none", {"score.head.draws": "beyond_head"}),
        (SAMPLED, DrawsNeed("full", n=64), "64 draws .*50", {"score.head.draws": "full", "score.head.n_draws": 64}),
        (SAMPLED, DrawsNeed("beyond_head"), "beyond the head .*full", {"score.head.draws": "beyond_head"}),
        (IMPORTED, EntropyNeed(), "entropy", {}),
        (IMPORTED, SampledNeed(), "sampled tokens", {}),
        (IMPORTED, StopsNeed(), "stop", {}),
    ],
)
def test_not_met(coverage: Coverage, need: Need, what: str, settings: dict[str, object]) -> None:
    missing = coverage.lacks(need)
    assert missing is not None
    assert missing.settings == settings
    assert re.search(what, missing.what)
    with pytest.raises(NeedNotMet) as refused:
        coverage.require([HeadNeed(1), need], "scores/x")
    assert f"scores/x lacks {missing.what}" in str(refused.value)
    assert all(f"{name}={value}" in str(refused.value) for name, value in settings.items())


def test_every_missing_need_is_named_at_once() -> None:
    with raises(NeedNotMet, "17 entries.*top-4", remedy="score.head.k_max=17 rollout.student_topk=4"):
        AWARE.require([HeadNeed(17, 0.8), EntropyNeed(), ExtraIdsNeed(4)], "scores/x")


def test_a_one_entry_head_is_never_taken_for_a_top_k() -> None:
    """Full heads only above 0.4 nats: a top-16 everywhere would be a hard target on most tokens."""
    assert AWARE.lacks(HeadNeed(16)) is not None


def test_the_cheapest_that_answers() -> None:
    held = {"aware": AWARE, "fixed": FIXED, "sampled": SAMPLED}
    assert able(held, [HeadNeed(8, 0.8)])[0] == "aware"
    assert able(held, [HeadNeed(8)])[0] == "fixed"
    assert able(held, [])[0] == "sampled"
    assert able(held, [HeadNeed(65)]) == []
