"""Stores on the Hugging Face Hub, against a local server that speaks its API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from eopd.storage import listing, paths
from eopd.storage.errors import DamagedPart, MissingArtifact, StoreError, StoreUnreadable, StoreUnwritable
from eopd.storage.hub import HubDataset, upload
from eopd.storage.places import open_place
from eopd.storage.remote import RemoteArtifact, copy
from eopd.storage.stacked import StackedStores
from eopd.storage.teacher_cache import TeacherCache
from eopd.storage.verification import verify
from tests import hub as stand_in
from tests.raises import raises

from .making import scores
from .test_teacher_cache import assert_identical

URL = "hf://datasets/user/cache"


@pytest.fixture(scope="module")
def server() -> Iterator[stand_in.Hub]:
    with stand_in.server() as hub:
        yield hub


@pytest.fixture
def hub(server: stand_in.Hub, monkeypatch: pytest.MonkeyPatch) -> stand_in.Hub:
    server.repositories.clear()
    server.requests.clear()
    server.ranges, server.fails, server.leaks = True, 0, 0
    stand_in.use(server, monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the retries of huggingface_hub
    return server


def test_a_cache_is_read_on_the_hub_as_in_its_folder(tmp_path: Path, hub: stand_in.Hub) -> None:
    artifact, _ = scores(tmp_path, parts=3, lengths=[5, 400, 0, 60])
    assert (
        upload(tmp_path, "user/cache", "dataset", private=False, message="x") == f"{hub.endpoint}/datasets/user/cache"
    )
    sent = hub.files("datasets/user/cache")
    here = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: content for path, content in sent.items() if path != ".gitattributes"} == here

    hub.requests.clear()
    store = open_place(URL)
    assert hub.requests == []
    assert [(item.key, item.complete) for item in listing.ls(store)] == [(artifact.key, True)]
    cache, local = TeacherCache(listing.find(store, "scores/")), TeacherCache(artifact)
    wanted = [(2, 1), (0, 0), (1, 3), (2, 1)]
    assert_identical(cache.read(wanted), local.read(wanted))
    assert all("bytes=" in request for request in hub.requests if "/resolve/" in request)
    assert len([request for request in hub.requests if "/revision/" in request]) == 1
    assert listing.is_store(store)
    assert verify(store) == []
    assert copy(listing.find(store, artifact.key), tmp_path / "back") == [0, 1, 2]
    assert verify(tmp_path / "back") == []


def test_a_dataset_serves_a_run_as_a_read_only_store(tmp_path: Path, hub: stand_in.Hub) -> None:
    artifact, _ = scores(tmp_path / "here")
    upload(tmp_path / "here", "user/cache", "dataset", private=True, message="x")
    stack = StackedStores.at(str(tmp_path / "private"), [URL])
    (served,) = stack.coverages(artifact.identity.base_key)
    assert_identical(TeacherCache(served).read([(1, 0)]), TeacherCache(artifact).read([(1, 0)]))
    assert (served.part_folder(1) / "zarr.json").read_bytes() == (artifact.part_folder(1) / "zarr.json").read_bytes()


def test_a_folder_and_a_revision_of_a_repository(tmp_path: Path, hub: stand_in.Hub) -> None:
    first, _ = scores(tmp_path / "both" / "team" / "one", parts=1)
    upload(tmp_path / "both", "user/cache", "dataset", private=False, message="x")
    store = HubDataset.at(f"{URL}@main/team/one/")
    assert [key for _, key in listing.keys(store)] == [first.key]
    assert repr(store) == f"{URL}/team/one"
    assert_identical(TeacherCache(listing.find(store, "scores/")).read([(0, 0)]), TeacherCache(first).read([(0, 0)]))
    second, _ = scores(tmp_path / "both" / "team" / "one", parts=2)
    upload(tmp_path / "both", "user/cache", "dataset", private=False, message="x")
    keys = {
        url: {key for _, key in listing.keys(open_place(f"{url}/team/one"))} for url in (URL, f"{URL}@{store.commit}")
    }
    assert keys == {URL: {first.key, second.key}, f"{URL}@{store.commit}": {first.key}}
    assert HubDataset.at(f"{URL}@refs%2Fpr%2F3").revision == HubDataset.at(f"{URL}@refs/pr/3").revision == "refs/pr/3"


def test_servers_without_ranges_and_busy_ones(tmp_path: Path, hub: stand_in.Hub) -> None:
    artifact, _ = scores(tmp_path, parts=1)
    upload(tmp_path, "user/cache", "dataset", private=False, message="x")
    hub.ranges, hub.fails = False, 2
    assert_identical(
        TeacherCache(listing.find(open_place(URL), "scores/")).read([(0, 3)]), TeacherCache(artifact).read([(0, 3)])
    )


def test_large_files_are_read_where_they_are(tmp_path: Path, hub: stand_in.Hub) -> None:
    """The Hub says once where one is; only when that address has expired is it asked again."""
    artifact, _ = scores(tmp_path, parts=1, lengths=[400] * 8)
    upload(tmp_path, "user/cache", "dataset", private=True, message="x")
    cache, local = TeacherCache(listing.find(open_place(URL), "scores/"), memory=0), TeacherCache(artifact)

    def resolved() -> int:
        hub.requests.clear()
        assert_identical(cache.read([(0, 0), (0, 5)]), local.read([(0, 0), (0, 5)]))
        assert any("/large/" in request for request in hub.requests)
        return sum("/resolve/" in request for request in hub.requests)

    resolved()
    assert resolved() == 0
    hub.signature = "signed=2"
    assert resolved() > 0
    assert resolved() == 0
    assert hub.leaks == 0


def test_damage_on_the_hub_is_named(tmp_path: Path, hub: stand_in.Hub) -> None:
    artifact, _ = scores(tmp_path)
    upload(tmp_path, "user/cache", "dataset", private=False, message="x")
    shard = f"scores/{artifact.key}/{paths.data_name(1, artifact.marker(1).nonce)}/entries/c/0/0"
    files = hub.files("datasets/user/cache")
    whole = files[shard]
    files[shard] = bytes([whole[0] ^ 1]) + whole[1:]
    store = open_place(URL)
    (damage,) = verify(store)
    assert "the bytes of entries/c/0/0 changed" in damage.problem
    with pytest.raises(DamagedPart):
        TeacherCache(listing.find(store, "scores/")).read_part(1)
    with pytest.raises(StoreUnwritable, match="only read"):
        verify(store, repair=True)
    del files[shard]
    with pytest.raises(DamagedPart, match="gone"):
        TeacherCache(listing.find(store, "scores/")).read_part(1)


@pytest.mark.parametrize(
    "url", ["hf://user/cache", "hf://models/user/cache", "hf://datasets/cache", "hf://datasets/", "hf://spaces/a/b"]
)
def test_urls_that_are_no_dataset(url: str) -> None:
    with raises(StoreError, file=url):
        open_place(url)


@pytest.mark.parametrize("name", ["cache", "user/ca che", "user/cache.git", "user/-cache", "a/b/c", "user/" + "x" * 97])
def test_names_that_no_repository_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="is no name of a repository") as raised:
        upload(tmp_path, name, "dataset", private=False, message="x")
    assert "\n" not in str(raised.value)


def test_what_the_hub_refuses(tmp_path: Path, hub: stand_in.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(StoreUnwritable, match=r"refuses access to other/cache.*hf auth login"):
        upload(tmp_path, "other/cache", "dataset", private=False, message="x")
    upload(tmp_path, "user/cache", "dataset", private=True, message="x")
    assert hub.repositories["datasets/user/cache"].private
    with raises(MissingArtifact, "revision"):
        listing.ls(open_place(f"{URL}@v2"))
    with raises(MissingArtifact, file="hf://datasets/user/none"):
        listing.ls(open_place("hf://datasets/user/none"))
    with pytest.raises(StoreUnwritable, match="eopd push"):
        copy(scores(tmp_path / "store", parts=1)[0], open_place(URL))
    monkeypatch.delenv("HF_TOKEN")
    with raises(MissingArtifact, "private", file=URL):
        listing.ls(open_place(URL))
    with pytest.raises(StoreUnwritable, match="needs a token"):
        upload(tmp_path, "user/cache", "dataset", private=False, message="x")


def test_no_network(tmp_path: Path, hub: stand_in.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for action in (
        lambda: RemoteArtifact(open_place(URL), "scores", "0" * 20).exists(),
        lambda: upload(tmp_path, "user/cache", "dataset", private=False, message="x"),
    ):
        with pytest.raises(StoreUnreadable, match=r"http://127.0.0.1:9 does not answer") as raised:
            action()
        assert "\n" not in str(raised.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StoreUnreadable, match="HF_HUB_OFFLINE"):
        listing.ls(open_place(URL))
