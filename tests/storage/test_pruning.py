"""Giving up the data of parts: what stays, what a kill between the steps leaves, and calling a part back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eopd.storage import garbage, listing, paths
from eopd.storage import garbage as pruning
from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.errors import DamagedPart, PrunedPart
from eopd.storage.garbage import prune, revive
from eopd.storage.identity import Identity
from eopd.storage.remote import copy
from eopd.storage.stored import StoredArtifact
from eopd.storage.verification import verify
from tests.raises import raises

FILES = {"model": b"w" * 1000, "sub/figures": b"f" * 10}


def make(store: Path) -> Artifact:
    artifact = Artifact(store, Identity("checkpoints", 1, 2, {"name": "x"}))
    for part in range(2):
        commit(artifact, part)
    return artifact


def commit(artifact: Artifact, part: int) -> None:
    with artifact.write_part(part, info={"steps": 3}) as folder:
        for name, content in FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content + bytes([part]))


def large(name: str) -> bool:
    return name == "model"


def test_a_pruned_part_keeps_its_small_files_and_says_so(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    sums = artifact.manifest["part_checksums"]
    assert prune(artifact, 1, large) == 1001
    assert artifact.is_complete()
    assert (artifact.committed(), artifact.pruned(), artifact.missing()) == ({0}, {1}, [])
    with raises(PrunedPart, artifact=str(artifact), part=1, remedy="eopd run"):
        artifact.part_folder(1)
    assert (artifact.remaining_folder(1) / "sub" / "figures").read_bytes() == FILES["sub/figures"] + b"\1"
    assert not (artifact.remaining_folder(1) / "model").exists()
    assert artifact.manifest["pruned"] is True
    assert artifact.manifest["pruned_parts"] == [1]
    assert artifact.manifest["part_checksums"] == sums
    (row,) = listing.ls(tmp_path)
    assert (row.complete, row.committed, row.pruned, row.bytes) == (True, 1, 1, 1012 + 11)
    shown = listing.show(open_artifact(tmp_path, "checkpoints", artifact.key))
    assert shown["missing_parts"] == 0
    assert list(shown["parts_committed"]) == ["0"]
    assert shown["parts_pruned"]["1"]["files_left"] == ["sub/figures"]
    assert shown["parts_pruned"]["1"]["pruned"] == {"bytes": 1012, "checksum": sums["1"]}
    assert shown["parts_pruned"]["1"]["steps"] == 3
    assert verify(tmp_path) == []
    assert garbage.plan(tmp_path, None, grace=-1.0) == []

    assert prune(artifact, 1, large) == 0
    assert prune(artifact, 1, lambda name: True) == 11
    assert artifact.manifest["part_checksums"] == sums
    assert verify(tmp_path) == []
    assert prune(artifact, 0, lambda name: name == "nothing") == 0
    assert artifact.committed() == {0}


def test_damage_of_what_was_kept_is_found(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    prune(artifact, 1, large)
    (artifact.remaining_folder(1) / "sub" / "figures").write_bytes(b"g" * 11)
    with raises(DamagedPart, "changed", part=1, file="sub/figures"):
        artifact.verify_part(1)
    (result,) = verify(tmp_path, repair=True)
    assert result.part == 1
    assert artifact.missing() == [1]


@pytest.mark.parametrize("step", range(6))
def test_a_kill_between_any_two_steps_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process ends before the step-th change of the folder: the same command finishes what was begun."""
    artifact = make(tmp_path)
    left = step

    class Killed(Exception):
        pass

    def dying(change: Callable[..., None]) -> Callable[..., None]:
        def instead(*arguments: object, **options: object) -> None:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            change(*arguments, **options)

        return instead

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dying(os.replace))
        patched.setattr(Path, "unlink", dying(Path.unlink))
        try:
            prune(artifact, 1, large)
        except Killed:
            pass
        else:
            assert step >= 4
    assert artifact.is_complete()
    if 1 in artifact.committed():
        assert (artifact.part_folder(1) / "model").exists()
        artifact.verify_part(1)
    else:
        artifact.verify_part(1)
        assert (artifact.remaining_folder(1) / "sub" / "figures").exists()
    assert verify(tmp_path) == []
    left_over = garbage.plan(tmp_path, None, grace=-1.0)
    assert {removal.path.name for removal in left_over} <= {"model", "part-00001.pruned"} | {
        path.name for path in artifact.folder.glob(".*")
    }
    prune(artifact, 1, large)
    assert artifact.pruned() == {1}
    assert artifact.manifest["pruned_parts"] == [1]
    assert not list(artifact.folder.rglob("model"))[1:]
    garbage.remove(garbage.plan(tmp_path, None, grace=-1.0))
    assert artifact.pruned() == {1}
    assert verify(tmp_path) == []


def test_a_part_called_back_is_made_and_pruned_again(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    prune(artifact, 1, large)
    before = artifact.remaining_folder(1)
    revive(artifact, 1)
    assert not before.exists()
    assert artifact.missing() == [1]
    assert not artifact.is_complete()
    assert verify(tmp_path) == []
    commit(artifact, 1)
    assert artifact.manifest["pruned"] is False
    artifact.verify_part(1)
    assert prune(artifact, 1, large) == 1001
    assert verify(tmp_path) == []
    assert not (artifact.folder / paths.marker_name(1)).exists()


def made_again(store: Path) -> tuple[Artifact, Path]:
    """A part that was pruned, called back twice and made again, with the old tombstone beside it; and that."""
    artifact = make(store)
    prune(artifact, 1, large)
    tombstone = artifact.folder / paths.tombstone_name(1)
    old = tombstone.read_bytes()
    for _ in range(2):
        revive(artifact, 1)
    assert artifact.missing() == [1]
    commit(artifact, 1)
    tombstone.write_bytes(old)
    return artifact, tombstone


def test_calling_back_twice_leaves_what_was_made_meanwhile(tmp_path: Path) -> None:
    """Two processes call a part back; one makes it again before the other gets there."""
    artifact, tombstone = made_again(tmp_path)
    for _ in range(2):
        revive(artifact, 1)
        artifact.verify_part(1)
        tombstone.unlink(missing_ok=True)


def test_the_marker_wins_over_an_older_tombstone(tmp_path: Path) -> None:
    """Killed after the tombstone was written: the part is there; gc drops the tombstone, pruning renews it."""
    artifact, tombstone = made_again(tmp_path)
    assert artifact.committed() == {0, 1}
    assert [removal.path for removal in garbage.plan(tmp_path, None, grace=-1.0)] == [tombstone]
    pruning.prune(artifact, 1, large)
    assert artifact.remains(1).nonce in {path.name.split(".")[1] for path in artifact.folder.glob("part-00001.*")}
    assert verify(tmp_path) == []


# -- copies ----------------------------------------------------------------------------------------------------


def stands(store: Any, key: str) -> tuple[Any, ...]:
    """What people and plans see of an artifact, wherever it lies."""
    artifact = listing.open_in(store, "checkpoints", key)
    (row,) = listing.ls(store)
    shown = {name: value for name, value in listing.show(artifact).items() if name != "folder"}
    return artifact.is_complete(), artifact.standing(), row, shown, artifact.manifest


def copies_stand_as_pruned(source: Path, target: Any) -> None:
    """A checkpoint of which one part is pruned, and then the other, in a store like any other."""
    artifact = make(source)
    prune(artifact, 1, large)
    assert copy(artifact, target) == [0, 1]
    assert copy(artifact, target) == []
    assert stands(target, artifact.key) == stands(source, artifact.key)
    assert verify(target) == []
    there = listing.open_in(target, "checkpoints", artifact.key)
    with raises(PrunedPart, artifact=f"checkpoints/{artifact.key}", part=1):
        there.marker(1)
    assert b"".join(there.checked(there.remains(1), "sub/figures")) == FILES["sub/figures"] + b"\1"

    assert copy(there, source.parent / "back") == [0, 1]
    assert stands(source.parent / "back", artifact.key) == stands(source, artifact.key)
    assert verify(source.parent / "back") == []

    prune(artifact, 0, lambda name: True)
    assert copy(artifact, target) == []  # it has the part whole
    assert there.committed() == {0}
    whole = make(source.parent / "whole")
    assert copy(whole, target) == [1]
    assert copy(artifact, target) == []
    assert there.committed() == {0, 1}
    assert there.manifest == whole.manifest
    assert verify(target) == []


def interrupted_copies_are_continued(source: Path, target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends while it copies what is left of a part, and again before the manifest."""
    artifact = make(source)
    prune(artifact, 1, large)

    class Killed(Exception):
        pass

    def die(*arguments: object) -> bytes:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(StoredArtifact, "renew_manifest", die)
        with pytest.raises(Killed):
            copy(artifact, target, parts=[0])
        patched.setattr(Artifact, "pieces", die)
        with pytest.raises(Killed):
            copy(artifact, target)
    there = listing.open_in(target, "checkpoints", artifact.key)
    assert there.missing() == [1]
    with monkeypatch.context() as patched:
        patched.setattr(StoredArtifact, "renew_manifest", die)
        patched.setattr(StoredArtifact, "finish", lambda artifact: None)
        with pytest.raises(Killed):
            copy(artifact, target)
    assert not there.has(paths.MANIFEST)
    assert [damage.name for damage in verify(target)] == [paths.MANIFEST]
    assert copy(artifact, target) == []
    assert verify(target) == []
    assert stands(target, artifact.key) == stands(source, artifact.key)


def test_a_pruned_checkpoint_is_copied_to_a_folder(tmp_path: Path) -> None:
    copies_stand_as_pruned(tmp_path / "here", tmp_path / "there")
    reasons = {removal.reason for removal in garbage.plan(tmp_path / "there", None, grace=-1.0)}
    assert reasons == {"of a part that was made again", "no marker names it"}


def test_an_interrupted_copy_to_a_folder_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_copies_are_continued(tmp_path / "here", tmp_path / "there", monkeypatch)


def test_a_part_of_which_nothing_is_left_is_copied(tmp_path: Path) -> None:
    artifact = make(tmp_path / "here")
    prune(artifact, 0, lambda name: True)
    assert copy(artifact, tmp_path / "there") == [0, 1]
    assert stands(tmp_path / "there", artifact.key) == stands(tmp_path / "here", artifact.key)
    assert verify(tmp_path / "there") == []
    shutil.rmtree(artifact.remaining_folder(0))
    assert verify(tmp_path / "here") == []
