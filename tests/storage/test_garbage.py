"""`eopd store gc`: what goes, what stays, beside others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from eopd.storage import garbage, listing, paths
from eopd.storage.artifacts import Artifact
from eopd.storage.claims import claim, may_be_held
from eopd.storage.errors import DamagedPart
from eopd.storage.identity import Identity
from eopd.storage.teacher_cache import TeacherCache
from eopd.storage.verification import verify

from .making import other, scores


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


def test_any_kind_is_collected_and_other_folders_of_the_store_are_let_be(tmp_path: Path) -> None:
    kept, gone = (other(tmp_path, "token_counts", {}, name=name) for name in ("kept", "gone"))
    own = [tmp_path / name for name in ("notes", "my_runs/x/identity.json", "my_runs/latest", "Scores/x/identity.json")]
    for path in own:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(tmp_path) if path.name == "latest" else path.write_text("x")
    assert [(item.kind, item.key) for item in listing.ls(tmp_path) if not item.problem] == sorted(
        ("token_counts", artifact.key) for artifact in (kept, gone)
    )
    assert verify(tmp_path) == []
    plan = garbage.plan(tmp_path, [("token_counts", kept.key)], grace=-1.0)
    assert [removal.path for removal in plan] == [gone.folder]
    garbage.remove(plan)
    assert all(map(os.path.lexists, own))


@pytest.mark.parametrize(
    "kind", ["", "Scores", "../scores", ".runs", "token-counts", "a_", "a__b", "scores\n", "a" * 65]
)
def test_a_kind_is_a_lower_case_word(tmp_path: Path, kind: str) -> None:
    content = {**Identity("scores", 1, 1).to_json(), "kind": kind}
    with pytest.raises(DamagedPart, match="kind"):
        Identity.from_json(content, tmp_path)
    with pytest.raises(AssertionError):
        Identity(kind, 1, 1)


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
        listed = list(walk(*arguments))
        for path in gone.folder.glob("part-*/data"):
            path.unlink()
        return listed

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
