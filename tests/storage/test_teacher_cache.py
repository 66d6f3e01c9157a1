"""The cache as its readers see it: any responses in any order, from parts that are what they say they are."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.codecs import ShardingCodec

from eopd.storage import paths
from eopd.storage import zarr_part as zarr_write
from eopd.storage.artifacts import Artifact
from eopd.storage.codec import FORMAT_VERSION
from eopd.storage.coverage import EntropyNeed, HeadNeed, NeedNotMet, SampledNeed
from eopd.storage.errors import DamagedPart, MissingPart, NewerSchema, StoreError, WrongArtifact
from eopd.storage.exchange import export_parquet
from eopd.storage.identity import Identity
from eopd.storage.markers import file_text, marker_text
from eopd.storage.statistics import stats
from eopd.storage.teacher_cache import Origin, PartHeader, TeacherCache, concatenate, write_part
from eopd.storage.teacher_record import HeadRule, TeacherRows
from tests.raises import raises

from .making import STOPS, dense, header, rows_of, scores
from .test_codec import assert_same


def pick(rows: TeacherRows, wanted: list[int]) -> TeacherRows:
    """Some responses of decoded rows, by plain loops: what the reader is compared with."""
    pieces = []
    for s in wanted:
        low, high = int(rows.response_offsets[s]), int(rows.response_offsets[s + 1])
        fields = {"stop_ids": rows.stop_ids, "response_offsets": np.asarray([0, high - low])}
        for name in ("token_ids", "entropy", "sampled_logprob", "sampled_rank", "stop_logprobs", "tail_logmass"):
            fields[name] = getattr(rows, name)[low:high]
        for name, of in (("head", ("ids", "logprobs")), ("draw", ("ids",)), ("extra", ("ids", "logprobs"))):
            offsets = getattr(rows, f"{name}_offsets")
            fields[f"{name}_offsets"] = offsets[low : high + 1] - offsets[low]
            for field in of:
                fields[f"{name}_{field}"] = getattr(rows, f"{name}_{field}")[offsets[low] : offsets[high]]
        pieces.append(TeacherRows(**fields))
    return concatenate(pieces)


def assert_identical(result: TeacherRows, wanted: TeacherRows) -> None:
    for name in TeacherRows.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(result, name), getattr(wanted, name), err_msg=name)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, list[TeacherRows]]:
    return scores(tmp_path_factory.mktemp("store"), parts=3, lengths=[5, 40, 0, 1, 17, 120])


def test_a_part_comes_back(built: tuple[Artifact, list[TeacherRows]]) -> None:
    artifact, written = built
    cache = TeacherCache(artifact)
    for part, rows in enumerate(written):
        assert cache.response_count(part) == rows.responses
        np.testing.assert_array_equal(cache.token_counts(part), np.diff(rows.response_offsets))
        assert_same(cache.read_part(part), rows)
        assert cache.header(part) == header(HeadRule(), 300)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), threads=st.sampled_from([1, 2]), memory=st.sampled_from([0, 5_000, 1 << 28]))
def test_any_responses_in_any_order(
    built: tuple[Artifact, list[TeacherRows]], data: st.DataObject, threads: int, memory: int
) -> None:
    artifact, _ = built
    cache = TeacherCache(artifact, memory=memory, threads=threads)
    whole = concatenate([cache.read_part(part) for part in range(3)])
    wanted = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=12))
    assert_identical(cache.read(wanted), pick(whole, [part * 6 + row for part, row in wanted]))
    assert cache.chunks.held <= memory


def test_groups_read_in_threads_are_put_together_in_order(tmp_path: Path) -> None:
    lengths = [3000, 5, 9000, 7000, 2500]
    artifact, _ = scores(tmp_path, parts=2, vocabulary=20, lengths=lengths)
    cache = TeacherCache(artifact, memory=100_000, threads=3)
    wanted = [(p, r) for r in (4, 0, 3, 2, 1, 2) for p in (1, 0)]
    alone = concatenate([TeacherCache(artifact, threads=1).read([one]) for one in wanted])
    assert_identical(cache.read(wanted), alone)
    assert cache.chunks.held <= 100_000


def test_an_empty_part_and_an_empty_response(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, Identity("scores", 1, 2, coverage={}))
    head = HeadRule()
    for part, lengths in enumerate(([], [0, 0])):
        with artifact.write_part(part) as folder:
            write_part(folder, rows_of(dense(0, list(lengths), 50), head), header(head, 50))
    cache = TeacherCache(artifact)
    assert cache.response_count(0) == 0
    for nothing in (cache.read_part(0), cache.read([])):
        assert (nothing.responses, nothing.tokens) == (0, 0)
    assert_identical(cache.read([]), cache.read([(1, 0)] * 0))
    assert cache.read([(1, 1), (1, 0)]).responses == 2
    assert cache.read([(1, 0)]).tokens == 0
    assert cache.read_part(0).stop_logprobs.shape == (0, len(STOPS))


@pytest.mark.parametrize("lengths", [([], []), ([], [5, 3]), ([3], [])])
def test_statistics_and_export_of_parts_without_responses(tmp_path: Path, lengths: tuple[list[int], ...]) -> None:
    artifact = Artifact(tmp_path, Identity("scores", 1, 2, coverage={}))
    for part, some in enumerate(lengths):
        with artifact.write_part(part) as folder:
            write_part(folder, rows_of(dense(part, some, 50), HeadRule()), header(HeadRule(), 50))
    cache, tokens = TeacherCache(artifact), sum(map(sum, lengths))
    assert (stats(cache).parts, stats(cache).tokens) == (2, tokens)
    assert export_parquet(cache, tmp_path / "scores.parquet") == tokens
    assert sum(map(len, pq.read_table(tmp_path / "scores.parquet")["token_ids"])) == tokens


def test_rows_and_parts_that_are_not_there(built: tuple[Artifact, list[TeacherRows]]) -> None:
    cache = TeacherCache(built[0])
    with pytest.raises(ValueError, match=r"rows 0 \.\. 5, asked for 6"):
        cache.read([(0, 6)])
    with raises(MissingPart, part=3):
        cache.read([(3, 0)])


def test_parts_of_different_layout_are_read_together(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, Identity("scores", 1, 2, coverage={}))
    written = []
    for part, head in enumerate((HeadRule(), HeadRule(draws="none"))):
        written.append(rows_of(dense(part, [9, 4], 50), head))
        with artifact.write_part(part) as folder:
            write_part(folder, written[-1], header(head, 50))
    records = TeacherCache(artifact).read([(1, 1), (0, 0), (1, 0)])
    np.testing.assert_array_equal(
        records.token_ids,
        np.concatenate([written[1].token_ids[9:], written[0].token_ids[:9], written[1].token_ids[:9]]),
    )


def test_the_rows_must_be_the_headers(tmp_path: Path) -> None:
    rows = rows_of(dense(0, [4], 50), HeadRule())
    with pytest.raises(ValueError, match="stop_ids of the rows"):
        write_part(tmp_path, rows, header(HeadRule(), 50, stops=(1,)))


def test_any_zarr_reader_opens_a_part(built: tuple[Artifact, list[TeacherRows]]) -> None:
    """Plain zarr-python, without our store and pipeline, sees the same bytes."""
    artifact, _ = built
    folder = artifact.part_folder(1)
    group = zarr.open_group(folder, mode="r")
    assert group.attrs["schema"] == FORMAT_VERSION
    assert [name for name, _ in group.attrs["columns"]][:3] == ["head_size", "sampled", "draws"]
    part = TeacherCache(artifact)._part(1).zarr
    for name in ("tokens", "entries"):
        array = group[name]
        assert isinstance(array, zarr.Array)
        np.testing.assert_array_equal(array[:], part.read(name, 0, part.length[name]))
        np.testing.assert_array_equal(array[:, 3:9], part.read(name, 3, 9))
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 7  # 4 zarr.json and 3 shards


def test_gated_tokens_have_the_codes_of_a_fixed_top_k() -> None:
    """The paper's renormalised top-16 is the same from an entropy-aware cache and from a fixed top-16."""
    result = dense(11, [400], 500)
    aware, fixed = HeadRule(k_max=16), HeadRule(k_max=16, full_head_above=-1.0, draws="none")
    heads = []
    for head in (aware, fixed):
        from eopd.storage.codec import Layout
        from eopd.storage.decode import decode
        from eopd.storage.encode import encode

        layout = Layout.of(head, STOPS)
        heads.append(decode(encode(rows_of(result, head), layout), layout))
    gated = np.flatnonzero(heads[0].entropy > 0.8)
    assert 50 < len(gated) < 400
    for t in gated:
        ours, theirs = (slice(rows.head_offsets[t], rows.head_offsets[t + 1]) for rows in heads)
        np.testing.assert_array_equal(heads[0].head_ids[ours], heads[1].head_ids[theirs])
        np.testing.assert_array_equal(heads[0].head_logprobs[ours], heads[1].head_logprobs[theirs])
        exact = np.sort(result.logprobs[t])[::-1][:16]
        exact -= np.log(np.exp(exact).sum())
        stored = heads[0].head_logprobs[ours].astype(np.float64)
        stored -= np.log(np.exp(stored).sum())
        assert np.abs(stored - exact).max() <= 2 / 256


def test_needs_are_answered_by_the_coverage(built: tuple[Artifact, list[TeacherRows]]) -> None:
    cache = TeacherCache(built[0])
    cache.require([EntropyNeed(), SampledNeed(), HeadNeed(16, 0.8), HeadNeed(4, 0.4)])
    with raises(NeedNotMet, setting="score.head.k_max", remedy="score.head.k_max=32"):
        cache.require([HeadNeed(32, 0.8)])
    with raises(NeedNotMet, setting="score.head.full_head_above"):
        cache.require([HeadNeed(16, 0.1)])


# -- parts that are not what they should be --------------------------------------------------------------------


@pytest.fixture
def one(tmp_path: Path) -> Artifact:
    return scores(tmp_path, parts=2)[0]


def reseal(artifact: Artifact, part: int, name: str, content: bytes) -> None:
    """Replace a file of a part and make its marker agree: what a careful forger would do."""
    from eopd.storage.files import sha256_file
    from eopd.storage.markers import Marker

    marker = artifact.marker(part)
    path = artifact.folder / paths.data_name(part, marker.nonce) / name
    path.write_bytes(content)
    files = {**marker.files, name: {"size": path.stat().st_size, "sha256": sha256_file(path)}}
    fresh = Marker(part, marker.nonce, files, marker.inputs, marker.info)
    (artifact.folder / paths.marker_name(part)).write_text(marker_text(fresh, artifact.kind, artifact.key))


def attributes(artifact: Artifact, **changes: object) -> bytes:
    text = json.loads((artifact.part_folder(0) / "zarr.json").read_text())
    text["attributes"].update(changes)
    return json.dumps(text).encode()


def test_a_newer_format_is_refused_by_name(one: Artifact) -> None:
    reseal(one, 0, "zarr.json", attributes(one, schema=FORMAT_VERSION + 1))
    with raises(NewerSchema, f"{FORMAT_VERSION + 1}; .* {FORMAT_VERSION}", remedy="Upgrade"):
        TeacherCache(one).read([(0, 0)])


def test_another_record_is_refused_by_name(one: Artifact) -> None:
    reseal(one, 0, "zarr.json", attributes(one, record="weather"))
    with pytest.raises(WrongArtifact, match="no part of a teacher cache"):
        TeacherCache(one).read([(0, 0)])


def test_an_edited_zarr_json_is_not_believed(one: Artifact) -> None:
    path = one.part_folder(0) / "tokens" / "zarr.json"
    path.write_text(path.read_text().replace('"fill_value": 0', '"fill_value": 1'))
    with raises(DamagedPart, "changed", file="tokens/zarr.json"):
        TeacherCache(one).read([(0, 0)])


def test_a_deleted_shard_is_an_error_and_not_zeros(one: Artifact) -> None:
    cache = TeacherCache(one)
    cache.read([(0, 0)])  # opened, and its sizes checked, before the shard goes
    shutil.rmtree(one.part_folder(0) / "entries" / "c")
    with pytest.raises(DamagedPart, match="is gone"):
        TeacherCache(one).read([(0, 0)])
    cold = TeacherCache(one, memory=0)
    cold._parts[0] = cache._parts[0]
    with pytest.raises(DamagedPart, match="cannot be decoded"):
        cold.read([(0, 1)])


def test_every_flipped_byte_is_found_or_harmless(one: Artifact) -> None:
    """A read of a damaged part raises, or returns what was written: where padding and unread bytes were hit."""
    right = TeacherCache(one).read_part(0)
    rng = np.random.default_rng(0)
    folder = one.part_folder(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for trial in range(120):
        path = files[trial % len(files)]
        content = bytearray(path.read_bytes())
        place = int(rng.integers(len(content)))
        whole = bytes(content)
        content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        with contextlib.suppress(StoreError):
            assert_identical(TeacherCache(one).read_part(0), right)
        path.write_bytes(whole)
    assert_identical(TeacherCache(one).read_part(0), right)


@pytest.mark.parametrize("keep", [0, 1, 100])
def test_a_truncated_shard(one: Artifact, keep: int) -> None:
    path = one.part_folder(1) / "tokens" / "c" / "0" / "0"
    path.write_bytes(path.read_bytes()[:keep])
    with raises(DamagedPart, f"{keep} bytes", part=1, file="tokens/c/0/0"):
        TeacherCache(one).read([(1, 0)])
    assert TeacherCache(one).read([(0, 0)]).responses == 1  # nothing else is lost


def test_a_forged_shard_cannot_pass_for_numbers(one: Artifact) -> None:
    """Even when the marker agrees: Zarr's checksums do not."""
    path = one.part_folder(0) / "entries" / "c" / "0" / "0"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    reseal(one, 0, "entries/c/0/0", bytes(content))
    with pytest.raises(DamagedPart, match="cannot be decoded"):
        TeacherCache(one).read_part(0)


def test_a_part_of_another_artifact(one: Artifact, tmp_path: Path) -> None:
    other, _ = scores(tmp_path / "other", head=HeadRule(k_max=4))
    shutil.copy(other.folder / paths.marker_name(0), one.folder / paths.marker_name(0))
    with raises(WrongArtifact, artifact=str(one), part=0):
        TeacherCache(one).read([(0, 0)])


# -- caches from untrusted places ------------------------------------------------------------------------------


def rewrite_marker(artifact: Artifact, **changes: object) -> None:
    """A marker with a valid seal that says something else."""
    from eopd.storage.files import canonical_json, sha256_text

    path = artifact.folder / paths.marker_name(0)
    content = json.loads(path.read_text())
    content.update(changes)
    content.pop("seal")
    content["checksum"] = sha256_text(canonical_json(content["files"]))
    path.write_text(file_text({**content, "seal": sha256_text(canonical_json(content))}))


def shard_with(artifact: Artifact, name: str, change: Callable[[NDArray[np.uint64]], None]) -> bytes:
    """A shard whose index was changed, and whose checksum of the index holds."""
    folder = artifact.part_folder(0) / name
    codecs = ShardingCodec.from_dict(json.loads((folder / "zarr.json").read_text())["codecs"][0]).index_codecs
    content = (folder / "c" / "0" / "0").read_bytes()
    chunks = json.loads((folder / "zarr.json").read_text())
    per_shard = chunks["chunk_grid"]["configuration"]["chunk_shape"][1]
    count = per_shard // chunks["codecs"][0]["configuration"]["chunk_shape"][1]
    end = len(content) - 16 * count - 4
    index = np.frombuffer(content[end:-4], "<u8").reshape(1, count, 2).copy()
    change(index[0])
    return content[:end] + zarr_write._encoded(codecs, index)


@pytest.mark.parametrize("name", ["responses", "tokens", "entries"])
@pytest.mark.parametrize(("column", "value"), [(0, 2**63), (0, 2**64 - 2), (1, 2**40), (1, 2**63), (0, 10**6), (1, 0)])
def test_an_index_names_only_bytes_that_are_there(one: Artifact, name: str, column: int, value: int) -> None:
    def change(index: NDArray[np.uint64]) -> None:
        index[0, column] = value

    reseal(one, 0, f"{name}/c/0/0", shard_with(one, name, change))
    with pytest.raises(DamagedPart, match="part"):
        TeacherCache(one).read_part(0)


@pytest.mark.parametrize("name", ["responses", "tokens", "entries"])
@pytest.mark.parametrize("what", ["shape", "chunk_shape", "shard"])
@pytest.mark.parametrize(
    "value", [[2**40, 2], [7, 2**40], [2**63, 2**63], [-1, -1], [0, 0], [], None, [4, 10**400], [0.5]]
)
def test_nothing_is_allocated_for_a_shape_that_no_part_has(one: Artifact, name: str, what: str, value: object) -> None:
    values = json.loads((one.part_folder(0) / name / "zarr.json").read_text())
    if what == "shape":
        values["shape"] = value
    elif what == "shard":
        values["chunk_grid"]["configuration"]["chunk_shape"] = value
    else:
        values["codecs"][0]["configuration"]["chunk_shape"] = value
    reseal(one, 0, f"{name}/zarr.json", json.dumps(values).encode())
    with pytest.raises(DamagedPart, match="part 0"):
        TeacherCache(one).read_part(0)


@pytest.mark.parametrize("vocabulary", [5, 3, 1])
def test_ids_beyond_the_vocabulary_are_damage(one: Artifact, vocabulary: int) -> None:
    reseal(one, 0, "zarr.json", attributes(one, vocab_size=vocabulary, stop_ids=list(STOPS)))
    with pytest.raises(DamagedPart, match=f"in a vocabulary of {vocabulary}"):
        TeacherCache(one).read_part(0)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "a//b", "./a", "", "a\\..\\b"])
def test_a_marker_names_no_path_outside_its_part(one: Artifact, name: str) -> None:
    rewrite_marker(one, files={name: {"size": 1, "sha256": "0" * 64}})
    with pytest.raises(DamagedPart, match="outside its part folder"):
        TeacherCache(one).read([(0, 0)])


@pytest.mark.parametrize("nonce", ["../../x", "/etc", "0123456789abcdeg", "", 7])
def test_a_nonce_is_no_path(one: Artifact, nonce: object) -> None:
    rewrite_marker(one, nonce=nonce)
    with pytest.raises(DamagedPart, match="nonce"):
        TeacherCache(one).read([(0, 0)])


@pytest.mark.parametrize("changes", [{"files": []}, {"files": {"a": 1}}, {"files": {"a": {"size": "x", "sha256": 1}}}])
def test_a_marker_of_other_types(one: Artifact, changes: dict[str, object]) -> None:
    rewrite_marker(one, **changes)
    with pytest.raises(DamagedPart):
        TeacherCache(one).read([(0, 0)])


def test_links_are_not_followed(one: Artifact, tmp_path: Path) -> None:
    shard = one.part_folder(0) / "tokens" / "c" / "0" / "0"
    elsewhere = tmp_path / "elsewhere"
    shutil.move(shard, elsewhere)
    shard.symlink_to(elsewhere)
    with raises(DamagedPart, "no plain file", part=0, file="tokens/c/0/0"):
        TeacherCache(one).read([(0, 0)])
    shard.unlink()
    shutil.move(elsewhere, shard)
    folder = one.part_folder(0) / "tokens"
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere)
    with raises(DamagedPart, "link", part=0, file="tokens"):
        TeacherCache(one).read([(0, 0)])


def test_zarr_metadata_can_name_no_codec_that_runs_code(one: Artifact) -> None:
    """Only the codecs of the format are let through, whatever is installed and registered."""
    for codec in ("numcodecs.pickle", "gzip", "os.system"):
        text = json.loads((one.part_folder(0) / "tokens" / "zarr.json").read_text())
        text["codecs"][0]["configuration"]["codecs"][2:] = [{"name": codec, "configuration": {}}]
        reseal(one, 0, "tokens/zarr.json", json.dumps(text).encode())
        with pytest.raises(DamagedPart, match=f"asks for the codecs .*'{codec}'"):
            TeacherCache(one).read([(0, 0)])


def test_metadata_cannot_ask_for_endless_memory(one: Artifact) -> None:
    text = json.loads((one.part_folder(0) / "tokens" / "zarr.json").read_text())
    text["codecs"][0]["configuration"]["chunk_shape"][1] = 1 << 40
    text["chunk_grid"]["configuration"]["chunk_shape"][1] = 1 << 40
    reseal(one, 0, "tokens/zarr.json", json.dumps(text).encode())
    with pytest.raises(DamagedPart, match="chunks of"):
        TeacherCache(one).read([(0, 0)])


def test_a_header_of_nonsense(one: Artifact) -> None:
    for changes in ({"head": {"k_max": -1}}, {"head": {"run": "me"}}, {"stop_ids": 3}, {"schema": "1"}, {"schema": 0}):
        reseal(one, 0, "zarr.json", attributes(one, **changes))
        with pytest.raises(DamagedPart):
            TeacherCache(one).read([(0, 0)])


def test_headers_keep_what_they_were_given() -> None:
    full = header(HeadRule(k_max=8), 100, extra_k=3)
    assert PartHeader.from_attributes(json.loads(json.dumps(full.to_attributes())), "here") == full
    assert full.coverage.extra_k == 3


def test_scores_of_another_origin_are_refused_by_name(one: Artifact) -> None:
    right = Origin("teacher", "tokenizer", "chat", 1.0)
    assert TeacherCache(one, origin=right).read([(0, 0)]).responses == 1
    for other, words in (
        (Origin(teacher="Qwen3-32B"), r"teacher teacher \(asked for Qwen3-32B\)"),
        (Origin(tokenizer="llama"), r"tokenizer tokenizer \(asked for llama\)"),
        (Origin(teacher_context="plain"), r"teacher context chat \(asked for plain\)"),
        (Origin(teacher="teacher", temperature=0.7), r"temperature 1.0 \(asked for 0.7\)"),
    ):
        cache = TeacherCache(one, origin=other)
        for _ in range(2):  # not only the first time
            with pytest.raises(WrongArtifact, match=words):
                cache.read([(0, 0)])
