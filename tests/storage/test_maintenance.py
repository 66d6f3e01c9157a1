"""`eopd store ls|show|stats|verify|gc|copy|export|import`, as library functions."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eopd.storage import garbage, listing, paths, statistics
from eopd.storage.artifacts import Artifact, Identity, open_artifact
from eopd.storage.claims import claim, may_be_held
from eopd.storage.coverage import NeedNotMet
from eopd.storage.errors import DamagedPart, MissingPart, StoreError, WrongArtifact
from eopd.storage.exchange import export_parquet, import_topk, imported_header
from eopd.storage.markers import Marker
from eopd.storage.needs import EntropyNeed, HeadNeed, SampledNeed
from eopd.storage.pruning import prune
from eopd.storage.stacked import StackedStores
from eopd.storage.teacher_cache import TeacherCache, write_part
from eopd.storage.teacher_record import HeadRule
from eopd.storage.transfer import copy
from eopd.storage.verification import verify

from .making import dense, header, rows_of, scores
from .test_teacher_cache import assert_identical


def other(store: Path, kind: str, inputs: dict[str, str], parts: int = 1, name: str = "x") -> Artifact:
    artifact = Artifact(store, Identity(kind, 1, parts, {"name": name}, inputs))
    for part in range(parts):
        with artifact.write_part(part) as folder:
            (folder / "data").write_text(name)
    return artifact


# -- ls, show, stats -------------------------------------------------------------------------------------------


def test_listing(tmp_path: Path) -> None:
    artifact, _ = scores(tmp_path)
    rollouts = other(tmp_path, "rollouts", {})
    found = {entry.key: entry for entry in listing.ls(tmp_path)}
    assert found[artifact.key].complete
    assert found[artifact.key].bytes == sum(artifact.marker(part).bytes for part in range(2))
    assert listing.find(tmp_path, artifact.key[:6]).key == artifact.key
    assert listing.find(tmp_path, f"rollouts/{rollouts.key}").key == rollouts.key
    with pytest.raises(StoreError, match="names no artifact"):
        listing.find(tmp_path, "zzz")
    with pytest.raises(StoreError, match="names 2 artifacts"):
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
    with pytest.raises(MissingPart, match=r"parts \[1, 3, 4, 5, 6, 7, 8, 9\] are missing"):
        _ = artifact.manifest


def test_stats(tmp_path: Path) -> None:
    artifact, written = scores(tmp_path, head=HeadRule(k_max=8, full_head_above=-1.0), lengths=[400, 300])
    found = statistics.stats(TeacherCache(artifact))
    entropy = np.concatenate([rows.entropy for rows in written])
    assert found.tokens == len(entropy) == sum(found.entropy_counts)
    assert found.entropy_mean == pytest.approx(entropy.mean(), abs=2e-4)
    assert found.gate_fraction[0.8] == pytest.approx((entropy > 0.8).mean(), abs=2e-3)
    mass = np.mean([np.exp(rows.head_logprobs).reshape(-1, 8).sum(axis=1) for rows in written])
    assert found.retained_mass[8] == pytest.approx(mass, abs=2e-3)
    assert list(found.retained_mass) == [1, 2, 4, 8]
    stored = sum(artifact.marker(part).bytes for part in range(2))
    assert found.bytes_per_token * found.tokens == pytest.approx(stored)
    assert 0.3 < sum(found.bytes_by_field.values()) / found.bytes_per_token < 1.1
    assert "gated" in found.text()
    assert found.to_json()["entropy_edges"][0] == 0.0
    statistics.plot(found, tmp_path / "histogram.svg")
    bars = ElementTree.parse(tmp_path / "histogram.svg").findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == len(found.entropy_counts)
    with pytest.raises(ValueError, match=r"must end in \.svg"):
        statistics.plot(found, tmp_path / "histogram.png")
    empty = Artifact(tmp_path, Identity("scores", 1, 1, {"none": 1}))
    with pytest.raises(ValueError, match="no committed part"):
        statistics.stats(TeacherCache(empty))


# -- verify ----------------------------------------------------------------------------------------------------


def test_verify_finds_any_flip_and_repair_queues_the_part_again(tmp_path: Path) -> None:
    artifact, written = scores(tmp_path)
    assert verify(tmp_path) == []
    rng = np.random.default_rng(1)
    files = sorted(path for path in artifact.folder.rglob("*") if path.is_file())
    kinds = {path.name.split(".")[-1] for path in files}
    assert kinds == {"json", "0"}
    for trial in range(100):
        path = files[trial % len(files)]
        whole = path.read_bytes()
        content = bytearray(whole)
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        assert verify(tmp_path), f"{path} was flipped and not found"
        path.write_bytes(whole)
    for path in files:
        for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])):
            whole = path.read_bytes()
            damage(path)
            missed = path.name == paths.MANIFEST and not path.exists()  # which is no damage
            assert bool(verify(tmp_path)) != missed, f"{path} was cut or deleted and not found"
            path.write_bytes(whole)
    assert verify(tmp_path) == []

    shard = next(artifact.part_folder(1).glob("entries/c/0/0"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    (damage_found,) = verify(tmp_path, repair=True)
    assert (damage_found.part, damage_found.key) == (1, artifact.key)
    assert artifact.missing() == [1]
    assert list(artifact.folder.glob("*.damaged"))
    with artifact.write_part(1, inputs={"rollouts": "rollouts"}) as folder:
        write_part(folder, written[1], header(HeadRule(), 300))
    assert artifact.is_complete()
    assert verify(tmp_path) == []


def test_verify_reports_strangers_and_edits(tmp_path: Path) -> None:
    artifact, _ = scores(tmp_path)
    (artifact.part_folder(0) / "extra.py").write_text("import os")
    (found,) = verify(tmp_path, [("scores", artifact.key)])
    assert "extra.py was added" in found.problem
    (artifact.part_folder(0) / "extra.py").unlink()
    marker = artifact.folder / paths.marker_name(0)
    marker.write_text(marker.read_text() + "\n")
    (found,) = verify(tmp_path)
    assert "was edited" in found.problem


def test_a_damaged_identity_is_written_again(tmp_path: Path) -> None:
    artifact, written = scores(tmp_path, parts=1)
    path = artifact.folder / paths.IDENTITY
    whole = path.read_text()
    path.write_text(whole.replace('"parts": 1', '"parts": 2'))
    (found,) = verify(tmp_path, repair=True)
    assert "not scores" in found.problem
    assert path.read_text() == whole
    assert TeacherCache(open_artifact(tmp_path, "scores", artifact.key)).read_part(0).tokens == written[0].tokens


def test_an_edited_identity_stays_one(tmp_path: Path) -> None:
    """A blank more, and it still says the same: the artifact must not vanish from listings for it."""
    artifact, _ = scores(tmp_path)
    path = artifact.folder / paths.IDENTITY
    whole = path.read_text()
    path.write_text(whole + " ")
    (found,) = verify(tmp_path, repair=True)
    assert "identity.json was edited" in found.problem
    assert path.read_text() == whole
    assert verify(tmp_path) == []


def test_a_lost_identity_comes_back(tmp_path: Path) -> None:
    """From the manifest; else from a copy; else the message says what is left to do."""
    artifact, _ = scores(tmp_path / "here")
    copy(artifact, tmp_path / "there")
    path = artifact.folder / paths.IDENTITY
    whole = path.read_text()
    path.unlink()
    (found,) = verify(tmp_path / "here")
    assert "is gone; `eopd store verify --repair` writes it again" in found.problem
    assert not found.beyond_repair
    verify(tmp_path / "here", repair=True)
    assert path.read_text() == whole
    path.unlink()
    (artifact.folder / paths.MANIFEST).unlink()
    (found,) = verify(tmp_path / "here", repair=True)
    assert found.beyond_repair
    assert "a copy from a store that has it; without either, remove the folder" in found.problem
    assert copy(open_artifact(tmp_path / "there", "scores", artifact.key), tmp_path / "here") == []
    assert path.read_text() == whole
    assert verify(tmp_path / "here") == []


@pytest.mark.parametrize("name", [paths.IDENTITY, paths.MANIFEST, paths.marker_name(1)])
def test_what_a_newer_eopd_wrote_is_not_repaired(tmp_path: Path, name: str) -> None:
    artifact, _ = scores(tmp_path)
    path = artifact.folder / name
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    if name == paths.marker_name(1):
        (artifact.folder / paths.MANIFEST).unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (found,) = verify(tmp_path, repair=True)
    assert found.beyond_repair
    assert "Upgrade eopd" in found.problem
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_missing_manifest_is_no_damage(tmp_path: Path) -> None:
    artifact, _ = scores(tmp_path)
    whole = artifact.manifest
    (artifact.folder / paths.MANIFEST).unlink()
    assert verify(tmp_path) == []
    assert verify(tmp_path, repair=True) == []
    assert artifact.manifest == whole


@pytest.mark.parametrize("change", ["drop", "prune", "again"])
def test_parts_that_change_while_they_are_verified_are_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """A run beside it drops a resumable state, prunes a checkpoint, or makes a part again."""
    artifact = other(tmp_path, "checkpoints", {}, parts=2)
    look = Artifact.part_names

    def changed_before(here: Artifact, marker: Marker) -> set[str]:
        if marker.part == 1 and marker.nonce == nonce:
            if change == "prune" and not here.pruned():
                prune(artifact, 1, lambda name: True)
            elif change != "prune":
                artifact.drop_part(1)
            if change == "again":
                with artifact.write_part(1) as folder:
                    (folder / "data").write_text("again")
        return look(here, marker)

    nonce = artifact.marker(1).nonce
    monkeypatch.setattr(Artifact, "part_names", changed_before)
    assert [damage for damage in verify(tmp_path) if damage.name != paths.MANIFEST] == []


# -- gc --------------------------------------------------------------------------------------------------------


def test_gc_keeps_what_roots_reach(tmp_path: Path) -> None:
    rollouts = other(tmp_path, "rollouts", {})
    kept = other(tmp_path, "checkpoints", {"rollouts": rollouts.key}, name="kept")
    gone = other(tmp_path, "checkpoints", {"rollouts": rollouts.key}, name="gone")
    left, _ = scores(tmp_path)
    plan = garbage.plan(tmp_path, [("checkpoints", kept.key)], grace=-1.0)
    assert {removal.path for removal in plan} == {gone.folder, left.folder}
    assert gone.is_complete(), "a plan removes nothing"
    assert garbage.plan(tmp_path, [("checkpoints", kept.key)], grace=3600.0) == []
    assert garbage.plan(tmp_path, None, grace=-1.0) == []
    assert garbage.remove(plan).bytes == sum(removal.bytes for removal in plan) > 0
    assert not gone.folder.exists()
    assert rollouts.is_complete()
    assert kept.is_complete()


def test_gc_removes_what_no_marker_names(tmp_path: Path) -> None:
    artifact, _ = scores(tmp_path)
    killed = artifact.folder / paths.data_name(1, "0" * 16)
    killed.mkdir()
    (killed / "half").write_text("x")
    working = Artifact(tmp_path, Identity("rollouts", 1, 2))
    working.folder.mkdir(parents=True)
    working.begin()
    (working.folder / paths.data_name(0, "1" * 16)).mkdir()
    with claim(working, 0) as ours:
        assert ours
        plan = garbage.plan(tmp_path, None, grace=-1.0)
        assert [removal.path for removal in plan] == [killed]
    shard = artifact.part_folder(0) / "entries" / "c" / "0" / "0"
    shard.write_bytes(b"")
    verify(tmp_path, repair=True)
    plan = garbage.plan(tmp_path, None, grace=-1.0)
    reasons = sorted(removal.reason for removal in plan)
    assert reasons == ["no marker names it"] * 3 + ["set aside by a repair"] * 2
    garbage.remove(plan)
    assert artifact.missing() == [0]
    assert TeacherCache(artifact).read([(1, 0)]).responses == 1


def test_gc_looks_for_workers_only_at_what_no_run_refers_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, gone = other(tmp_path, "checkpoints", {}, name="kept"), other(tmp_path, "checkpoints", {}, name="gone")
    for artifact in (kept, gone):
        (artifact.folder / paths.claim_name(0)).touch()
    opened: list[Path] = []
    monkeypatch.setattr(garbage, "may_be_held", lambda path: opened.append(path) or may_be_held(path))
    plan = garbage.plan(tmp_path, [("checkpoints", kept.key)], grace=-1.0)
    assert [removal.path for removal in plan] == [gone.folder]
    assert opened == [gone.folder / paths.claim_name(0)]


def test_gc_keeps_what_a_living_worker_makes_and_takes_no_claim(tmp_path: Path) -> None:
    """Of a run that no root knows: its claim keeps the artifact whole, and all that it is made from."""
    kept = other(tmp_path, "checkpoints", {}, name="kept")
    rollouts = other(tmp_path, "rollouts", {}, name="busy")
    working = Artifact(tmp_path, Identity("scores", 1, 3, {}, {"rollouts": rollouts.key}, {"head": 1}))
    with working.write_part(0) as folder:
        (folder / "data").write_text("x")
    with claim(working, 1) as ours:
        assert ours
        before = sorted(tmp_path.rglob("*"))
        assert garbage.plan(tmp_path, [("checkpoints", kept.key)], grace=-1.0) == []
        assert sorted(tmp_path.rglob("*")) == before
    plan = garbage.plan(tmp_path, [("checkpoints", kept.key)], grace=-1.0)
    assert {removal.path for removal in plan} == {working.folder, rollouts.folder}


def test_gc_beside_others_who_write_and_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that a folder listed is gone when it is looked at."""
    gone = other(tmp_path, "rollouts", {})
    kept = other(tmp_path, "checkpoints", {})
    walk = os.walk

    def walk_and_remove(*arguments: object) -> list[tuple[str, list[str], list[str]]]:
        found = list(walk(*arguments))
        for path in gone.folder.glob("part-*/data"):
            path.unlink()
        return found

    monkeypatch.setattr(os, "walk", walk_and_remove)
    plan = garbage.plan(tmp_path, [("checkpoints", kept.key)], grace=-1.0)
    assert {removal.path for removal in plan} == {gone.folder}
    shutil.rmtree(gone.folder)
    assert garbage.remove(plan) == garbage.Removed(0, ())


def test_gc_counts_what_is_gone_and_names_what_stayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, stays = (other(tmp_path, "rollouts", {}, name=name) for name in ("gone", "stays"))
    plan = garbage.plan(tmp_path, [("checkpoints", "none")], grace=-1.0)
    data = next(stays.folder.glob("part-*/data"))
    unlink = os.unlink

    def refuse(path: str, **options: int) -> None:
        if Path(path).name == "data" and os.fstat(options["dir_fd"]).st_ino == data.parent.stat().st_ino:
            raise PermissionError(13, "Permission denied", str(data))
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    removed = garbage.remove(plan)
    assert not gone.folder.exists()
    assert data.exists()
    assert removed.bytes == sum(removal.bytes for removal in plan) - len("stays")
    assert "Permission denied" in " ".join(removed.stayed)
    assert "data" in " ".join(removed.stayed)


# -- copy and stacks -------------------------------------------------------------------------------------------


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
    assert {found.key for found in stack.coverages(base)} == {small.key, large.key}
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


def test_scores_of_other_rollouts_are_not_served(tmp_path: Path) -> None:
    """One key, two machines, two sets of bytes: scores of the one do not fit the rollouts of the other."""
    team, private = tmp_path / "team", tmp_path / "private"
    rollouts = by_part(team, "rollouts", b"as the team's GPU sampled them")
    scored = by_part(team, "scores", b"scores", rollouts)
    stack = StackedStores([private, team])
    assert stack.find(scored.identity).folder == scored.folder
    assert stack.find(rollouts.identity).folder == rollouts.folder

    mine = by_part(private, "rollouts", b"as mine did")
    stack = StackedStores([private, team])
    assert stack.find(rollouts.identity).folder == mine.folder
    assert stack.find(scored.identity).folder == private / "scores" / scored.key
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


# -- export and import -----------------------------------------------------------------------------------------


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


def capture(path: Path, shifted: bool) -> tuple[pa.Table, np.ndarray]:
    found = dense(5, [12, 7], 60)
    order = np.argsort(-found.logprobs, axis=1)[:, :10]
    values = np.take_along_axis(found.logprobs, order, axis=1)
    records, low = [], 0
    for length in found.lengths:
        some = slice(low, low + length)
        ids = found.tokens[some].tolist()
        pad = [0] * 10
        lists = (order[some][:, ::-1].tolist(), values[some][:, ::-1].tolist())  # in no order that we know of
        if shifted:
            ids, lists = [1, *ids], (lists[0] + [pad], lists[1] + [[-99.0] * 10])
        records.append({"input_ids": ids, "top_indices": lists[0], "top_values": lists[1]})
        low += length
    table = pa.Table.from_pylist(records)
    pq.write_table(table, path)
    return table, found.logprobs


@pytest.mark.parametrize("shifted", [True, False])
def test_import(tmp_path: Path, shifted: bool) -> None:
    _, logprobs = capture(tmp_path / "capture.parquet", shifted)
    rows = import_topk(tmp_path / "capture.parquet", shifted=shifted)
    assert np.diff(rows.response_offsets).tolist() == [12, 7]
    described = imported_header(rows, teacher="t", tokenizer="k", vocab_size=60, source="capture.parquet")
    artifact = Artifact(tmp_path, Identity("scores", 1, 1))
    with artifact.write_part(0) as folder:
        write_part(folder, rows, described)
    cache = TeacherCache(artifact)
    found = cache.read_part(0)
    exact = -np.sort(-logprobs, axis=1)[:, :10].reshape(-1)
    np.testing.assert_allclose(found.head_logprobs, exact, atol=1 / 256)
    cache.require([HeadNeed(10)])
    for need, message in ((EntropyNeed(), "full-vocabulary entropy"), (SampledNeed(), "sampled tokens' log-probs")):
        with pytest.raises(NeedNotMet, match=message):
            cache.require([need])


def test_what_cannot_be_imported(tmp_path: Path) -> None:
    table, _ = capture(tmp_path / "capture.parquet", False)
    with pytest.raises(ValueError, match="no column 'ids'"):
        import_topk(tmp_path / "capture.parquet", ids="ids")
    heavy = [[[0.0] * 10] * 12, [[0.0] * 10] * 7]
    pq.write_table(table.set_column(2, "top_values", pa.array(heavy)), tmp_path / "heavy.parquet")
    with pytest.raises(ValueError, match="are these log-probs"):
        import_topk(tmp_path / "heavy.parquet", shifted=False)
    short = table.set_column(2, "top_values", pa.array([[[0.0]] * 3, [[0.0]] * 7]))
    pq.write_table(short, tmp_path / "short.parquet")
    with pytest.raises(ValueError, match="12 tokens and 3 lists"):
        import_topk(tmp_path / "short.parquet", shifted=False)


def test_a_copied_folder_works_where_it_lands(tmp_path: Path) -> None:
    artifact, _ = scores(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = open_artifact(tmp_path / "b", "scores", artifact.key)
    assert_identical(TeacherCache(moved).read_part(0), TeacherCache(artifact).read_part(0))
    assert rows_of(dense(0, [1], 20), HeadRule()).tokens == 1
