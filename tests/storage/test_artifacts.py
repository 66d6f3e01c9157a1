"""The commit rule, as a crash, a rival and a vandal would test it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from eopd.storage import paths
from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.claims import claim, claimed_parts, held_parts, holder, may_be_held
from eopd.storage.errors import (
    DamagedPart,
    MissingArtifact,
    MissingPart,
    NewerSchema,
    StoreError,
    StoreUnwritable,
    WrongArtifact,
)
from eopd.storage.identity import Identity
from eopd.storage.stopping import Stopped
from tests.raises import raises
from tests.strangers import unprivileged


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return Artifact(tmp_path, Identity("rollouts", 1, 3, {"n": 1}, {"policy": "abc"}))


def write(artifact: Artifact, part: int, text: str = "data") -> None:
    with artifact.write_part(part, inputs={"up": "x"}, info={"tokens": 3}) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file.txt").write_text(text)


def test_a_part_exists_only_once_its_marker_does(artifact: Artifact) -> None:
    with artifact.write_part(0) as folder:
        (folder / "f").write_text("x")
        assert not artifact.is_committed(0)
        assert artifact.missing() == [0, 1, 2]
    assert artifact.is_committed(0)
    assert artifact.missing() == [1, 2]
    assert (artifact.part_folder(0) / "f").read_text() == "x"


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_of_the_umask_however_they_were_written(artifact: Artifact, umask: int) -> None:
    before = os.umask(umask)
    try:
        with artifact.write_part(0) as folder:
            (folder / "own").write_text("x")
            (folder / "own").chmod(0o600)  # as a file that was written through a temporary one
            (folder / "plain").write_text("x")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in artifact.part_folder(0).iterdir() if path.is_file()}
    assert modes.keys() >= {"own", "plain"}
    assert set(modes.values()) == {0o666 & ~umask}


def test_the_manifest_appears_with_the_last_part(artifact: Artifact) -> None:
    write(artifact, 2)
    write(artifact, 0)
    with raises(MissingPart, r"\[1\]", artifact=str(artifact)):
        _ = artifact.manifest
    write(artifact, 1)
    assert artifact.is_complete()
    assert artifact.manifest["part_checksums"]["1"] == artifact.marker(1).checksum


def test_an_exception_leaves_nothing(artifact: Artifact) -> None:
    def fail() -> None:
        with artifact.write_part(0) as folder:
            (folder / "f").write_text("x")
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert not artifact.is_committed(0)
    assert not [name for name in os.listdir(artifact.folder) if paths.data_part(name)]


def test_first_commit_wins_and_the_loser_leaves_no_trace(artifact: Artifact) -> None:
    with artifact.write_part(0) as slow:
        (slow / "f").write_text("slow")
        with artifact.write_part(0) as fast:
            (fast / "f").write_text("fast")
    assert (artifact.part_folder(0) / "f").read_text() == "fast"
    assert len([name for name in os.listdir(artifact.folder) if paths.data_part(name)]) == 1


def test_the_key_is_of_what_the_artifact_is(tmp_path: Path) -> None:
    one = Identity("scores", 1, 3, {"a": 1, "b": [1.5]}, {"teacher": "t"}, coverage={"k": 16})
    same = Identity("scores", 1, 3, {"b": [1.5], "a": 1}, {"teacher": "t"}, coverage={"k": 16})
    wider = Identity("scores", 1, 3, {"a": 1, "b": [1.5]}, {"teacher": "t"}, coverage={"k": 64})
    other = Identity("scores", 1, 3, {"a": 1, "b": [1.5]}, {"teacher": "u"}, coverage={"k": 16})
    assert one.key == same.key
    assert one.base_key == wider.base_key
    assert one.key != wider.key
    assert one.base_key != other.base_key


def test_damage_is_named(artifact: Artifact) -> None:
    write(artifact, 0)
    file = artifact.part_folder(0) / "sub" / "file.txt"
    file.write_text("dAta")  # same size
    artifact.part_folder(0)
    with raises(DamagedPart, "changed", artifact=str(artifact), part=0, file="sub/file.txt"):
        artifact.verify_part(0)
    file.write_text("longer than before")
    with raises(DamagedPart, "18 bytes, not 4", part=0, file="sub/file.txt"):
        artifact.part_folder(0)
    file.unlink()
    with raises(DamagedPart, "gone", part=0, file="sub/file.txt"):
        artifact.part_folder(0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"schema": 99}, NewerSchema, "Upgrade eopd"),
        ({"key": "f" * 20}, WrongArtifact, "is the marker of"),
        ({"part": 2}, WrongArtifact, "is the marker of"),
        ({"nonce": "../../etc"}, DamagedPart, "outside the artifact"),
        ({"files": {"../x": {"size": 1, "sha256": "0"}}}, DamagedPart, "outside its part folder"),
        ({"files": {"/etc/passwd": {"size": 1, "sha256": "0"}}}, DamagedPart, "outside its part folder"),
        ({"files": {"f": {"size": 1, "sha256": "0"}}}, DamagedPart, "was altered"),
    ],
)
def test_a_marker_is_not_believed_blindly(
    artifact: Artifact, change: dict[str, object], error: type[StoreError], words: str
) -> None:
    write(artifact, 0)
    marker = artifact.folder / paths.marker_name(0)
    marker.write_text(json.dumps({**json.loads(marker.read_text()), **change}))
    with raises(error, words, file=marker):
        artifact.part_folder(0)


def test_an_identity_must_hash_to_its_key(artifact: Artifact, tmp_path: Path) -> None:
    write(artifact, 0)
    assert open_artifact(tmp_path, "rollouts", artifact.key).identity == artifact.identity
    path = artifact.folder / paths.IDENTITY
    path.write_text(path.read_text().replace('"abc"', '"abd"'))
    with raises(WrongArtifact, artifact=str(artifact), file=path):
        open_artifact(tmp_path, "rollouts", artifact.key)
    with raises(MissingArtifact, artifact="rollouts/nothing"):
        open_artifact(tmp_path, "rollouts", "nothing")


WORKER = """
import os, signal, sys, time
from pathlib import Path
from eopd.storage.artifacts import Artifact
from eopd.storage.identity import Identity
from eopd.storage.claims import claimed_parts
store, dies = Path(sys.argv[1]), sys.argv[2] == "die"
artifact = Artifact(store, Identity("rollouts", 1, 40))
while not dies and len(list(store.glob("*.dying"))) < 2:
    time.sleep(0.01)
for part in claimed_parts(artifact, range(40)):
    with artifact.write_part(part, info={"by": os.getpid()}) as folder:
        (folder / "f").write_text(f"part {part}")
        if dies:
            (store / f"{os.getpid()}.dying").touch()
        time.sleep(0.05 if dies else 0.01)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_share_the_parts_and_survive_each_other(tmp_path: Path) -> None:
    kinds = ["die", "die", "live", "live"]
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), kind]) for kind in kinds]
    codes = [worker.wait(60) for worker in workers]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0, 0]
    artifact = Artifact(tmp_path, Identity("rollouts", 1, 40))
    assert artifact.is_complete()
    authors = {artifact.marker(part).info["by"] for part in range(40)}
    assert {workers[2].pid, workers[3].pid} & authors
    for part in range(40):
        artifact.verify_part(part)
        assert (artifact.part_folder(part) / "f").read_text() == f"part {part}"


def test_a_claimed_part_comes_last(artifact: Artifact) -> None:
    with claim(artifact, 0) as ours:
        assert ours
        parts = claimed_parts(artifact, [0, 1])
        assert next(parts) == 1
        write(artifact, 1)
        write(artifact, 0)  # its holder commits
        assert list(parts) == []


def test_who_waits_for_others_lets_them_have_what_it_holds(artifact: Artifact) -> None:
    """Two processes that each hold a part to be written later, and wait for the other's, would wait for ever."""
    with ExitStack() as others, ExitStack() as ours:
        assert others.enter_context(claim(artifact, 1))

        def write_later() -> None:
            write(artifact, 0)
            ours.close()
            write(artifact, 1)  # they got what they waited for, and end
            others.close()

        parts = held_parts(artifact, [0, 1], before_waiting=write_later)
        part, held = next(parts)
        assert part == 0
        ours.enter_context(held)
        assert list(parts) == []


def test_a_dropped_part_is_gone_whole(artifact: Artifact) -> None:
    write(artifact, 0)
    folder = artifact.part_folder(0)
    artifact.drop_part(0)
    assert not artifact.is_committed(0)
    assert not folder.exists()


def test_a_commit_whose_answer_was_lost_is_ours(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS: the server links, the answer is lost, the repeated request says that the name exists."""
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    write(artifact, 0, "ours")
    monkeypatch.undo()
    assert (artifact.part_folder(0) / "sub" / "file.txt").read_text() == "ours"


@pytest.mark.parametrize("error", [Stopped(), OSError(errno.EIO, "input/output error")])
def test_a_stop_after_the_commit_keeps_what_was_committed(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """The marker is linked; what comes after it (the temporary file goes, the folder is synced) does not end."""
    unlink = Path.unlink

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        if path.name.startswith(f".{paths.marker_name(0)}"):
            raise error

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", interrupted)
        with pytest.raises(type(error)):
            write(artifact, 0)
    assert artifact.is_committed(0)
    artifact.verify_part(0)


def test_an_error_names_the_file_that_it_is_about(artifact: Artifact, tmp_path: Path) -> None:
    def read_elsewhere() -> None:
        with artifact.write_part(0):
            raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "tokenizer.json"))

    with raises(StoreUnwritable, "Permission denied", file=tmp_path / "tokenizer.json") as raised:
        read_elsewhere()
    assert "part-00000" not in str(raised.value)


def test_looking_who_is_at_work_needs_no_permission_to_write(open_folder: Path) -> None:
    """As another user of a team's store, who may read it or not even that."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    artifact = Artifact(open_folder, Identity("rollouts", 1, 3))
    artifact.folder.mkdir(parents=True)
    umask = os.umask(0o077)
    try:
        with claim(artifact, 0) as ours:
            assert ours
            path = artifact.folder / paths.claim_name(0)
            assert path.stat().st_mode & 0o666 == 0o666
            assert "process" in str(holder(artifact, 0))
            assert may_be_held(path)
            path.chmod(0o444)
            with unprivileged():
                assert holder(artifact, 0) is not None
            path.chmod(0o600)
            with unprivileged():
                assert holder(artifact, 0) is None
                assert may_be_held(path)
        assert not may_be_held(path)
    finally:
        os.umask(umask)


def test_without_locks_every_claim_is_granted(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "no locks on this file system")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claim(artifact, 0) as one, claim(artifact, 0) as other:
        assert one
        assert other
