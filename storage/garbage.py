"""Garbage collection for `eopd store gc`: first a plan, then removal of exactly that plan.

Roots are the artifacts that runs refer to; the artifacts they were made from are kept too. Besides unreachable
artifacts, garbage is: folders that no marker names (of a killed worker or a repaired part), set-aside markers,
half-written temporary files and downloads from buckets. Artifacts claimed by living workers are kept with all their
inputs, and so are recent changes. Only the named store is examined, not the read-only stores behind it.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.storage import paths
from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.claims import may_be_held
from eopd.storage.errors import MissingPart, StoreError
from eopd.storage.files import fsync_folder, replace_atomically
from eopd.storage.listing import keys, open_in
from eopd.storage.markers import marker_text
from eopd.storage.untrusted import walk

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket

GRACE_SECONDS = 3600.0


@dataclass(frozen=True)
class Removal:
    path: Path
    bytes: int
    reason: str


def reachable(store: Path | Bucket, roots: Collection[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return roots (kind, key) and all artifacts they were made from, through the input keys of identities."""
    by_key: dict[str, list[tuple[str, str]]] = {}
    for kind, key in keys(store):
        by_key.setdefault(key, []).append((kind, key))
        by_key.setdefault(key.split("/")[0], []).append((kind, key))  # any coverage of a named identity
    kept: set[tuple[str, str]] = set()
    waiting = [artifact for root in roots for artifact in by_key.get(root[1], []) if artifact[0] == root[0]]
    while waiting:
        here = waiting.pop()
        if here in kept:
            continue
        kept.add(here)
        try:
            identity = open_in(store, *here).identity
        except StoreError:
            continue  # unreadable, and so are its inputs' keys; verify reports it
        side = str((identity.coverage or {}).get("extra"))  # the student's own top-k, beside the rollouts
        for made_of in (*identity.inputs.values(), side):
            waiting += by_key.get(made_of, [])
    return kept


def plan(
    store: Path, roots: Collection[tuple[str, str]] | None, *, grace: float = GRACE_SECONDS, now: float | None = None
) -> list[Removal]:
    """List what may be removed, without changing anything.

    Args:
        roots: (kind, key) that runs refer to; None keeps every artifact and looks for left-overs only.
        grace: seconds; what was changed more recently is kept, as is what a living worker has claimed.
    """
    now = time.time() if now is None else now
    everything = set(keys(store))
    kept = everything
    if roots is not None:
        kept = reachable(store, roots)
        unwanted = everything - kept
        claimed = {(kind, key) for kind, key in unwanted if any(map(may_be_held, _claims(store / kind / key)))}
        kept = kept | reachable(store, claimed) if claimed else kept
    removals: list[Removal] = []
    for kind, key in sorted(everything):
        folder = store / kind / key
        if (kind, key) in kept:
            removals += _leftovers(store, kind, key, now - grace)
        elif _last_change(folder) < now - grace:
            removals.append(Removal(folder, _size(folder), "no run refers to it"))
    is_here = not (store / paths.FETCHED).is_symlink()  # elsewhere, it is not this store's to remove
    for kind, key in keys(store / paths.FETCHED) if is_here else ():
        folder = store / paths.FETCHED / kind / key
        if _last_change(folder) < now - grace:
            removals.append(Removal(folder, _size(folder), "fetched from a bucket; comes again when it is needed"))
    return removals


def _leftovers(store: Path, kind: str, key: str, before: float) -> Iterator[Removal]:
    folder = store / kind / key
    try:
        artifact = open_artifact(store, kind, key)
    except StoreError:
        return
    pruned = artifact.pruned()
    for name in sorted(artifact.names()):
        path = folder / name
        data = paths.data_part(name)
        tombstone = paths.tombstone_part(name)
        if data is not None and not artifact.names_data(*data):
            reason = "no marker names it"
        elif data is not None and data[0] in pruned:
            yield from _after_pruning(artifact, data[0], before)
            continue
        elif tombstone is not None and artifact.is_committed(tombstone):
            reason = "of a part that was made again"
        elif name.endswith(".damaged"):
            reason = "set aside by a repair"
        elif name.startswith(".") and (path.is_symlink() or not path.is_dir()):
            reason = "half-written"
        else:
            continue
        claimed = data is not None and may_be_held(folder / paths.claim_name(data[0]))
        if not claimed and _last_change(path) < before:
            yield Removal(path, _size(path), reason)


def _after_pruning(artifact: Artifact, part: int, before: float) -> Iterator[Removal]:
    try:
        paths_left = left_over(artifact, part)
    except StoreError:
        return  # it is unknown what must stay; verify reports it
    for path in paths_left:
        if _last_change(path) < before:
            yield Removal(path, _size(path), "left by an interrupted pruning")


def _claims(folder: Path) -> Iterator[Path]:
    return iter(()) if folder.is_symlink() else folder.glob(f"part-*{paths.CLAIM}")


@dataclass(frozen=True)
class Removed:
    """The result of carrying out a plan."""

    bytes: int  # that are gone
    stayed: tuple[str, ...]  # what could not be removed, and why


def remove(removals: Sequence[Removal]) -> Removed:
    """Carry out a plan. Files that have vanished meanwhile are skipped."""
    freed, stayed = 0, []
    for removal in removals:
        try:
            _remove(removal.path)
        except FileNotFoundError:
            continue
        except OSError as error:
            stayed.append(f"{error.filename or removal.path}: {error.strerror}")
        freed += max(removal.bytes - _size(removal.path), 0)
    return Removed(freed, tuple(stayed))


def _remove(path: Path) -> None:
    """Remove a path as far as possible. Raises the first error."""
    if not path.is_dir() or path.is_symlink():
        path.unlink()
        return
    # markers first: a reader must not find a marker whose data are going
    for pattern in ("part-*.json", "part-*.pruned"):
        for marker in path.glob(pattern):
            marker.unlink(missing_ok=True)
    errors: list[BaseException] = []
    try:
        shutil.rmtree(path, onerror=lambda function, name, error: errors.append(error[1]))
    except RecursionError:
        raise OSError(errno.ENAMETOOLONG, "folders are nested too deep; remove them by hand", str(path)) from None
    for error in errors:
        if not isinstance(error, FileNotFoundError):
            raise error


def _size(path: Path) -> int:
    return sum(status.st_size for status in _files(path) if not stat.S_ISDIR(status.st_mode))


def _last_change(path: Path) -> float:
    """Return the time of the latest change below a path; infinity if it has vanished meanwhile."""
    return max((status.st_mtime for status in _files(path)), default=math.inf)


def _files(path: Path) -> Iterator[os.stat_result]:
    """Yield the status of ``path`` and, if it is a folder, of everything in it; vanished entries are skipped."""
    names = [str(path)] if path.is_symlink() else [str(path), *(entry.path for entry in walk(path))]
    for name in names:
        with suppress(FileNotFoundError):
            yield os.lstat(name)


# -- pruning ----------------------------------------------------------------------------------------------------------

# Pruning: dropping the data of committed parts that nothing needs any more, and reviving such parts.
#
# A pruned part has a tombstone, ``part-00001.pruned``, in its marker's place: the marker as it was, but naming only
# the files that stay (small ones that people still read), with the size and checksum of what was there. Four steps:
# the tombstone is written, the marker goes, the data go, the manifest says so. A kill before the second leaves the
# part as committed as ever; after it the part is pruned, and what is left to do is done by the next ``prune`` or
# `eopd store gc`.
#
# What may go is the pipeline's to decide (``eopd.pipeline.retention``).


def prune(artifact: Artifact, part: int, dropped: Callable[[str], bool]) -> int:
    """Drop the files of a part whose names are ``dropped``; returns their bytes.

    A part that is pruned already may lose more. A part of which nothing is dropped stays as it is.

    Raises:
        MissingPart: it was never committed.
    """
    marker = artifact.remains(part)
    kept = {name: entry for name, entry in marker.files.items() if not dropped(name)}
    freed = 0
    if len(kept) < len(marker.files):
        was = {"bytes": marker.committed_bytes, "checksum": marker.committed_checksum}
        tombstone = replace(marker, files=kept, info={**marker.info, "pruned": was})
        text = marker_text(tombstone, artifact.kind, artifact.key)
        replace_atomically(artifact.folder / paths.tombstone_name(part), text)
        freed = marker.bytes - tombstone.bytes
        (artifact.folder / paths.marker_name(part)).unlink(missing_ok=True)
        fsync_folder(artifact.folder)
    if part in artifact.pruned():  # also when a kill left it half done
        for path in left_over(artifact, part):
            path.unlink(missing_ok=True)
        artifact.renew_manifest()
    return freed


def left_over(artifact: Artifact, part: int) -> list[Path]:
    """List files in a pruned part's folder that an interrupted pruning has left."""
    marker = artifact.remains(part)
    folder = artifact.folder / paths.data_name(part, marker.nonce)
    return [folder / name for name in sorted(artifact.names_there(marker) - set(marker.files))]


def revive(artifact: Artifact, part: int) -> None:
    """Make a pruned part missing, so that the stage that makes it does so again.

    Nothing happens where another process was first, or has made it again. Several may do this at a time.
    """
    try:
        nonce = artifact.tombstone(part).nonce
    except MissingPart:
        return
    if artifact.is_committed(part):
        return
    (artifact.folder / paths.MANIFEST).unlink(missing_ok=True)
    (artifact.folder / paths.tombstone_name(part)).unlink(missing_ok=True)
    fsync_folder(artifact.folder)
    shutil.rmtree(artifact.folder / paths.data_name(part, nonce), ignore_errors=True)
