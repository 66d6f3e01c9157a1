"""Copying of artifacts between stores, folders and buckets alike. For `eopd store copy`.

A copy follows the commit rule: files first, their bytes checked against the source's marker on the way, the marker last
and only if absent. So running an interrupted copy again continues it, and a copy is an artifact like any other. A
pruned part is copied as it stands: its remains, then its tombstone.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.storage import paths
from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.errors import MissingArtifact, MissingPart, WrongArtifact
from eopd.storage.markers import Marker, file_text, marker_text
from eopd.storage.remote import WRITE_BYTES, RemoteArtifact, put
from eopd.storage.stored import StoredArtifact

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket


def copy(source: StoredArtifact, target: Path | Bucket, parts: Iterable[int] | None = None) -> list[int]:
    """Copy the parts (all, or those named) that the target lacks; returns the copied parts.

    What the target has pruned it lacks if the source has it whole: the copy is beside its tombstone then, and wins.

    Raises:
        DamagedPart: the source's bytes are not what its marker says; that part is not copied.
        WrongArtifact: the target has the rollouts that these scores are of, with other bytes.
        StoreFull, StoreUnwritable: the target takes no more.
    """
    wanted = source.standing().made if parts is None else set(parts)
    if isinstance(target, Path):
        return _to_folder(source, target, wanted)
    return _to_bucket(source, target, wanted)


def _to_folder(source: StoredArtifact, store: Path, wanted: set[int]) -> list[int]:
    target = Artifact(store, source.identity)
    target.begin()
    copied = []
    for marker in _lacking(source, target, wanted):
        _refuse_other_rollouts(source, marker, lambda kind, key: open_artifact(store, kind, key))
        with target.write_part(marker.part, inputs=marker.inputs, info=marker.info) as folder:
            for name in marker.files:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    file.writelines(source.checked(marker, name))
        copied.append(marker.part)
    target.renew_manifest()
    return copied


def _to_bucket(source: StoredArtifact, bucket: Bucket, wanted: set[int]) -> list[int]:
    target = RemoteArtifact(bucket, source.kind, source.key)
    target.create(paths.IDENTITY, file_text(source.identity.to_json()))
    copied = []
    for marker in _lacking(source, target, wanted):
        _refuse_other_rollouts(source, marker, partial(RemoteArtifact, bucket))
        fresh = replace(marker, nonce=secrets.token_hex(8))
        for name in marker.files:
            path = f"{target.folder}/{paths.data_name(marker.part, fresh.nonce)}/{name}"
            pieces = source.checked(marker, name)
            small = int(marker.files[name]["size"]) <= WRITE_BYTES  # one request instead of three
            put(bucket, path, b"".join(pieces) if small else pieces)
        if fresh.set_aside is not None:
            target.create(paths.set_aside_name(marker.part), "")
        if target.create(fresh.file_name, marker_text(fresh, source.kind, source.key)):
            copied.append(marker.part)
    target.renew_manifest()
    return copied


def _lacking(source: StoredArtifact, target: StoredArtifact, wanted: set[int]) -> Iterator[Marker]:
    """Return the source's markers of parts that the target lacks, or has only pruned while the source has them
    complete."""
    there = target.standing()
    for part in sorted(wanted - there.committed):
        marker = source.remains(part)
        if not (marker.is_pruned and part in there.pruned):
            if isinstance(source, Artifact):
                source.part_names(marker)  # all are there, and plain files
            yield marker


def _refuse_other_rollouts(source: StoredArtifact, marker: Marker, there: Callable[[str, str], StoredArtifact]) -> None:
    """Refuse scores for other rollouts: rollouts of one key may differ in bytes between stores (a GPU's do)."""
    scored, key = marker.inputs.get("rollouts"), source.identity.inputs.get("rollouts")
    if scored is None or key is None:
        return
    try:
        marker_there = there("rollouts", key).marker(marker.part)
    except (MissingArtifact, MissingPart):
        return
    if marker_there.checksum != scored:
        raise WrongArtifact(
            f"{source} part {marker.part} was made from other rollouts than the target's: rollouts/{key} has other "
            "bytes there",
            **source.place(marker.part),
            remedy="Score the target's own, or copy to another store together with --inputs",
        )
