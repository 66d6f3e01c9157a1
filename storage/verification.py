"""Every byte of a store against what was committed. For `eopd store verify` and `verify --repair`.

Parts: each file's size and SHA-256 against the marker. Markers: their own seal. Identities: they hash to their key.
Manifests: what the markers add up to. Of a pruned part, the files that were kept. Markers, identities and manifests
have one text each, so a changed blank shows. Folders and buckets alike.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.storage import listing, paths
from eopd.storage.errors import DamagedPart, MissingArtifact, MissingPart, NewerSchema, WrongArtifact
from eopd.storage.files import fsync_folder
from eopd.storage.markers import file_text, marker_text
from eopd.storage.stored import StoredArtifact

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket

UNSOUND = (DamagedPart, WrongArtifact, MissingPart, MissingArtifact, NewerSchema)
"""Errors that say something of what is stored. Others say that it could not be looked at, which is no damage."""


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was committed."""

    kind: str
    key: str
    part: int | None  # None: the identity or the manifest
    name: str  # of the file in the artifact's folder that `repair` renames
    problem: str

    @property
    def folder(self) -> str:
        return f"{self.kind}/{self.key}"


def verify(
    store: Path | Bucket, only: Sequence[tuple[str, str]] | None = None, *, repair: bool = False
) -> list[Damage]:
    """Check every artifact of a store, or ``only`` those (kind, key).

    ``repair`` renames the marker of each damaged part to ``.damaged``, so that the next plan, or copy to a bucket, does
    it again, and damaged identities and manifests, which the next commit writes again. It deletes nothing (`gc` does).

    Raises:
        StoreUnreadable, StoreUnwritable: a bucket does not answer, or refuses access.
    """
    found = list(_without_identity(store)) if only is None else []
    for kind, key in listing.keys(store) if only is None else only:
        damages = list(_artifact(store, kind, key))
        if damages and repair:
            _repair(store, damages)
        found += damages
    return found


def _artifact(store: Path | Bucket, kind: str, key: str) -> Iterator[Damage]:
    try:
        artifact = listing.open_in(store, kind, key)
    except UNSOUND as error:
        yield Damage(kind, key, None, paths.IDENTITY, str(error))
        return
    if artifact.read(paths.IDENTITY) != file_text(artifact.identity.to_json()).encode():
        yield Damage(kind, key, None, paths.IDENTITY, f"{artifact.folder}/{paths.IDENTITY} was edited")
    damaged = False
    standing = artifact.standing()
    for part in sorted(standing.made):
        name = paths.marker_name(part) if part in standing.committed else paths.tombstone_name(part)
        try:
            _check_part(artifact, part, name)
        except UNSOUND as error:
            damaged = True
            yield Damage(kind, key, part, name, str(error))
    problem = "" if damaged else _manifest_problem(artifact)
    if problem:
        yield Damage(kind, key, None, paths.MANIFEST, problem)


def _check_part(artifact: StoredArtifact, part: int, name: str) -> None:
    """Raises one of UNSOUND, naming the first thing wrong with a part whose marker, or tombstone, is ``name``."""
    artifact.verify_part(part)
    marker = artifact.remains(part)
    if artifact.read(name) != marker_text(marker, artifact.kind, artifact.key).encode():
        raise DamagedPart(f"{artifact.folder}/{name} was edited. `eopd store verify --repair` re-queues the part.")
    if marker.set_aside is not None:
        raise DamagedPart(f"{artifact} part {part} was set aside, and holds nothing: {marker.set_aside}")


def _manifest_problem(artifact: StoredArtifact) -> str:
    """What is wrong with the manifest; empty: nothing."""
    path = f"{artifact.folder}/{paths.MANIFEST}"
    if not artifact.has(paths.MANIFEST):
        return f"{path} is gone" if artifact.is_complete() else ""
    try:
        # pruning says so here last of all: a kill before that leaves a manifest that names fewer parts
        named = artifact.pruned() & set(artifact.manifest.get("pruned_parts", ()))
        sound = artifact.read(paths.MANIFEST) == file_text(artifact.manifest_content(named)).encode()
    except MissingPart as error:
        return f"{path} lists a part whose marker is gone: {error}"
    except UNSOUND as error:
        return f"{path}: {error}"
    except ValueError:  # not UTF-8, or not JSON
        return f"{path} is not JSON: cut or edited"
    return "" if sound else f"{path} is not what the markers add up to"


def _without_identity(store: Path | Bucket) -> Iterator[Damage]:
    """Folders with committed parts and nothing that says what they are."""
    for kind, key in listing.unidentified(store):
        path = store / kind / key / paths.IDENTITY if isinstance(store, Path) else f"{kind}/{key}/{paths.IDENTITY}"
        problem = f"{path} is gone; the next commit, or a copy, writes it again"
        yield Damage(kind, key, None, paths.IDENTITY, problem)


def _repair(store: Path | Bucket, damages: Sequence[Damage]) -> None:
    """Set aside what is damaged of one artifact; its manifest is written again if that was all."""
    for damage in damages:
        _set_aside(store, damage)
    try:
        artifact = listing.open_in(store, damages[0].kind, damages[0].key)
    except MissingArtifact:  # its identity was set aside
        return
    artifact.finish()


def _set_aside(store: Path | Bucket, damage: Damage) -> None:
    nonce = secrets.token_hex(8)
    if damage.part is None:
        _rename(store, damage.folder, damage.name, f"{damage.name}.{nonce}.damaged")
        return
    _rename(store, damage.folder, damage.name, paths.damaged_name(damage.part, nonce))
    # the manifest lists a part that has to be done again
    _rename(store, damage.folder, paths.MANIFEST, f"{paths.MANIFEST}.{nonce}.damaged")


def _rename(store: Path | Bucket, folder: str, name: str, to: str) -> None:
    """Nothing happens where there is no such file."""
    if not isinstance(store, Path):
        from eopd.storage.remote import rename

        rename(store, f"{folder}/{name}", f"{folder}/{to}")
    elif (store / folder / name).exists():
        os.replace(store / folder / name, store / folder / to)
        fsync_folder(store / folder)
