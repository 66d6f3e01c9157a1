"""Pruning: dropping the data of committed parts that nothing needs any more, and reviving such parts.

A pruned part has a tombstone, ``part-00001.pruned``, in its marker's place: the marker as it was, but naming only the
files that stay (small ones that people still read), with the size and checksum of what was there. Four steps: the
tombstone is written, the marker goes, the data go, the manifest says so. A kill before the second leaves the part as
committed as ever; after it the part is pruned, and what is left to do is done by the next ``prune`` or `eopd store gc`.

What may go is the pipeline's to decide (``eopd.pipeline.retention``).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from eopd.storage import paths
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import MissingPart
from eopd.storage.files import fsync_folder, replace_atomically
from eopd.storage.markers import marker_text


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
