"""Caches in object storage, against a local server that speaks S3."""

from __future__ import annotations

import datetime
import importlib.util
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from eopd.storage import garbage, listing, paths, remote
from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.errors import DamagedPart, MissingArtifact, MissingPart, StoreError, StoreUnreadable, StoreUnwritable
from eopd.storage.garbage import prune
from eopd.storage.identity import Identity
from eopd.storage.remote import RemoteArtifact, copy, open_bucket, put_if_absent
from eopd.storage.stacked import FetchedArtifact, StackedStores
from eopd.storage.teacher_cache import TeacherCache
from eopd.storage.teacher_record import HeadRule, TeacherRows
from eopd.storage.verification import Damage, verify
from tests import s3
from tests.raises import raises

from .making import other, scores
from .test_pruning import copies_stand_as_pruned, interrupted_copies_are_continued, large, make
from .test_teacher_cache import assert_identical

pytest.importorskip("obstore", reason="obstore is not installed")
pytest.importorskip("boto3", reason="boto3 is not installed")
if importlib.util.find_spec("moto") is None:
    pytest.skip("moto[server], a local S3 server, is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3.server() as url:
        yield url


@pytest.fixture
def bucket(endpoint: str, request: pytest.FixtureRequest) -> Any:
    name = f"b{abs(hash(request.node.name))}"
    s3.client(endpoint).create_bucket(Bucket=name)
    return opened(endpoint, f"s3://{name}/team")


def opened(endpoint: str, url: str, **options: Any) -> Any:
    settings = {**s3.ACCESS, "aws_region": "us-east-1"}
    return open_bucket(
        url,
        config={**settings, "aws_endpoint": endpoint},
        client_options={"allow_http": True, "timeout": "5s"},
        retry_config={"max_retries": 0, "retry_timeout": datetime.timedelta(seconds=2)},
        **options,
    )


def test_a_cache_copied_to_a_bucket_is_read_there(tmp_path: Path, bucket: Any) -> None:
    artifact, _ = scores(tmp_path / "here", parts=3, lengths=[5, 400, 0, 60])
    remote = RemoteArtifact(bucket, "scores", artifact.key)
    with raises(MissingArtifact, artifact=f"scores/{artifact.key}"):
        _ = remote.identity
    assert copy(artifact, bucket, parts=[1]) == [1]
    with raises(MissingPart, artifact=f"scores/{artifact.key}", part=0):
        TeacherCache(RemoteArtifact(bucket, "scores", artifact.key)).read([(0, 0)])
    assert copy(artifact, bucket) == [0, 2]
    assert copy(artifact, bucket) == []
    remote = RemoteArtifact(bucket, "scores", artifact.key)
    assert remote.is_complete()
    cache, local = TeacherCache(remote), TeacherCache(artifact)
    wanted = [(2, 1), (0, 0), (1, 3), (2, 1)]
    assert_identical(cache.read(wanted), local.read(wanted))
    assert cache.coverage == local.coverage

    assert copy(remote, tmp_path / "back") == [0, 1, 2]
    back = open_artifact(tmp_path / "back", "scores", artifact.key)
    assert verify(tmp_path / "back") == []
    assert_identical(TeacherCache(back).read_part(1), local.read_part(1))


def test_a_team_bucket_behind_a_private_store(tmp_path: Path, bucket: Any) -> None:
    artifact, _ = scores(tmp_path / "here", head=HeadRule(k_max=8))
    copy(artifact, bucket)
    stack = StackedStores([tmp_path / "private", bucket])
    (result,) = stack.coverages(artifact.identity.base_key)
    assert isinstance(result, FetchedArtifact)
    assert isinstance(stack.find(artifact.identity), FetchedArtifact)
    assert TeacherCache(result).read([(0, 1)]).responses == 1


def test_what_can_be_wrong_in_a_bucket(tmp_path: Path, bucket: Any) -> None:
    import obstore

    artifact, _ = scores(tmp_path)
    copy(artifact, bucket)
    remote = RemoteArtifact(bucket, "scores", artifact.key)
    shard = f"{remote.folder}/{paths.data_name(0, remote.marker(0).nonce)}/entries/c/0/0"
    whole = bytes(obstore.get(bucket, shard).bytes())
    obstore.put(bucket, shard, whole[:40])
    with pytest.raises((DamagedPart, StoreUnreadable)):
        TeacherCache(remote).read_part(0)
    obstore.put(bucket, shard, bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(DamagedPart):
        TeacherCache(remote).read_part(0)
    with pytest.raises(DamagedPart, match="changed"):
        copy(remote, tmp_path / "back")
    obstore.delete(bucket, shard)
    with pytest.raises(DamagedPart, match="gone"):
        TeacherCache(remote).read_part(0)
    obstore.put(bucket, shard, whole)
    marker = f"{remote.folder}/{paths.marker_name(0)}"
    obstore.put(bucket, marker, bytes(obstore.get(bucket, marker).bytes()).replace(b"entries", b"../tri/"))
    with pytest.raises(DamagedPart, match="outside its part folder"):
        TeacherCache(remote).read_part(0)
    assert TeacherCache(remote).read_part(1).responses == 4


def test_a_pruned_checkpoint_is_copied_to_a_bucket(tmp_path: Path, bucket: Any) -> None:
    copies_stand_as_pruned(tmp_path / "here", bucket)


def test_an_interrupted_copy_to_a_bucket_is_continued(
    tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_copies_are_continued(tmp_path / "here", bucket, monkeypatch)


def test_what_is_left_in_a_bucket_is_verified_and_repaired(tmp_path: Path, bucket: Any) -> None:
    import obstore

    artifact = make(tmp_path)
    prune(artifact, 1, large)
    copy(artifact, bucket)
    there = RemoteArtifact(bucket, "checkpoints", artifact.key)
    left = f"{there.folder}/{paths.data_name(1, there.remains(1).nonce)}/sub/figures"
    obstore.put(bucket, left, b"g" * 11)
    (result,) = verify(bucket, repair=True)
    assert "part 1: the bytes of sub/figures changed" in result.problem
    assert there.missing() == [1]
    assert copy(artifact, bucket) == [1]
    assert there.pruned() == {1}
    assert verify(bucket) == []


def test_any_kind_is_listed_in_a_bucket(tmp_path: Path, bucket: Any) -> None:
    import obstore

    obstore.put(bucket, "Notes/x/identity.json", b"x")
    obstore.put(bucket, "my_runs/x/y", b"x")
    assert not listing.is_store(bucket)
    artifact = other(tmp_path, "token_counts", {})
    copy(artifact, bucket)
    assert listing.is_store(bucket)
    assert [(item.kind, item.key, item.problem) for item in listing.ls(bucket)] == [("token_counts", artifact.key, "")]
    assert verify(bucket) == []


def test_what_is_pruned_in_a_bucket_is_not_served(tmp_path: Path, bucket: Any) -> None:
    artifact = make(tmp_path / "team")
    prune(artifact, 1, large)
    copy(artifact, bucket)
    stack = StackedStores([tmp_path / "private", bucket])
    assert stack.find(artifact.identity).folder.is_relative_to(tmp_path / "private")
    copy(make(tmp_path / "whole"), bucket)
    assert isinstance(StackedStores([tmp_path / "private", bucket]).find(artifact.identity), FetchedArtifact)


def test_what_a_bucket_serves_is_as_it_stands_there(tmp_path: Path, bucket: Any) -> None:
    """Every answer is the bucket's; files are fetched, and kept while they are asked for."""
    artifact = make(tmp_path / "team")
    copy(artifact, bucket)
    result = StackedStores([tmp_path / "private", bucket]).find(artifact.identity)
    assert isinstance(result, FetchedArtifact)
    assert result.is_begun()
    assert result.is_complete()
    assert result.manifest == artifact.manifest
    marker = result.marker(1)
    assert result.remains(1) == marker
    assert result.part_names(marker) == set(marker.files)
    assert b"".join(result.checked(marker, "model")) == (artifact.part_folder(1) / "model").read_bytes()
    result.verify_part(1)
    assert not (tmp_path / "private").exists()

    folder = result.remaining_folder(1)
    assert (folder / "sub" / "figures").read_bytes() == (artifact.part_folder(1) / "sub" / "figures").read_bytes()
    assert folder == result.part_folder(1)
    assert folder.is_relative_to(tmp_path / "private" / paths.FETCHED)
    for change in (
        lambda: result.drop_part(1),
        lambda: result.set_aside(0, "no"),
        lambda: result.replace(paths.MANIFEST, ""),
        lambda: result.create("x", ""),
    ):
        with pytest.raises(StoreUnwritable, match="only read"):
            change()

    for path in folder.parent.rglob("*"):
        os.utime(path, (0, 0))
    os.utime(folder.parent, (0, 0))
    assert [removal.path for removal in garbage.plan(tmp_path / "private", None)] == [folder.parent]
    assert result.part_folder(1) == folder
    assert garbage.plan(tmp_path / "private", None) == []


# -- verify ----------------------------------------------------------------------------------------------------


def contents(bucket: Any) -> dict[str, bytes]:
    """Every object of a bucket."""
    import obstore

    listed = [entry["path"] for page in obstore.list(bucket) for entry in page]
    return {path: bytes(obstore.get(bucket, path).bytes()) for path in listed}


def shard_of(artifact: RemoteArtifact, part: int) -> str:
    return f"{artifact.folder}/{paths.data_name(part, artifact.marker(part).nonce)}/entries/c/0/0"


def test_verify_finds_any_damage_in_a_bucket(tmp_path: Path, bucket: Any) -> None:
    import obstore

    artifact, _ = scores(tmp_path)
    copy(artifact, bucket)
    assert verify(bucket) == []
    rng = np.random.default_rng(3)
    whole = contents(bucket)
    assert len(whole) == len([path for path in artifact.folder.rglob("*") if path.is_file()])
    for path, content in whole.items():
        flipped = bytearray(content)
        flipped[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        for damage in (bytes(flipped), content[:-1], None):
            obstore.delete(bucket, path) if damage is None else obstore.put(bucket, path, damage)
            assert verify(bucket), f"{path} was flipped, cut or deleted and not found"
        obstore.put(bucket, path, content)
    assert verify(bucket) == []
    stranger = f"{shard_of(RemoteArtifact(bucket, 'scores', artifact.key), 1)}.orig"
    obstore.put(bucket, stranger, b"x")
    (result,) = verify(bucket, [("scores", artifact.key)])
    assert "part 1: entries/c/0/0.orig was added to scores/" in result.problem


def edit(marker: bytes) -> bytes:
    return marker.replace(b'"rollouts": "rollouts"', b'"rollouts": "others"')


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("part-00001.{nonce}/entries/c/0/0", lambda content: bytes([content[0] ^ 1]) + content[1:]),
        ("part-00001.{nonce}/entries/c/0/0", lambda content: content[:40]),
        ("part-00001.{nonce}/entries/c/0/0", None),
        ("part-00001.{nonce}/zarr.json", lambda content: b""),
        ("part-00001.json", edit),
        ("part-00001.json", lambda content: content + b"\n"),
        ("part-00001.json", lambda content: content[:100]),
        ("part-00001.json", None),
        ("manifest.json", lambda content: content[:20]),
        ("manifest.json", lambda content: content.replace(b'"pruned": false', b'"pruned": true')),
        ("identity.json", lambda content: content.replace(b'"parts": 2', b'"parts": 3')),
        ("identity.json", lambda content: content + b" "),
        ("identity.json", lambda content: b"\xff"),
        ("identity.json", None),
    ],
)
def test_damage_in_a_bucket_is_told_and_repaired_as_in_a_folder(
    tmp_path: Path, bucket: Any, name: str, change: Callable[[bytes], bytes] | None
) -> None:
    import obstore

    (artifact, _), (source, _) = scores(tmp_path / "here"), scores(tmp_path / "source")
    copy(source, bucket)
    remote = RemoteArtifact(bucket, "scores", artifact.key)
    file = artifact.folder / name.format(nonce=artifact.marker(1).nonce)
    path = f"{remote.folder}/{name.format(nonce=remote.marker(1).nonce)}"
    whole = file.read_bytes()
    if change is None:
        file.unlink()
        obstore.delete(bucket, path)
    else:
        file.write_bytes(change(whole))
        obstore.put(bucket, path, change(bytes(obstore.get(bucket, path).bytes())))
    before = contents(bucket)

    def told(result: list[Damage]) -> list[str]:
        words = " | ".join(damage.problem for damage in result)
        for where in (f" of {bucket}", f" in {bucket}", f" in {tmp_path / 'here'}", f"{tmp_path / 'here'}/"):
            words = words.replace(where, "")
        return re.sub(r"part-(\d+)\.[0-9a-f]{16}", r"part-\1.<nonce>", words).split(" | ")

    here, there = verify(tmp_path / "here", repair=True), verify(bucket, repair=True)
    assert told(there) == told(here) != [""]
    assert [(damage.part, damage.name) for damage in there] == [(damage.part, damage.name) for damage in here]
    after = contents(bucket)
    assert set(before.values()) <= set(after.values()), "a repair deletes nothing"
    copy(source, bucket)
    assert verify(bucket) == []
    assert_identical(TeacherCache(RemoteArtifact(bucket, "scores", source.key)).read([(1, 0)]), rows(source))


def rows(artifact: Artifact) -> TeacherRows:
    return TeacherCache(artifact).read([(1, 0)])


def test_what_cannot_be_looked_at_is_not_damaged(tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that fails half way must not have sound parts set aside."""
    artifact, _ = scores(tmp_path)
    copy(artifact, bucket)
    whole = contents(bucket)

    def no_answer(*arguments: object) -> str:
        raise StoreUnreadable("no answer")

    monkeypatch.setattr(RemoteArtifact, "pieces", no_answer)
    with pytest.raises(StoreUnreadable, match="no answer"):
        verify(bucket, repair=True)
    assert contents(bucket) == whole


def test_objects_are_read_in_ranges(tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore

    artifact = Artifact(tmp_path, Identity("rollouts", 1, 1))
    with artifact.write_part(0) as folder:
        (folder / "large").write_bytes(bytes(range(250)) * 10)
        (folder / "empty").touch()
    copy(artifact, bucket)
    data = f"/{paths.data_name(0, RemoteArtifact(bucket, 'rollouts', artifact.key).marker(0).nonce)}/"
    asked: list[int] = []
    get, get_range = obstore.get, obstore.get_range

    def whole(store: Any, path: str, **_: Any) -> Any:
        assert data not in path, f"{path} was asked for in one request"
        return get(store, path)

    def ranged(store: Any, path: str, *, start: int, end: int, **_: Any) -> Any:
        asked.append(end - start)
        return get_range(store, path, start=start, end=end)

    monkeypatch.setattr(obstore, "get", whole)
    monkeypatch.setattr(obstore, "get_range", ranged)
    source = RemoteArtifact(bucket, "rollouts", artifact.key)
    for size in (1000, 1250):
        monkeypatch.setattr(remote, "READ_BYTES", size)
        assert verify(bucket) == []
        assert max(asked) == size
        asked.clear()
        assert copy(source, tmp_path / f"in pieces of {size}") == [0]
        assert max(asked) == size
        assert verify(tmp_path / f"in pieces of {size}") == []
        assert verify(bucket) == []


def test_large_files_are_put_in_pieces(tmp_path: Path, endpoint: str) -> None:
    """And none of what turns out to be damaged on the way."""
    s3.client(endpoint).create_bucket(Bucket="large")
    there = opened(endpoint, "s3://large")
    artifact = Artifact(tmp_path, Identity("rollouts", 1, 2))
    for part in range(2):
        with artifact.write_part(part) as folder:
            (folder / "large").write_bytes(bytes(remote.WRITE_BYTES + 1))
    file = artifact.part_folder(1) / "large"
    file.write_bytes(bytes(remote.WRITE_BYTES) + b"x")
    with raises(DamagedPart, "changed", part=1, file="large"):
        copy(artifact, there)
    objects = s3.client(endpoint).list_objects_v2(Bucket="large")["Contents"]
    assert [entry["ETag"][-3:] for entry in objects if entry["Size"] > 1000] == ['-2"']
    assert verify(there) == []
    assert copy(RemoteArtifact(there, "rollouts", artifact.key), tmp_path / "back", [0]) == [0]
    assert Artifact(tmp_path / "back", artifact.identity).marker(0).checksum == artifact.marker(0).checksum


def test_copying_asks_for_no_more_than_it_needs(tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file is put in one request (S3 marks what came in pieces), and a bucket's part is not listed first."""
    import obstore

    s3.client(endpoint).create_bucket(Bucket="small")
    there = opened(endpoint, "s3://small")
    artifact = make(tmp_path / "here")
    copy(artifact, there)
    tags = [entry["ETag"] for entry in s3.client(endpoint).list_objects_v2(Bucket="small")["Contents"]]
    assert len(tags) == len([path for path in artifact.folder.rglob("*") if path.is_file()])
    assert not [tag for tag in tags if "-" in tag]

    listings: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(obstore, "list", lambda *arguments, **named: listings.append(str(named)) or iter(()))
        copy(RemoteArtifact(there, artifact.kind, artifact.key), tmp_path / "back")
    assert listings == []
    assert verify(tmp_path / "back") == []


@pytest.mark.parametrize(("damage", "words"), [(b"x", "changed"), (None, "gone")])
def test_what_is_short_or_gone_in_a_bucket_is_not_copied(
    tmp_path: Path, bucket: Any, damage: bytes | None, words: str
) -> None:
    import obstore

    artifact = make(tmp_path / "here")
    copy(artifact, bucket)
    source = RemoteArtifact(bucket, artifact.kind, artifact.key)
    path = f"{source.folder}/{paths.data_name(1, source.marker(1).nonce)}/model"
    obstore.delete(bucket, path) if damage is None else obstore.put(bucket, path, damage)
    with raises(DamagedPart, words, part=1, file="model"):
        copy(source, tmp_path / "back")
    assert 1 not in Artifact(tmp_path / "back", artifact.identity).committed()


def test_what_was_fetched_is_read_where_nothing_can_be_written(tmp_path: Path, bucket: Any) -> None:
    artifact = make(tmp_path / "team")
    copy(artifact, bucket)
    private = tmp_path / "private"
    private.mkdir()
    command = ["mount", "-t", "tmpfs", "tmpfs", str(private)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        folder = StackedStores([private, bucket]).find(artifact.identity).part_folder(1)
        subprocess.run(["mount", "-o", "remount,ro", str(private)], check=True)
        assert StackedStores([private, bucket]).find(artifact.identity).part_folder(1) == folder
    finally:
        subprocess.run(["umount", str(private)], check=True)


# -- who may what ----------------------------------------------------------------------------------------------


def test_the_first_commit_in_a_bucket_wins(tmp_path: Path, bucket: Any) -> None:
    artifact, _ = scores(tmp_path)
    copy(artifact, bucket)
    remote = RemoteArtifact(bucket, "scores", artifact.key)
    nonce = remote.marker(0).nonce
    assert remote.is_complete()
    assert not put_if_absent(bucket, f"{remote.folder}/{paths.marker_name(0)}", b"{}")
    assert remote.marker(0).nonce == nonce


def test_a_bucket_that_is_not_there(tmp_path: Path, endpoint: str) -> None:
    artifact, _ = scores(tmp_path)
    with pytest.raises(StoreUnwritable, match="there is no"):
        copy(artifact, opened(endpoint, "s3://nobody-made-this/x"))
    with pytest.raises(StoreUnreadable, match="does not answer"):
        verify(opened(endpoint, "s3://nobody-made-this/x"))
    with pytest.raises(StoreUnreadable):
        RemoteArtifact(opened("http://127.0.0.1:9", "s3://b/x"), "scores", artifact.key).marker(0)
    with pytest.raises(StoreError, match="cannot open"):
        open_bucket("gopher://x")


class ReadOnly(BaseHTTPRequestHandler):
    """What S3 answers where the policy has neither s3:PutObject nor, below /secret, s3:GetObject."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")

    def do_GET(self) -> None:
        self.answer(403 if "secret" in self.path else 404, b"<Error><Code>AccessDenied</Code></Error>")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_read_only_bucket(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), ReadOnly)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    artifact, _ = scores(tmp_path)
    with raises(StoreUnwritable, "refuses access to scores/", remedy="credentials"):
        copy(artifact, opened(endpoint, "s3://team/x"))
    with pytest.raises(StoreUnwritable, match="refuses access"):
        RemoteArtifact(opened(endpoint, "s3://team/secret"), "scores", artifact.key).marker(0)
    server.shutdown()
    server.server_close()
    assert artifact.is_complete()


def test_a_folder_through_obstore(tmp_path: Path) -> None:
    artifact, _ = scores(tmp_path / "here")
    (tmp_path / "there").mkdir()
    there = open_bucket(f"file://{tmp_path / 'there'}")
    assert copy(artifact, there) == [0, 1]
    assert verify(tmp_path / "there") == []
    copied = TeacherCache(RemoteArtifact(there, "scores", artifact.key))
    assert_identical(copied.read_part(1), TeacherCache(artifact).read_part(1))
