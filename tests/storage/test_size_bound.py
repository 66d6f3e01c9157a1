"""No rows take more bytes than the bound: teachers that know nothing, in parts of any size."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from eopd.storage import zarr_part
from eopd.storage.artifacts import Artifact
from eopd.storage.codec import ENTRY_CHUNK, TOKEN_CHUNK, _most_draws, most_bytes
from eopd.storage.identity import Identity
from eopd.storage.teacher_cache import write_part
from eopd.storage.teacher_record import HeadRule, TeacherRows
from tests.storage.making import dense, header, rows_of

RULES = {
    "default": HeadRule(),
    "wide": HeadRule(k_max=64, min_prob=0.005, full_head_above=-1.0),
    "fixed": HeadRule(k_max=12, full_head_above=-1.0, draws="none"),
    "light": HeadRule(k_max=16, min_prob=1e-3, full_head_above=-1.0),
    "sampled": HeadRule(k_max=1, full_head_above=-1.0, draws="full", n_draws=50),
}
ALL_IDS = {"all ids": HeadRule(k_max=512, min_prob=1e-6, full_head_above=0.0)}
LENGTHS = {"one": [1], "many": [7] * 60, "long": [2500, 1700], "empty": [0, 0, 3]}


def worst(rule: HeadRule, lengths: list[int], vocabulary: int, stops: tuple[int, ...]) -> TeacherRows:
    """A teacher that knows nothing: full heads, most draws, and most sampled tokens outside the head."""
    return rows_of(dense(1, lengths, vocabulary, sharpness=1e-3), rule, stops=stops)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", RULES | ALL_IDS)
def test_no_rows_take_more_bytes_than_the_bound(tmp_path: Path, name: str, lengths: list[int]) -> None:
    rule, vocabulary, stops = (RULES | ALL_IDS)[name], 300, (3, 7)
    rows = worst(rule, lengths, vocabulary, stops)
    artifact = Artifact(tmp_path, Identity("scores", 1, 1, {}, {}, {"head": asdict(rule)}))
    with artifact.write_part(0) as folder:
        write_part(folder, rows, header(rule, vocabulary))
    stored = artifact.marker(0).bytes
    sizes = {"tokens": rows.tokens, "responses": rows.responses, "parts": 1}
    bound = most_bytes(rule, stops=len(stops), vocabulary=vocabulary, extra_k=0, **sizes)
    assert stored <= bound
    assert most_bytes(rule, stops=len(stops), vocabulary=0, extra_k=0, **sizes) >= bound


@pytest.mark.parametrize("name", RULES)
def test_ids_without_any_order_stay_within_the_bound_too(tmp_path: Path, name: str) -> None:
    """As of a vocabulary of 150,000 with random ids everywhere, log-probs down to the floor, and extra ids."""
    rule, vocabulary = RULES[name], 150_000
    rng = np.random.default_rng(0)
    rows = worst(rule, [900, 700], 300, (3, 7))
    extra_k = 4
    rows = replace(
        rows,
        token_ids=rng.integers(0, vocabulary, rows.tokens).astype(np.int32),
        sampled_rank=rng.integers(0, vocabulary, rows.tokens).astype(np.int32),
        head_ids=rng.integers(0, vocabulary, len(rows.head_ids)).astype(np.int32),
        draw_ids=rng.integers(0, vocabulary, len(rows.draw_ids)).astype(np.int32),
        stop_logprobs=rng.uniform(-16, 0, rows.stop_logprobs.shape).astype(np.float32),
        sampled_logprob=rng.uniform(-50, 0, rows.tokens).astype(np.float32),
        extra_offsets=np.arange(rows.tokens + 1, dtype=np.int64) * extra_k,
        extra_ids=rng.integers(0, vocabulary, rows.tokens * extra_k).astype(np.int32),
        extra_logprobs=rng.uniform(-50, 0, rows.tokens * extra_k).astype(np.float32),
    )
    artifact = Artifact(tmp_path, Identity("scores", 1, 1, {}, {}, {"head": asdict(rule)}))
    with artifact.write_part(0) as folder:
        write_part(folder, rows, replace(header(rule, vocabulary), extra_k=extra_k))
    sizes = {"tokens": rows.tokens, "responses": rows.responses, "parts": 1}
    stored = artifact.marker(0).bytes
    assert stored <= most_bytes(rule, stops=2, vocabulary=vocabulary, extra_k=extra_k, **sizes) < 4 * stored


def test_the_bound_knows_the_chunks_of_the_format() -> None:
    assert (zarr_part.TOKEN_CHUNK, zarr_part.ENTRY_CHUNK) == (TOKEN_CHUNK, ENTRY_CHUNK)


def test_more_parts_take_more_and_never_less() -> None:
    sizes = [
        most_bytes(HeadRule(), stops=2, vocabulary=700, extra_k=0, tokens=10_000, responses=100, parts=parts)
        for parts in (1, 4, 100)
    ]
    assert sizes == sorted(sizes)


def most_draws(rule: HeadRule, vocabulary: int, sharpness: float) -> int:
    rows = rows_of(dense(1, [40], vocabulary, sharpness=sharpness), rule, stops=())
    return int(np.diff(rows.draw_offsets).max())


@pytest.mark.parametrize("sharpness", [1e-3, 1.0, 4.0])
@pytest.mark.parametrize("above", [-1.0, 0.0, 2.0, 1000.0])
@pytest.mark.parametrize("k_max", [1, 16, 250, 512])
@pytest.mark.parametrize("weight", [1e-4, 1e-3, 0.03, 1.0])
def test_no_head_leaves_more_draws_than_the_bound_has(
    k_max: int, weight: float, above: float, sharpness: float
) -> None:
    rule, vocabulary = HeadRule(k_max, weight, above), 300
    bound = _most_draws(min(k_max, vocabulary), vocabulary, weight)
    assert most_draws(rule, vocabulary, sharpness) <= bound <= 1.001 / weight + 2


def test_a_head_of_every_id_leaves_few_draws_however_light() -> None:
    """Draws are stored as often as they are drawn: they outnumber the ids only where a head leaves ids out."""
    sizes = {"stops": 2, "vocabulary": 64, "extra_k": 0, "tokens": 4_100, "responses": 64, "parts": 2}
    all_ids = most_bytes(ALL_IDS["all ids"], **sizes)
    some_ids = most_bytes(HeadRule(k_max=16, min_prob=1e-6, full_head_above=0.0), **sizes)
    assert all_ids < 4_000_000 < 1_000_000_000 < some_ids
    assert most_draws(HeadRule(k_max=16, min_prob=1e-4), 64, 1e-3) > 64
