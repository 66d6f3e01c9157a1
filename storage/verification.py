"""Verification of every byte in a store. For `eopd store verify` and `verify --repair`.

Parts: each file's size and SHA-256 against the marker. Markers: their own seal. Identities: they hash to their key.
Manifests, which a complete artifact has: what the markers add up to. Of a pruned part, the files that were kept.
Markers, identities and manifests have one text each, so a changed blank shows. Folders and buckets alike, beside living
runs.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.storage import listing, paths
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import UNSOUND, DamagedPart, MissingArtifact, MissingPart, NewerSchema
from eopd.storage.files import fsync_folder
from eopd.storage.identity import Identity, parse_identity
from eopd.storage.markers import file_text, marker_text
from eopd.storage.notes import notes
from eopd.storage.stored import StoredArtifact
from eopd.storage.untrusted import A_PLAIN_FILE, kind_of, read_plain, refuse_links

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket

    from eopd.storage.remote import RemoteArtifact

_MANIFEST_POLLS, _MANIFEST_POLL_SECONDS = 10, 0.1


@dataclass(frozen=True)
class Damage:
    """One file or text that differs from what was committed."""

    kind: str
    key: str
    part: int | None  # None: the identity or the manifest
    name: str  # of the file in the artifact's folder
    problem: str
    beyond_repair: bool = False  # a newer eopd wrote it, and may find it sound; or nothing identifies it

    @property
    def folder(self) -> str:
        return f"{self.kind}/{self.key}" if self.key else self.kind


def verify(
    store: Path | Bucket, only: Sequence[tuple[str, str]] | None = None, *, repair: bool = False
) -> list[Damage]:
    """Check every artifact of a store, or ``only`` those (kind, key).

    ``repair`` renames the marker of each damaged part to ``.damaged``, so that the next plan, or copy to a bucket, does
    it again. Identities and manifests it writes again from what is there: an edited identity from what it says, a
    damaged or lost one from the manifest, a manifest from the markers. Claims and notes on runs that are no plain files
    or cannot be read are renamed too. It deletes nothing (`gc` does), and follows no link.

    Raises:
        StoreUnreadable, StoreUnwritable: a bucket does not answer, or refuses access.
    """
    damaged: list[Damage] = []
    if isinstance(store, Path) and only is None:
        damaged += _misplaced(store)
        unreadable = [] if any(damage.kind == paths.RUNS for damage in damaged) else list(_notes(store))
        if repair:
            for note in unreadable:
                _rename(store, note.kind, note.name, f".{note.name}.damaged")
        damaged += unreadable
    for kind, key in listing.unidentified(store) if only is None else ():
        damage = _without_identity(store, kind, key)
        if repair:
            _restore_identity(store, kind, key)
        damaged.append(damage)
    for kind, key in listing.keys(store) if only is None else only:
        damages = list(_artifact(store, kind, key))
        if repair:
            _repair(store, kind, key, damages)
        damaged += damages
    return damaged


def _misplaced(store: Path) -> Iterator[Damage]:
    for name, problem in listing.misplaced(store):
        yield Damage(name, "", None, "", problem, beyond_repair=True)


def _notes(store: Path) -> Iterator[Damage]:
    """Yield unreadable notes of the runs that use the store (``paths.RUNS``)."""
    for name, note in notes(store):
        if isinstance(note, DamagedPart):
            yield Damage(paths.RUNS, "", None, name, str(note))


def _artifact(store: Path | Bucket, kind: str, key: str) -> Iterator[Damage]:
    if isinstance(store, Path):
        try:
            refuse_links(store, kind, *key.split("/"))
        except DamagedPart as error:
            yield Damage(kind, key, None, "", str(error), beyond_repair=True)
            return
    try:
        yield from _of_artifact(store, kind, key)
    except OSError as error:  # the user may not read it, or the disk cannot
        yield _damage(kind, key, None, paths.IDENTITY, error)


def _of_artifact(store: Path | Bucket, kind: str, key: str) -> Iterator[Damage]:
    try:
        artifact = listing.open_in(store, kind, key)
    except MissingArtifact:  # removed since it was listed
        return
    except UNSOUND as error:
        yield _damage(kind, key, None, paths.IDENTITY, error)
        return
    if isinstance(artifact, Artifact):
        yield from _claims(artifact)
    if artifact.read(paths.IDENTITY) != file_text(artifact.identity.to_json()).encode():
        yield Damage(kind, key, None, paths.IDENTITY, f"{artifact.folder}/{paths.IDENTITY} was edited")
    damages = [problem for part in sorted(artifact.standing().made) if (problem := _part(artifact, part)) is not None]
    yield from damages
    damage = None if damages else _manifest(artifact)
    if damage is not None:
        yield damage


def _claims(artifact: Artifact) -> Iterator[Damage]:
    """Yield claims that no worker can take: the claim file is not a plain file."""
    for part in sorted(paths.parts_named("\n".join(artifact.names()), paths.CLAIM)):
        path = artifact.folder / paths.claim_name(part)
        if (kind := kind_of(path)) != A_PLAIN_FILE and os.path.lexists(path):
            yield Damage(artifact.kind, artifact.key, part, path.name, f"{path} is {kind}, not a plain file")


def _damage(kind: str, key: str, part: int | None, name: str, error: Exception) -> Damage:
    return Damage(kind, key, part, name, str(error), isinstance(error, (NewerSchema, OSError)))


def _part(artifact: StoredArtifact, part: int) -> Damage | None:
    """Check a part. A living run may drop, prune or rebuild it meanwhile: then it is checked again."""
    seen, damage = None, None
    while (name_and_text := _commit_of(artifact, part)) is not None:
        if name_and_text == seen:
            return damage
        seen = name_and_text
        name, text = name_and_text
        try:
            if isinstance(text, str):
                raise DamagedPart(text)
            _check_part(artifact, part, name, text)
        except (*UNSOUND, OSError) as error:
            damage = _damage(artifact.kind, artifact.key, part, name, error)
        else:
            return None
    return None


def _commit_of(artifact: StoredArtifact, part: int) -> tuple[str, bytes | str] | None:
    """Return name and text of a part's marker or tombstone, or the problem if it is not a plain file."""
    for name in (paths.marker_name(part), paths.tombstone_name(part)):
        with suppress(FileNotFoundError):
            try:
                return name, artifact.read(name)
            except DamagedPart as error:
                return name, str(error)
    return None


def _check_part(artifact: StoredArtifact, part: int, name: str, text: bytes) -> None:
    """Check a part whose marker, or tombstone, is ``name``. Raises one of UNSOUND for the first problem."""
    artifact.verify_part(part)
    marker = artifact.remains(part)
    if text != marker_text(marker, artifact.kind, artifact.key).encode():
        raise DamagedPart(f"{artifact.folder}/{name} was edited. `eopd store verify --repair` re-queues the part.")
    if marker.set_aside is not None:
        raise DamagedPart(f"{artifact} part {part} was set aside, and holds nothing: {marker.set_aside}")


def _manifest(artifact: StoredArtifact) -> Damage | None:
    """Check the manifest, which a complete artifact has. It is checked again if a part changed meanwhile."""
    seen, damage = None, None
    while artifact.has(paths.MANIFEST) or _lacks_manifest(artifact):
        if (standing := artifact.standing()) == seen:
            return damage
        seen = standing
        damage = _manifest_damage(artifact)
        if damage is None:
            return None
    return None


def _lacks_manifest(artifact: StoredArtifact) -> bool:
    """True if every part is committed and no manifest follows: a writer has a moment for it after its last commit."""
    for _ in range(_MANIFEST_POLLS):
        if not artifact.is_complete():
            return False
        if artifact.has(paths.MANIFEST):
            return True  # it was written meanwhile, and is checked like any other
        time.sleep(_MANIFEST_POLL_SECONDS)
    return True


def _manifest_damage(artifact: StoredArtifact) -> Damage | None:
    path = f"{artifact.folder}/{paths.MANIFEST}"
    try:
        # pruning says so here last of all: a kill before that leaves a manifest that names fewer parts
        named = artifact.pruned() & set(artifact.manifest.get("pruned_parts", ()))
        sound = artifact.read(paths.MANIFEST) == file_text(artifact.manifest_content(named)).encode()
        problem = "" if sound else f"{path} is not what the markers add up to"
    except NewerSchema as error:
        return _damage(artifact.kind, artifact.key, None, paths.MANIFEST, error)
    except MissingPart as error:
        if artifact.has(paths.MANIFEST):
            problem = f"{path} lists a part whose marker is gone: {error}"
        else:
            problem = f"{path} is gone, though every part is committed; `eopd store verify --repair` writes it again"
    except UNSOUND as error:
        problem = str(error)
    except FileNotFoundError:
        problem = f"{path} went while it was looked at"
    return Damage(artifact.kind, artifact.key, None, paths.MANIFEST, problem) if problem else None


def _without_identity(store: Path | Bucket, kind: str, key: str) -> Damage:
    """Report a folder with committed parts and no identity."""
    lost = _identity_in_manifest(store, kind, key) is None
    remedy = (
        "a commit of a missing part writes it again, or a copy from a store that has it; without either, remove the "
        "folder, and `eopd run` makes it again"
        if lost
        else "`eopd store verify --repair` writes it again"
    )
    problem = f"{_at(store, kind, key)}/{paths.IDENTITY} is gone; {remedy}"
    return Damage(kind, key, None, paths.IDENTITY, problem, beyond_repair=lost)


def _at(store: Path | Bucket, kind: str, key: str) -> str:
    return str(store / kind / key) if isinstance(store, Path) else f"{kind}/{key}"


def _identity_in_manifest(store: Path | Bucket, kind: str, key: str) -> Identity | None:
    """Return the identity with which a manifest begins."""
    try:
        text = _read(store, f"{kind}/{key}", paths.MANIFEST)
        return parse_identity(text, kind, key, f"{_at(store, kind, key)}/{paths.MANIFEST}")
    except (FileNotFoundError, *UNSOUND):
        return None


def _restore_identity(store: Path | Bucket, kind: str, key: str) -> None:
    identity = _identity_in_manifest(store, kind, key)
    if identity is not None:
        artifact = Artifact(store, identity) if isinstance(store, Path) else _remote(store, kind, key)
        artifact.create(paths.IDENTITY, file_text(identity.to_json()))


def _repair(store: Path | Bucket, kind: str, key: str, damages: Sequence[Damage]) -> None:
    """Repair one artifact as far as possible; files of a newer eopd are left alone."""
    if any(damage.beyond_repair for damage in damages if damage.part is None):
        return
    for damage in damages:
        if damage.name == paths.IDENTITY:
            _mend_identity(store, kind, key)
        elif not damage.beyond_repair:
            _set_aside(store, damage)
    if any(damage.beyond_repair for damage in damages):
        return
    with suppress(MissingArtifact):  # its identity was set aside, and nothing else identifies it
        listing.open_in(store, kind, key).finish()


def _mend_identity(store: Path | Bucket, kind: str, key: str) -> None:
    aside = f"{paths.IDENTITY}.{secrets.token_hex(8)}.damaged"
    try:
        artifact = listing.open_in(store, kind, key)
    except UNSOUND:
        _rename(store, f"{kind}/{key}", paths.IDENTITY, aside)
        _restore_identity(store, kind, key)
    else:  # only white space differs
        artifact.create(aside, artifact.read(paths.IDENTITY).decode(errors="replace"))
        artifact.replace(paths.IDENTITY, file_text(artifact.identity.to_json()))


def _set_aside(store: Path | Bucket, damage: Damage) -> None:
    nonce = secrets.token_hex(8)
    if damage.part is not None:
        _rename(store, damage.folder, damage.name, paths.damaged_name(damage.part, nonce))
    # with a part: the manifest lists the parts to be done again
    _rename(store, damage.folder, paths.MANIFEST, f"{paths.MANIFEST}.{nonce}.damaged")


def _remote(store: Bucket, kind: str, key: str) -> RemoteArtifact:
    from eopd.storage.remote import RemoteArtifact

    return RemoteArtifact(store, kind, key)


def _read(store: Path | Bucket, folder: str, name: str) -> bytes:
    """Raises FileNotFoundError."""
    if isinstance(store, Path):
        refuse_links(store, *folder.split("/"))
        return read_plain(store / folder / name)
    from eopd.storage.remote import get

    return get(store, f"{folder}/{name}")


def _rename(store: Path | Bucket, folder: str, name: str, to: str) -> None:
    """Rename a file; a missing file is ignored."""
    if not isinstance(store, Path):
        from eopd.storage.remote import rename

        rename(store, f"{folder}/{name}", f"{folder}/{to}")
        return
    refuse_links(store, *folder.split("/"))
    if os.path.lexists(store / folder / name):
        os.replace(store / folder / name, store / folder / to)
        fsync_folder(store / folder)
