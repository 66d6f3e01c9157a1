"""Every byte of a store against what was committed. For `eopd store verify` and `verify --repair`.

Parts: each file's size and SHA-256 against the marker. Markers: their own seal. Identities: they hash to their key.
Manifests: what the markers add up to. Of a pruned part, the files that were kept. Markers, identities and manifests
have one text each, so a changed blank shows.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from eopd.storage import paths
from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.errors import DamagedPart, MissingPart, StoreError
from eopd.storage.files import fsync_folder
from eopd.storage.listing import keys
from eopd.storage.markers import file_text, marker_text


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was committed."""

    kind: str
    key: str
    part: int | None  # None: the identity or the manifest
    path: Path  # what `repair` renames
    problem: str


def verify(store: Path, only: Sequence[tuple[str, str]] | None = None, *, repair: bool = False) -> list[Damage]:
    """Check every artifact of a store, or ``only`` those (kind, key).

    ``repair`` renames the marker of each damaged part to ``.damaged``, so that the next plan does it again, and
    damaged identities and manifests, which the next commit writes again. It deletes nothing (`gc` does).
    """
    found = list(_without_identity(store)) if only is None else []
    for kind, key in keys(store) if only is None else only:
        damages = list(_artifact(store, kind, key))
        if repair:
            for damage in damages:
                _set_aside(damage)
            if damages and (store / kind / key / paths.IDENTITY).exists():
                open_artifact(store, kind, key).finish()
        found += damages
    return found


def _artifact(store: Path, kind: str, key: str) -> Iterator[Damage]:
    folder = store / kind / key
    try:
        artifact = open_artifact(store, kind, key)
    except (StoreError, UnicodeDecodeError) as error:
        yield Damage(kind, key, None, folder / paths.IDENTITY, str(error))
        return
    if (folder / paths.IDENTITY).read_text("utf-8") != file_text(artifact.identity.to_json()):
        yield Damage(kind, key, None, folder / paths.IDENTITY, f"{folder / paths.IDENTITY} was edited")
    damaged = False
    committed, pruned = artifact.committed(), artifact.pruned()
    for part in sorted(committed | pruned):
        name = paths.marker_name(part) if part in committed else paths.tombstone_name(part)
        try:
            check_part(artifact, part)
        except StoreError as error:
            damaged = True
            yield Damage(kind, key, part, folder / name, str(error))
    if not damaged:
        yield from _manifest(artifact)


def check_part(artifact: Artifact, part: int) -> None:
    """Raises StoreError naming the first thing wrong with a committed part, or with what is left of a pruned one."""
    artifact.verify_part(part)
    pruned = not artifact.is_committed(part)
    path = artifact.folder / (paths.tombstone_name(part) if pruned else paths.marker_name(part))
    marker = artifact.remains(part)
    if path.read_text("utf-8") != marker_text(marker, artifact.kind, artifact.key):
        raise DamagedPart(f"{path} was edited. `eopd store verify --repair` re-queues the part.")
    if marker.set_aside is not None:
        raise DamagedPart(f"{artifact} part {part} was set aside, and holds nothing: {marker.set_aside}")
    if pruned:
        return  # what a kill kept from going is no damage: `gc` names it
    folder = artifact.folder / paths.data_name(part, marker.nonce)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if strangers := sorted(there - set(marker.files)):
        raise DamagedPart(f"{artifact} part {part}: {strangers[0]} was added to {folder}")


def _manifest(artifact: Artifact) -> Iterator[Damage]:
    path = artifact.folder / paths.MANIFEST
    problem = ""
    if path.exists():
        try:
            # pruning says so here last of all: a kill before that leaves a manifest that names fewer parts
            named = artifact.pruned() & set(artifact.manifest.get("pruned_parts", ()))
            if path.read_text("utf-8") != file_text(artifact.manifest_content(named)):
                problem = f"{path} is not what the markers add up to"
        except MissingPart as error:
            problem = f"{path} lists a part whose marker is gone: {error}"
        except StoreError as error:
            problem = f"{path}: {error}"
        except ValueError:  # not UTF-8, or not JSON
            problem = f"{path} is not JSON: cut or edited"
    elif artifact.is_complete():
        problem = f"{path} is gone"
    if problem:
        yield Damage(artifact.kind, artifact.key, None, path, problem)


def _without_identity(store: Path) -> Iterator[Damage]:
    """Folders with committed parts and nothing that says what they are."""
    for kind in paths.KINDS:
        markers = [f"{depth}/part-*.{end}" for depth in ("*", "*/*") for end in ("json", "pruned")]
        folders = {path.parent for pattern in markers for path in (store / kind).glob(pattern)}
        for folder in sorted(folders):
            if not (folder / paths.IDENTITY).exists():
                key = folder.relative_to(store / kind).as_posix()
                problem = f"{folder / paths.IDENTITY} is gone; the next commit, or a copy, writes it again"
                yield Damage(kind, key, None, folder / paths.IDENTITY, problem)


def _set_aside(damage: Damage) -> None:
    if damage.part is None:
        target = damage.path.with_name(f"{damage.path.name}.{secrets.token_hex(8)}.damaged")
    else:
        target = damage.path.with_name(paths.damaged_name(damage.part, secrets.token_hex(8)))
    if damage.path.exists():
        os.replace(damage.path, target)
    # the manifest lists a part that has to be done again
    manifest = damage.path.with_name(paths.MANIFEST)
    if damage.part is not None and manifest.exists():
        os.replace(manifest, manifest.with_name(f"{paths.MANIFEST}.{secrets.token_hex(8)}.damaged"))
    fsync_folder(damage.path.parent)
