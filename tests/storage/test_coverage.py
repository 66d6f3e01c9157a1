"""Needs against coverages: met, or refused with what is missing and what adds it."""

from __future__ import annotations

import pytest

from eopd.storage.coverage import Coverage, NeedNotMet, able
from eopd.storage.needs import DrawsNeed, EntropyNeed, ExtraIdsNeed, HeadNeed, Need, SampledNeed, StopsNeed
from eopd.storage.teacher_record import HeadRule

AWARE = Coverage(HeadRule(k_max=16, min_prob=0.03, full_head_above=0.4), (7,), vocab_size=1000)
FIXED = Coverage(HeadRule(k_max=64, full_head_above=-1.0, draws="none"), (7,), extra_k=8, vocab_size=1000)
SAMPLED = Coverage(HeadRule(k_max=1, draws="full", n_draws=50), (7,), vocab_size=1000)
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
    ("coverage", "need", "message"),
    [
        (AWARE, HeadNeed(17, 0.8), r"heads of 17 entries; it keeps 16\. Add: score\.head\.k_max=17"),
        (AWARE, HeadNeed(16, 0.2), r"full heads where entropy > 0\.2; .*score\.head\.full_head_above=0\.2"),
        (AWARE, HeadNeed(2), r"full heads where entropy > -1"),
        (AWARE, DrawsNeed("beyond_head", max_weight=0.01), r"its draws weigh 0\.03\. Add: score\.head\.min_prob=0\.01"),
        (AWARE, DrawsNeed("full", n=50), r"50 draws a token .*score\.head\.draws=full score\.head\.n_draws=50"),
        (AWARE, HeadNeed(16, 0.8, 0.01), r"ids of probability 0\.01 and more; .*Add: score\.head\.min_prob=0\.01"),
        (AWARE, ExtraIdsNeed(4), r"student's top-4; it has 0"),
        (FIXED, DrawsNeed("beyond_head"), r"it has draws: none\. Add: score\.head\.draws=beyond_head"),
        (SAMPLED, DrawsNeed("full", n=64), r"64 draws"),
        (SAMPLED, DrawsNeed("beyond_head"), r"it has draws: full"),
    ],
)
def test_not_met(coverage: Coverage, need: Need, message: str) -> None:
    with pytest.raises(NeedNotMet, match=f"scores/x lacks .*{message}"):
        coverage.require([EntropyNeed(), need], "scores/x")


def test_a_one_entry_head_is_never_taken_for_a_top_k() -> None:
    """Full heads only above 0.4 nats: a top-16 everywhere would be a hard target on most tokens."""
    assert AWARE.lacks(HeadNeed(16)) is not None


def test_the_cheapest_that_answers() -> None:
    held = {"aware": AWARE, "fixed": FIXED, "sampled": SAMPLED}
    assert able(held, [HeadNeed(8, 0.8)])[0] == "aware"
    assert able(held, [HeadNeed(8)])[0] == "fixed"
    assert able(held, [])[0] == "sampled"
    assert able(held, [HeadNeed(65)]) == []
