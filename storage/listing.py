"""The content of a store (folder or bucket), from its folders and markers alone. For `eopd store ls` and `show`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eopd.storage import paths
from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.errors import UNSOUND, DamagedPart, StoreError
from eopd.storage.untrusted import A_PLAIN_FILE, kind_of, refuse_links

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket

    from eopd.storage.remote import RemoteArtifact


@dataclass(frozen=True)
class Listed:
    """One artifact. ``problem`` says why it cannot be used, else it is empty."""

    kind: str
    key: str
    parts: int
    committed: int
    bytes: int
    problem: str = ""
    pruned: int = 0  # parts whose data were pruned

    @property
    def complete(self) -> bool:
        return not self.problem and self.committed + self.pruned == self.parts


def is_store(store: Path | Bucket) -> bool:
    """True if the folder exists; for a bucket, if it holds anything that a store would."""
    if isinstance(store, Path):
        return store.is_dir()
    from eopd.storage.remote import folders, kinds

    return any(paths.is_key(name) for kind in kinds(store) for name in folders(store, kind))


def keys(store: Path | Bucket) -> Iterator[tuple[str, str]]:
    """(kind, key) of every folder with an identity, sorted. A coverage's key is <identity>/<coverage>.

    A link in an artifact's place is among them: opening it is refused.
    """
    if not isinstance(store, Path):
        from eopd.storage.remote import keys as keys_of_bucket

        yield from keys_of_bucket(store)
        return
    for kind, key, folder in _folders(store):
        if folder.is_symlink() or os.path.lexists(folder / paths.IDENTITY):
            yield kind, key


def unidentified(store: Path | Bucket) -> Iterator[tuple[str, str]]:
    """List (kind, key) of every folder with markers and no identity, sorted."""
    if not isinstance(store, Path):
        from eopd.storage.remote import unidentified as unidentified_of_bucket

        yield from unidentified_of_bucket(store)
        return
    for kind, key, folder in _folders(store):
        if folder.is_symlink() or os.path.lexists(folder / paths.IDENTITY):
            continue
        if any(map(paths.is_of_a_commit, _names(folder))):
            yield kind, key


def _folders(store: Path) -> Iterator[tuple[str, str, Path]]:
    """List (kind, key, folder) of every folder that may be an artifact's, sorted; links are listed and never
    followed."""
    for kind in filter(paths.is_kind, _names(store)):
        if (store / kind).is_symlink():  # ``misplaced`` names it
            continue
        for name in filter(paths.is_key, _names(store / kind)):
            folder = store / kind / name
            if not folder.is_symlink() and not folder.is_dir():
                continue
            yield kind, name, folder
            if not folder.is_symlink() and not os.path.lexists(folder / paths.IDENTITY):
                inner = (each for each in _names(folder) if paths.is_key(f"{name}/{each}"))
                yield from (
                    (kind, f"{name}/{each}", folder / each)
                    for each in inner
                    if (folder / each).is_symlink() or (folder / each).is_dir()
                )


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def misplaced(store: Path) -> Iterator[tuple[str, str]]:
    """List (name, problem) of entries in the place of a folder of a store's layout that hide what should be there.

    A plain file that has a kind's name may be anybody's note: it is passed over.
    """
    kinds = (name for name in filter(paths.is_kind, _names(store)) if kind_of(store / name) != A_PLAIN_FILE)
    for name in (*kinds, paths.RUNS, paths.FETCHED, paths.MODELS):
        try:
            refuse_links(store, name)
        except DamagedPart as error:
            yield name, str(error)


def open_in(store: Path | Bucket, kind: str, key: str) -> Artifact | RemoteArtifact:
    """Open an artifact. Raises MissingArtifact, DamagedPart, WrongArtifact, NewerSchema; in buckets also
    StoreUnreadable, StoreUnwritable."""
    if isinstance(store, Path):
        return open_artifact(store, kind, key)
    from eopd.storage.remote import RemoteArtifact

    remote = RemoteArtifact(store, kind, key)
    _ = remote.identity
    return remote


def ls(store: Path | Bucket) -> list[Listed]:
    """List every artifact of a store, unusable ones included.

    Raises:
        StoreError: there is no such folder, or the bucket does not answer.
    """
    if isinstance(store, Path) and not store.is_dir():
        raise StoreError(f"there is no store at {store}", file=store)
    odd = misplaced(store) if isinstance(store, Path) else ()
    return [
        *(Listed(name, "", 0, 0, 0, problem) for name, problem in odd),
        *(listed(store, kind, key) for kind, key in keys(store)),
    ]


def listed(store: Path | Bucket, kind: str, key: str) -> Listed:
    """Describe one artifact of a store; in a folder, its bytes are those that its markers state."""
    try:
        artifact = open_in(store, kind, key)
        standing = artifact.standing()
        if isinstance(artifact, Artifact):
            size = sum(artifact.remains(part).bytes for part in standing.made)
        else:
            size = artifact.size
        return Listed(kind, key, artifact.parts, len(standing.committed), size, pruned=len(standing.pruned))
    except (StoreError, OSError) as error:
        return Listed(kind, key, 0, 0, 0, str(error))


def find(store: Path | Bucket, name: str) -> Artifact | RemoteArtifact:
    """Open the artifact that ``name`` identifies (``named``).

    Raises:
        StoreError: it names none, or several, or one that cannot be used.
    """
    return open_in(store, *named(store, name))


def named(store: Path | Bucket, name: str) -> tuple[str, str]:
    """Return (kind, key) of the one artifact whose key, or <kind>/<key>, starts with ``name``.

    Raises:
        StoreError: none does, or several do.
    """
    able = [(kind, key) for kind, key in keys(store) if key.startswith(name) or f"{kind}/{key}".startswith(name)]
    exact = [(kind, key) for kind, key in able if name in (key, f"{kind}/{key}")]
    able = exact or able
    if len(able) != 1:
        some = ", ".join(f"{kind}/{key}" for kind, key in able[:4])
        matches = f"{len(able)} artifacts: {some}" if able else "no artifact"
        raise StoreError(f"{name!r} names {matches} in {store}", artifact=name, remedy="`eopd store ls` lists them.")
    return able[0]


def show(artifact: Artifact | RemoteArtifact) -> dict[str, Any]:
    """Return identity, state and the provenance of each committed part, as plain JSON values."""
    done, gone = sorted(artifact.committed()), sorted(artifact.pruned())
    markers = {part: artifact.remains(part) for part in (*done, *gone)}
    return {
        **artifact.identity.to_json(),
        "key": artifact.key,
        "folder": str(artifact.folder),
        "missing_parts": artifact.parts - len(markers),
        "first_missing": artifact.first_missing(),
        "bytes": sum(marker.bytes for marker in markers.values()),
        "parts_committed": {
            str(part): {
                "checksum": marker.checksum,
                "bytes": marker.bytes,
                "inputs": dict(marker.inputs),
                **marker.info,
            }
            for part, marker in markers.items()
            if part in done
        },
        "parts_pruned": {
            str(part): {
                "bytes_left": markers[part].bytes,
                "files_left": sorted(markers[part].files),
                **markers[part].info,
            }
            for part in gone
        },
    }


def coverages(store: Path, identity: str) -> list[Artifact]:
    """Return every readable coverage that a store has of the scores with this identity key."""
    artifacts = []
    refuse_links(store, "scores", identity)
    for name in _names(store / "scores" / identity):
        with suppress(*UNSOUND):  # `verify` reports the problem
            artifacts.append(open_artifact(store, "scores", f"{identity}/{name}"))
    return artifacts
