"""Copies of artifacts between stores: folders and buckets, in any direction. For `eopd store copy`.

A copy follows the commit rule: files first, their bytes checked against the source's marker on the way, the marker
last and only if absent. So an interrupted copy is continued by running it again, and a copy is an artifact like any
other.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.storage import paths
from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.errors import DamagedPart, MissingArtifact, MissingPart, WrongArtifact
from eopd.storage.markers import Marker, file_text, marker_text
from eopd.storage.remote import RemoteArtifact, get, put, put_if_absent

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket


def copy(source: Artifact | RemoteArtifact, target: Path | Bucket, parts: Iterable[int] | None = None) -> list[int]:
    """Copy committed parts (all, or those named) that the target lacks; returns the parts copied.

    Raises:
        DamagedPart: the source's bytes are not what its marker says; that part is not copied.
        WrongArtifact: the target has the rollouts that these scores are of, with other bytes.
        StoreFull, StoreUnwritable: the target takes no more.
    """
    wanted = sorted(source.committed() if parts is None else parts)
    if isinstance(target, Path):
        return _to_folder(source, target, wanted)
    return _to_bucket(source, target, wanted)


def _to_folder(source: Artifact | RemoteArtifact, store: Path, wanted: list[int]) -> list[int]:
    target = Artifact(store, source.identity)
    copied = []
    for part in wanted:
        if target.is_committed(part):
            continue
        marker = source.marker(part)
        _refuse_other_rollouts(source, marker, lambda kind, key: open_artifact(store, kind, key))
        with target.write_part(part, inputs=marker.inputs, info=marker.info) as folder:
            for name in marker.files:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(_checked(source, part, marker, name))
        copied.append(part)
    return copied


def _to_bucket(source: Artifact | RemoteArtifact, bucket: Bucket, wanted: list[int]) -> list[int]:
    there = RemoteArtifact(bucket, source.kind, source.key)
    put_if_absent(bucket, f"{there.folder}/{paths.IDENTITY}", file_text(source.identity.to_json()).encode())
    done = there.committed()
    copied = []
    for part in wanted:
        if part in done:
            continue
        marker = source.marker(part)
        _refuse_other_rollouts(source, marker, partial(RemoteArtifact, bucket))
        fresh = Marker(part, secrets.token_hex(8), marker.files, marker.inputs, marker.info)
        for name in marker.files:
            content = _checked(source, part, marker, name)
            put(bucket, f"{there.folder}/{paths.data_name(part, fresh.nonce)}/{name}", content)
        if "set_aside" in fresh.info:
            put_if_absent(bucket, f"{there.folder}/{paths.set_aside_name(part)}", b"")
        text = marker_text(fresh, source.kind, source.key)
        if put_if_absent(bucket, f"{there.folder}/{paths.marker_name(part)}", text.encode()):
            copied.append(part)
    if len(there.committed()) == there.parts:
        sums: Mapping[str, str] = {str(part): there.marker(part).checksum for part in range(there.parts)}
        manifest = {**source.identity.to_json(), "key": source.key, "part_checksums": sums, "pruned": False}
        put_if_absent(bucket, f"{there.folder}/{paths.MANIFEST}", file_text(manifest).encode())
    return copied


def _refuse_other_rollouts(
    source: Artifact | RemoteArtifact, marker: Marker, there: Callable[[str, str], Artifact | RemoteArtifact]
) -> None:
    """Rollouts of one key may differ in bytes between stores (a GPU's do); scores of the one do not fit the other."""
    scored, key = marker.inputs.get("rollouts"), source.identity.inputs.get("rollouts")
    if scored is None or key is None:
        return
    try:
        found = there("rollouts", key).marker(marker.part)
    except (MissingArtifact, MissingPart):
        return
    if found.checksum != scored:
        raise WrongArtifact(
            f"{source} part {marker.part} was made from other rollouts than the target's: rollouts/{key} has other "
            "bytes there. Score the target's own, or copy to another store together with --inputs"
        )


def _checked(source: Artifact | RemoteArtifact, part: int, marker: Marker, name: str) -> bytes:
    inner = f"{paths.data_name(part, marker.nonce)}/{name}"
    try:
        if isinstance(source, Artifact):
            content = (source.part_folder(part) / name).read_bytes()
        else:
            content = get(source.bucket, f"{source.folder}/{inner}")
    except FileNotFoundError as error:
        raise DamagedPart(f"{source} part {part}: {name} is gone") from error
    if hashlib.sha256(content).hexdigest() != marker.files[name]["sha256"]:
        raise DamagedPart(f"{source} part {part}: the bytes of {name} changed. Run `eopd store verify` there.")
    return content
