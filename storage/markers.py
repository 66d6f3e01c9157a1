"""Texts of a store: writing and parsing identities, commit markers and manifests.

A marker is the commit record of a part: it names the nonce of the part's folder, every file's size and SHA-256, and
the checksums of the input parts, and carries a seal over all of that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from eopd.storage import paths
from eopd.storage.errors import DamagedPart, NewerSchema, WrongArtifact
from eopd.storage.files import canonical_json, sha256_text
from eopd.storage.untrusted import naming, parse_json

SCHEMA = 1
REPAIR = "`eopd store verify --repair` re-queues it."
LONGEST_NAME, LONGEST_PIECE = 1024, 255  # bytes of a path below a part's folder, and of a name in it
REMADE = "`eopd run` makes it again if something that is not done needs it."


Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Entry(TypedDict):
    size: Count
    sha256: str


class _Pruned(TypedDict):
    bytes: Count
    checksum: str


class _Info(TypedDict, total=False):
    """The fields of a marker's ``info`` that other modules read. Stages may add more."""

    set_aside: str
    pruned: _Pruned
    responses: Count | str  # of an alignment: whose they are
    tokens: Count


class _MarkerText(TypedDict):
    schema: int
    kind: str
    key: str
    part: Count
    nonce: str
    checksum: str
    seal: str
    files: dict[str, _Entry]
    inputs: dict[str, str]
    info: _Info


_MARKER = TypeAdapter(_MarkerText)


@dataclass(frozen=True)
class Marker:
    """The commit record of a part."""

    part: int
    nonce: str
    files: Mapping[str, Mapping[str, Any]]  # relative path -> {"size": bytes, "sha256": hex}
    inputs: Mapping[str, str]
    info: Mapping[str, Any]

    @cached_property
    def checksum(self) -> str:
        """Checksum of the part's content: file names, sizes and hashes, without the nonce."""
        return sha256_text(canonical_json(self.files))

    @property
    def set_aside(self) -> str | None:
        """Why the part was set aside: it could not be made, and the run continued without it. None: it holds data."""
        reason = self.info.get("set_aside")
        return None if reason is None else str(reason)

    @property
    def is_pruned(self) -> bool:
        """True for the tombstone of a pruned part."""
        return "pruned" in self.info

    @property
    def file_name(self) -> str:
        """Name of the file that commits the part."""
        return paths.tombstone_name(self.part) if self.is_pruned else paths.marker_name(self.part)

    @property
    def bytes(self) -> int:
        return sum(int(entry["size"]) for entry in self.files.values())

    @property
    def committed_checksum(self) -> str:
        """``checksum``; for a pruned part, the checksum of the complete part."""
        return str(self.info["pruned"]["checksum"]) if self.is_pruned else self.checksum

    @property
    def committed_bytes(self) -> int:
        """``bytes``; for a pruned part, the bytes of the complete part."""
        return int(self.info["pruned"]["bytes"]) if self.is_pruned else self.bytes


def file_text(content: Mapping[str, Any]) -> str:
    """Return the canonical text of an identity, marker or manifest: `verify` compares files with it byte by byte."""
    return json.dumps(content, indent=1, sort_keys=True)


def marker_text(marker: Marker, kind: str, key: str) -> str:
    content = {
        "schema": SCHEMA,
        "kind": kind,
        "key": key,
        "part": marker.part,
        "nonce": marker.nonce,
        "checksum": marker.checksum,
        "files": marker.files,
        "inputs": marker.inputs,
        "info": marker.info,
    }
    # the seal covers the whole marker; `checksum` only what the part holds
    return file_text({**content, "seal": sha256_text(canonical_json(content))})


def parse_marker(text: bytes, kind: str, key: str, part: int, where: str) -> Marker:
    """Parse and check the marker of part ``part`` of ``kind``/``key``.

    Raises:
        DamagedPart: it was altered, or names a path outside its part folder.
        WrongArtifact: it belongs to another part.
        NewerSchema: a newer eopd wrote it.
    """
    with naming(where, REPAIR):
        fields = parse_json(text)
        refuse_newer_schema(fields, Path(where))
        _MARKER.validate_python(fields, strict=True)
    marker = Marker(fields["part"], fields["nonce"], fields["files"], fields["inputs"], fields["info"])
    owner = (fields["kind"], fields["key"], marker.part)
    if owner != (kind, key, part):
        raise WrongArtifact(
            f"{where} is the marker of {owner[0]}/{owner[1]} part {owner[2]}, not of {kind}/{key} {part}",
            file=where,
            artifact=f"{kind}/{key}",
            part=part,
        )
    if paths.data_part(paths.data_name(part, marker.nonce)) is None:
        raise DamagedPart(
            f"{where}: nonce {marker.nonce!r} names a path outside the artifact",
            file=where,
            artifact=f"{kind}/{key}",
            part=part,
        )
    if any(not _is_inside(name) for name in marker.files):
        raise DamagedPart(
            f"{where} names a file outside its part folder", file=where, artifact=f"{kind}/{key}", part=part
        )
    seal = fields.pop("seal")
    if fields["checksum"] != marker.checksum or seal != sha256_text(canonical_json(fields)):
        raise DamagedPart(f"{where} was altered", file=where, artifact=f"{kind}/{key}", part=part, remedy=REPAIR)
    return marker


def refuse_newer_schema(version: Any, where: Path) -> None:
    schema = version.get("schema") if isinstance(version, dict) else None
    if type(schema) is not int or schema < 1:
        raise DamagedPart(f"{where} names no schema version", file=where)
    if schema > SCHEMA:
        raise NewerSchema(
            f"{where} has schema {schema}; this eopd reads up to {SCHEMA}", file=where, remedy="Upgrade eopd to use it."
        )


def _is_inside(name: str) -> bool:
    pieces = name.split("/")
    if not name.isprintable() or "\\" in name or len(name.encode()) > LONGEST_NAME:
        return False
    return not {"", ".", ".."} & set(pieces) and all(len(piece.encode()) <= LONGEST_PIECE for piece in pieces)
