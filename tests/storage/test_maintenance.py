"""`eopd store ls|show|stats|copy|export|import` and stacked stores, as library functions."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eopd.storage import listing, paths, statistics
from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.captures import CaptureColumns, imported_header, read_capture
from eopd.storage.claims import claim
from eopd.storage.coverage import EntropyNeed, HeadNeed, NeedNotMet, SampledNeed
from eopd.storage.errors import DamagedPart, InputError, MissingPart, StoreError, WrongArtifact
from eopd.storage.exchange import export_parquet
from eopd.storage.identity import Identity
from eopd.storage.markers import Marker
from eopd.storage.remote import copy
from eopd.storage.stacked import StackedStores
from eopd.storage.teacher_cache import TeacherCache, write_part
from eopd.storage.teacher_record import HeadRule
from eopd.storage.verification import verify
from tests.raises import raises

from .making import capture, dense, other, rows_of, scores
from .test_teacher_cache import assert_identical


def test_listing(tmp_path: Path) -> None:
    artifact, _ = scores(tmp_path)
    rollouts = other(tmp_path, "rollouts", {})
    entries = {entry.key: entry for entry in listing.ls(tmp_path)}
    assert entries[artifact.key].complete
    assert entries[artifact.key].bytes == sum(artifact.marker(part).bytes for part in range(2))
    assert listing.find(tmp_path, artifact.key[:6]).key == artifact.key
    assert listing.find(tmp_path, f"rollouts/{rollouts.key}").key == rollouts.key
    with raises(StoreError, "no artifact", artifact="zzz"):
        listing.find(tmp_path, "zzz")
    with raises(StoreError, "2 artifacts"):
        listing.find(tmp_path, "")
    with pytest.raises(StoreError, match="there is no store"):
        listing.ls(tmp_path / "nowhere")
    shown = listing.show(artifact)
    assert shown["missing_parts"] == 0
    assert shown["parts_committed"]["1"]["inputs"] == {"rollouts": "rollouts"}
    (artifact.folder / paths.IDENTITY).write_text("{")
    assert "not JSON" in {entry.key: entry for entry in listing.ls(tmp_path)}[artifact.key].problem


def test_states_of_a_training_are_shown_by_count(tmp_path: Path) -> None:
    """As many as there may be optimiser steps: nobody lists those that are not there."""
    artifact = Artifact(tmp_path, Identity("progress", 1, 10**9))
    for part in (0, 2):
        with artifact.write_part(part) as folder:
            (folder / "state").write_text("x")
    shown = listing.show(artifact)
    assert shown["missing_parts"] == 10**9 - 2
    assert shown["first_missing"] == [1, 3, 4, 5, 6, 7, 8, 9]
    with raises(MissingPart, r"\[1, 3, 4, 5, 6, 7, 8, 9\]", artifact=str(artifact)):
        _ = artifact.manifest


def test_stats(tmp_path: Path) -> None:
    artifact, written = scores(tmp_path, head=HeadRule(k_max=8, full_head_above=-1.0), lengths=[400, 300])
    figures = statistics.stats(TeacherCache(artifact))
    entropy = np.concatenate([rows.entropy for rows in written])
    assert figures.tokens == len(entropy) == sum(figures.entropy_counts)
    assert figures.entropy_mean == pytest.approx(entropy.mean(), abs=2e-4)
    assert figures.gate_fraction[0.8] == pytest.approx((entropy > 0.8).mean(), abs=2e-3)
    mass = np.mean([np.exp(rows.head_logprobs).reshape(-1, 8).sum(axis=1) for rows in written])
    assert figures.retained_mass[8] == pytest.approx(mass, abs=2e-3)
    assert list(figures.retained_mass) == [1, 2, 4, 8]
    stored = sum(artifact.marker(part).bytes for part in range(2))
    assert figures.bytes_per_token * figures.tokens == pytest.approx(stored)
    assert 0.3 < sum(figures.bytes_by_field.values()) / figures.bytes_per_token < 1.1
    assert "gated" in figures.text()
    assert figures.to_json()["entropy_edges"][0] == 0.0
    statistics.plot(figures, tmp_path / "histogram.svg")
    bars = ElementTree.parse(tmp_path / "histogram.svg").findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == len(figures.entropy_counts)
    with raises(InputError, file="histogram.png"):
        statistics.plot(figures, tmp_path / "histogram.png")
    empty = Artifact(tmp_path, Identity("scores", 1, 1, {"none": 1}))
    with raises(InputError, artifact=str(empty)):
        statistics.stats(TeacherCache(empty))


def test_copy(tmp_path: Path) -> None:
    artifact, _ = scores(tmp_path / "here", parts=3)
    assert copy(artifact, tmp_path / "there", parts=[1]) == [1]
    there = open_artifact(tmp_path / "there", "scores", artifact.key)
    assert there.missing() == [0, 2]
    assert copy(artifact, tmp_path / "there") == [0, 2]
    assert copy(artifact, tmp_path / "there") == []
    assert there.manifest["part_checksums"] == artifact.manifest["part_checksums"]
    assert verify(tmp_path / "there") == []
    assert_identical(TeacherCache(there).read_part(2), TeacherCache(artifact).read_part(2))


def test_damage_is_not_copied(tmp_path: Path) -> None:
    artifact, _ = scores(tmp_path / "here")
    shard = artifact.part_folder(0) / "entries" / "c" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedPart, match="changed"):
        copy(artifact, tmp_path / "there")
    assert Artifact(tmp_path / "there", artifact.identity).committed() == set()


def test_stacked_stores(tmp_path: Path) -> None:
    team, private = tmp_path / "team", tmp_path / "private"
    small, _ = scores(team, head=HeadRule(k_max=8))
    large, _ = scores(team, head=HeadRule(k_max=32))
    assert small.identity.base_key == large.identity.base_key
    stack = StackedStores([private, team])
    assert stack.find(small.identity).folder == small.folder
    new = Identity("scores", 1, 2, {"test": 2})
    assert stack.find(new).folder == private / "scores" / new.key
    base = small.identity.base_key
    assert {copied.key for copied in stack.coverages(base)} == {small.key, large.key}
    assert stack.coverages("0" * 20) == []
    with pytest.raises(ValueError, match="first of stacked stores"):
        StackedStores([])
    os.chmod(team, 0o555)
    assert TeacherCache(stack.find(small.identity)).read([(0, 0)]).responses == 1
    os.chmod(team, 0o755)


def by_part(store: Path, kind: str, content: bytes, rollouts: Artifact | None = None) -> Artifact:
    """Rollouts of two parts, or what was made from them, with ``content`` in every file."""
    inputs = {"rollouts": rollouts.key} if rollouts is not None else {}
    artifact = Artifact(store, Identity(kind, 1, 2, inputs=inputs, coverage={} if kind == "scores" else None))
    for part in range(2):
        made_of = {"rollouts": rollouts.marker(part).checksum} if rollouts is not None else {}
        with artifact.write_part(part, inputs=made_of) as folder:
            (folder / "data").write_bytes(content)
    return artifact


@pytest.mark.parametrize("kind", ["scores", "token_counts"])
def test_scores_of_other_rollouts_are_not_served(tmp_path: Path, kind: str) -> None:
    """One key, two machines, two sets of bytes: scores of the one do not fit the rollouts of the other."""
    team, private = tmp_path / "team", tmp_path / "private"
    rollouts = by_part(team, "rollouts", b"as the team's GPU sampled them")
    scored = by_part(team, kind, b"scores", rollouts)
    stack = StackedStores([private, team])
    assert stack.find(scored.identity).folder == scored.folder
    assert stack.find(rollouts.identity).folder == rollouts.folder

    mine = by_part(private, "rollouts", b"as mine did")
    stack = StackedStores([private, team])
    assert stack.find(rollouts.identity).folder == mine.folder
    assert stack.find(scored.identity).folder == private / kind / scored.key
    assert stack.coverages(scored.identity.base_key) == []
    with pytest.raises(WrongArtifact, match="other bytes there"):
        copy(scored, private)

    shutil.rmtree(private)
    assert copy(rollouts, private) == [0, 1]
    assert StackedStores([private, team]).find(scored.identity).folder == scored.folder
    assert copy(scored, private) == [0, 1]


def test_what_is_begun_privately_is_finished_there(tmp_path: Path) -> None:
    team, private = tmp_path / "team", tmp_path / "private"
    rollouts = by_part(team, "rollouts", b"x")
    copy(rollouts, private, parts=[1])
    assert StackedStores([private, team]).find(rollouts.identity).missing() == [0]
    shutil.rmtree(private)
    mine = Artifact(private, rollouts.identity)
    mine.begin()  # by a launcher whose jobs were cancelled
    assert StackedStores([private, team]).find(rollouts.identity).folder == rollouts.folder
    with claim(mine, 0):
        assert StackedStores([private, team]).find(rollouts.identity).folder == mine.folder
    assert StackedStores([private, team]).find(rollouts.identity).folder == mine.folder


def test_whether_scores_fit_is_looked_at_once_the_rollouts_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    team, private = tmp_path / "team", tmp_path / "private"
    scored = by_part(team, "scores", b"scores", by_part(team, "rollouts", b"x"))
    mine = by_part(private, "rollouts", b"y")
    mine.drop_part(1)
    stack = StackedStores([private, team])
    looked: list[Path] = []
    marker = Artifact.marker

    def look(here: Artifact, part: int) -> Marker:
        looked.append(here.folder)
        return marker(here, part)

    def find() -> int:
        """How many markers are read."""
        looked.clear()
        assert stack.find(scored.identity).folder == private / "scores" / scored.key
        return len(looked)

    monkeypatch.setattr(Artifact, "marker", look)
    assert find() == find() > 0
    with mine.write_part(1) as folder:
        (folder / "data").write_bytes(b"y")
    assert find() > 0
    assert find() == 0


def test_export(tmp_path: Path) -> None:
    artifact, _ = scores(tmp_path)
    cache = TeacherCache(artifact)
    tokens = export_parquet(cache, tmp_path / "scores.parquet")
    table = pq.read_table(tmp_path / "scores.parquet")
    rows = cache.read_part(1)
    assert tokens == sum(len(some) for some in table["token_ids"].to_pylist())
    last = table.slice(4, 4).to_pylist()
    assert [row["part"] for row in last] == [1] * 4
    low, high = rows.response_offsets[1:3]
    assert last[1]["token_ids"] == rows.token_ids[low:high].tolist()
    assert last[1]["head_ids"][3] == rows.head_ids[rows.head_offsets[low + 3] : rows.head_offsets[low + 4]].tolist()
    np.testing.assert_allclose(last[1]["entropy"], rows.entropy[low:high])


@pytest.mark.parametrize("shifted", [True, False])
def test_import(tmp_path: Path, shifted: bool) -> None:
    _, logprobs = capture(tmp_path / "capture.parquet", shifted)
    rows = read_capture(tmp_path / "capture.parquet", shifted=shifted).rows
    assert np.diff(rows.response_offsets).tolist() == [12, 7]
    described = imported_header(rows, teacher="t", tokenizer="k", vocab_size=60, source="capture.parquet")
    artifact = Artifact(tmp_path, Identity("scores", 1, 1))
    with artifact.write_part(0) as folder:
        write_part(folder, rows, described)
    cache = TeacherCache(artifact)
    result = cache.read_part(0)
    exact = -np.sort(-logprobs, axis=1)[:, :10].reshape(-1)
    np.testing.assert_allclose(result.head_logprobs, exact, atol=1 / 256)
    cache.require([HeadNeed(10)])
    for need, message in ((EntropyNeed(), "full-vocabulary entropy"), (SampledNeed(), "sampled tokens' log-probs")):
        with pytest.raises(NeedNotMet, match=message):
            cache.require([need])


def test_what_cannot_be_imported(tmp_path: Path) -> None:
    table, _ = capture(tmp_path / "capture.parquet", False)
    with raises(InputError, "'ids'", file="capture.parquet"):
        read_capture(tmp_path / "capture.parquet", CaptureColumns(ids="ids"))
    heavy = [[[0.0] * 10] * 12, [[0.0] * 10] * 7]
    pq.write_table(table.set_column(2, "top_values", pa.array(heavy)), tmp_path / "heavy.parquet")
    with raises(InputError, "mass", file="heavy.parquet", row=0, remedy="log-probs"):
        read_capture(tmp_path / "heavy.parquet", shifted=False)
    short = table.set_column(2, "top_values", pa.array([[[0.0]] * 3, [[0.0]] * 7]))
    pq.write_table(short, tmp_path / "short.parquet")
    with raises(InputError, "12 tokens and 3 lists", file="short.parquet", row=0):
        read_capture(tmp_path / "short.parquet", shifted=False)


SEQUENCE = {"input_ids": [[5, 1, 2]], "top_indices": [[[1, 0], [2, 0], [3, 1]]], "top_values": [[[-0.2, -2.0]] * 3]}
HOLE = [[None, [2, 0], [3, 1]]]
UNREADABLE = {
    "flat lists": ({"top_indices": [[1, 2, 3]]}, "column 'top_indices' is list"),
    "texts": ({"input_ids": [["5", "1", "2"]]}, "column 'input_ids' is list"),
    "floats as ids": ({"top_indices": [[[1.0, 0.0]] * 3]}, "column 'top_indices' is list"),
    "a null row": ({"top_values": pa.array([None], pa.list_(pa.list_(pa.float64())))}, "top_values is null"),
    "a null token": ({"input_ids": [[5, None, 2]]}, "token 1 of input_ids is null"),
    "a null first position": (
        {"top_indices": HOLE, "top_values": [[None, *[[-0.2, -2.0]] * 2]]},
        "position 0.*vLLM.*--no-shifted",
    ),
    "a null position": ({"top_indices": [[[1, 0], None, [3, 1]]]}, "position 1: null"),
    "a null id": ({"top_indices": [[[1, 0], [None, 0], [3, 1]]]}, "position 1: null"),
    "a token beyond": ({"input_ids": [[5, 1, 64]]}, "token id 64 is outside the vocabulary of 64"),
    "a negative token": ({"input_ids": [[5, -1, 2]]}, "token id -1 is outside"),
    "an id beyond": (
        {"top_indices": [[[1, 0], [2, 70], [3, 1]]]},
        "position 1: id 70 is outside the vocabulary of 64",
    ),
    "an enormous id": (
        {"top_indices": pa.array([[[1, 0], [2, 2**63], [3, 1]]], pa.list_(pa.list_(pa.uint64())))},
        "position 1: id 9223372036854775808 is outside",
    ),
    "an id twice": ({"top_indices": [[[1, 1], [2, 0], [3, 1]]]}, "position 0: id 1 is there twice"),
    "not a number": ({"top_values": [[[-0.2, float("nan")]] * 3]}, "position 0: a log-prob is NaN"),
    "logits": ({"top_values": [[[3.0, -2.0]] * 3]}, "position 0: mass .*log-probs"),
    "no mass": (
        {"top_values": [[[-0.2, -2.0], [float("-inf")] * 2, [-0.2, -2.0]]]},
        "position 1: its top-k list is empty",
    ),
    "more ids than values": (
        {"top_indices": [[[1, 0, 4], [2, 0], [3, 1]]]},
        "position 0: 3 ids and 2 log-probs",
    ),
    "more positions than tokens": ({"input_ids": [[5, 1]]}, "2 tokens and 3 lists"),
    "infinite log-prob": ({"top_values": [[[-0.2, float("inf")]] + [[-0.2, -2.0]] * 2]}, r"position 0: .*\+inf"),
    "first token beyond": ({"input_ids": [[99, 1, 2]]}, "token id 99"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_capture_that_is_wrong_is_refused_by_row_and_position(tmp_path: Path, name: str) -> None:
    changes, message = UNREADABLE[name]
    pq.write_table(pa.table({**SEQUENCE, **changes}), tmp_path / "capture.parquet")
    row = None if message.startswith("column") else 0
    with raises(InputError, message, file="capture.parquet", row=row) as caught:
        read_capture(tmp_path / "capture.parquet", vocab_size=64)
    assert bool(caught.value.remedy) == (name in ("a null first position", "logits"))
    assert str(caught.value).count("capture.parquet") == 1


def test_a_capture_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "capture.parquet"
    for content in (b"", b"{}", b"PAR1" + b"\0" * 40 + b"PAR1"):
        path.write_bytes(content)
        with raises(InputError, file=path):
            read_capture(path, vocab_size=64)
    with pytest.raises(FileNotFoundError, match=r"gone\.parquet"):
        read_capture(tmp_path / "gone.parquet", vocab_size=64)


def test_ids_without_mass_are_left_out_and_a_null_first_position_has_no_scores(tmp_path: Path) -> None:
    ids = [[[1, 0, 94_000_000_000], [2, 0, -7], [3, 1, 1]]]
    values = [[[-0.2, -2.0, float("-inf")]] * 3]
    pq.write_table(pa.table({**SEQUENCE, "top_indices": ids, "top_values": values}), tmp_path / "garbage.parquet")
    pq.write_table(pa.table(SEQUENCE), tmp_path / "clean.parquet")
    garbage, clean = (read_capture(tmp_path / f"{name}.parquet", vocab_size=64).rows for name in ("garbage", "clean"))
    assert garbage.head_ids.tolist() == clean.head_ids.tolist() == [1, 0, 2, 0]
    assert np.array_equal(garbage.entropy, clean.entropy)
    late = {**SEQUENCE, "top_indices": HOLE, "top_values": [[None, *[[-0.2, -2.0]] * 2]]}
    pq.write_table(pa.table(late), tmp_path / "vllm.parquet")
    rows = read_capture(tmp_path / "vllm.parquet", shifted=False).rows
    assert rows.token_ids.tolist() == [1, 2]
    assert rows.head_ids.tolist() == [2, 0, 3, 1]


def test_log_probs_of_bfloat16_are_scaled_to_what_they_were_rounded_from(tmp_path: Path) -> None:
    made = np.random.default_rng(0)
    exact = np.log(made.dirichlet(np.ones(64), size=200))
    rounded = (exact.astype(np.float32).view(np.uint32) + 0x7FFF & 0xFFFF0000).view(np.float32).astype(np.float64)
    masses = np.exp(rounded).sum(axis=1)
    assert masses.max() > 1.0 + 1e-3
    lists = {"top_indices": [[list(range(64))] * 200], "top_values": [rounded.tolist()]}
    pq.write_table(pa.table({"input_ids": [[1] * 200], **lists}), tmp_path / "capture.parquet")
    result = read_capture(tmp_path / "capture.parquet", shifted=False, vocab_size=64)
    assert (result.precision, result.mass) == ("bfloat16", pytest.approx(masses.max()))
    assert np.exp(result.rows.head_logprobs.reshape(200, 64)).sum(axis=1) == pytest.approx(1.0, abs=1e-5)
    assert result.rows.tail_logmass.max() <= -49
    float32 = (rounded + 1e-5).tolist()
    pq.write_table(pa.table({"input_ids": [[1] * 200], **lists, "top_values": [float32]}), tmp_path / "heavy.parquet")
    with raises(InputError, "mass", file="heavy.parquet"):
        read_capture(tmp_path / "heavy.parquet", shifted=False, vocab_size=64)


CAPTURES = Path(__file__).resolve().parents[3] / "shared" / "cases" / "captures"


@pytest.mark.skipif(not CAPTURES.exists(), reason="the captures are not beside this checkout (../shared/cases)")
@pytest.mark.parametrize(
    ("name", "shifted", "tokens"),
    [
        ("flat", True, "column 'top_indices'"),
        ("vllm_first_none", True, "position 0: null"),
        ("vllm_first_none", False, 5),
        ("garbage_id", True, 5),
        ("id_beyond_vocab", True, "row 0: position 2: id 70"),
        ("bf16_full", True, 5),
    ],
)
def test_captures_of_other_tools(name: str, shifted: bool, tokens: int | str) -> None:
    if isinstance(tokens, int):
        assert read_capture(CAPTURES / f"{name}.parquet", shifted=shifted, vocab_size=64).rows.tokens == tokens
        return
    with raises(InputError, tokens, file=f"{name}.parquet"):
        read_capture(CAPTURES / f"{name}.parquet", shifted=shifted, vocab_size=64)


def test_a_copied_folder_works_where_it_lands(tmp_path: Path) -> None:
    artifact, _ = scores(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = open_artifact(tmp_path / "b", "scores", artifact.key)
    assert_identical(TeacherCache(moved).read_part(0), TeacherCache(artifact).read_part(0))
    assert rows_of(dense(0, [1], 20), HeadRule()).tokens == 1


def test_advice_gates_the_share_of_tokens_that_it_names(tmp_path: Path) -> None:
    artifact, written = scores(tmp_path, lengths=[400, 300])
    advice = statistics.stats(TeacherCache(artifact)).advice
    entropy = np.concatenate([rows.entropy for rows in written])
    assert (entropy > advice.tau).mean() == pytest.approx(statistics.GATED, abs=2 / len(entropy) + 1e-3)


@pytest.mark.parametrize("above", [0.4, statistics.NEVER])
def test_advice_estimates_the_bytes_of_rules_that_were_not_used(tmp_path: Path, above: float) -> None:
    """The estimate knows neither compression nor where draws fall: a tenth of the bytes is what that may cost."""
    used = HeadRule(full_head_above=above)
    figures = statistics.stats(TeacherCache(scores(tmp_path / "used", head=used, lengths=[1200, 900])[0]))
    assert figures.advice.min_prob is not None
    rules = {
        "bytes_per_token": HeadRule(min_prob=figures.advice.min_prob, full_head_above=statistics.NEVER),
        "bytes_per_token_at_tau": HeadRule(full_head_above=max(above, figures.advice.tau)),
    }
    for name, rule in rules.items():
        stored = statistics.stats(TeacherCache(scores(tmp_path / name, head=rule, lengths=[1200, 900])[0]))
        assert getattr(figures.advice, name) == pytest.approx(stored.bytes_per_token, rel=0.1), name
        assert getattr(figures.advice, name) <= figures.bytes_per_token * 1.001


@pytest.mark.parametrize("rule", [HeadRule(full_head_above=-1.0, draws="none"), HeadRule(draws="full", n_draws=4)])
def test_there_is_no_advice_on_heads_without_draws_of_the_rest(tmp_path: Path, rule: HeadRule) -> None:
    figures = statistics.stats(TeacherCache(scores(tmp_path, head=rule)[0]))
    assert (figures.advice.min_prob, figures.advice.bytes_per_token) == (None, None)
    assert "train.objective.tau" in figures.text()
    assert "score.head" not in figures.text()
