"""`eopd store verify`: damage found, set aside, and no false alarm."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from eopd.storage import paths
from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.garbage import prune
from eopd.storage.markers import Marker
from eopd.storage.remote import copy
from eopd.storage.teacher_cache import TeacherCache, write_part
from eopd.storage.teacher_record import HeadRule
from eopd.storage.verification import verify

from .making import header, other, scores


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
            assert verify(tmp_path), f"{path} was cut or deleted and not found"
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
    (result,) = verify(tmp_path, [("scores", artifact.key)])
    assert "extra.py was added" in result.problem
    (artifact.part_folder(0) / "extra.py").unlink()
    marker = artifact.folder / paths.marker_name(0)
    marker.write_text(marker.read_text() + "\n")
    (result,) = verify(tmp_path)
    assert "was edited" in result.problem


def test_a_damaged_identity_is_written_again(tmp_path: Path) -> None:
    artifact, written = scores(tmp_path, parts=1)
    path = artifact.folder / paths.IDENTITY
    whole = path.read_text()
    path.write_text(whole.replace('"parts": 1', '"parts": 2'))
    (result,) = verify(tmp_path, repair=True)
    assert "not scores" in result.problem
    assert path.read_text() == whole
    assert TeacherCache(open_artifact(tmp_path, "scores", artifact.key)).read_part(0).tokens == written[0].tokens


def test_an_edited_identity_stays_one(tmp_path: Path) -> None:
    """A blank more, and it still says the same: the artifact must not vanish from listings for it."""
    artifact, _ = scores(tmp_path)
    path = artifact.folder / paths.IDENTITY
    whole = path.read_text()
    path.write_text(whole + " ")
    (result,) = verify(tmp_path, repair=True)
    assert "identity.json was edited" in result.problem
    assert path.read_text() == whole
    assert verify(tmp_path) == []


def test_a_lost_identity_comes_back(tmp_path: Path) -> None:
    """From the manifest; else from a copy; else the message says what is left to do."""
    artifact, _ = scores(tmp_path / "here")
    copy(artifact, tmp_path / "there")
    path = artifact.folder / paths.IDENTITY
    whole = path.read_text()
    path.unlink()
    (result,) = verify(tmp_path / "here")
    assert "is gone; `eopd store verify --repair` writes it again" in result.problem
    assert not result.beyond_repair
    verify(tmp_path / "here", repair=True)
    assert path.read_text() == whole
    path.unlink()
    (artifact.folder / paths.MANIFEST).unlink()
    (result,) = verify(tmp_path / "here", repair=True)
    assert result.beyond_repair
    assert "a copy from a store that has it; without either, remove the folder" in result.problem
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
    (result,) = verify(tmp_path, repair=True)
    assert result.beyond_repair
    assert "Upgrade eopd" in result.problem
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_lost_manifest_comes_back(tmp_path: Path) -> None:
    artifact, _ = scores(tmp_path)
    whole = artifact.manifest
    (artifact.folder / paths.MANIFEST).unlink()
    (result,) = verify(tmp_path, repair=True)
    assert "is gone, though every part is committed; `eopd store verify --repair` writes it again" in result.problem
    assert verify(tmp_path) == []
    assert artifact.manifest == whole


def test_a_manifest_may_follow_the_last_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A living run has committed its last part and is about to write the manifest."""
    artifact, _ = scores(tmp_path)
    (artifact.folder / paths.MANIFEST).unlink()
    monkeypatch.setattr(time, "sleep", lambda seconds: artifact.finish())
    assert verify(tmp_path) == []


def test_an_incomplete_artifact_has_no_manifest(tmp_path: Path) -> None:
    artifact, _ = scores(tmp_path)
    (artifact.folder / paths.MANIFEST).unlink()
    artifact.drop_part(1)
    assert verify(tmp_path) == []


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
