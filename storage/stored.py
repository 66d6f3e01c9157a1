"""One artifact of a store, be that a folder (``artifacts.Artifact``) or a bucket (``remote.RemoteArtifact``).

What stands in it, what its parts are and whether they are sound follows from the names and texts in the artifact's
folder and the bytes of its parts' files. How these are come by is all that the two kinds of store differ in.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from eopd.storage import paths
from eopd.storage.errors import DamagedPart, MissingPart, PrunedPart, StoredPlace
from eopd.storage.identity import Identity
from eopd.storage.markers import REMADE, REPAIR, Marker, file_text, parse_marker, refuse_newer_schema
from eopd.storage.untrusted import naming, parse_json


@dataclass(frozen=True)
class Standing:
    """State of all parts from one listing of an artifact's folder: sets of part numbers."""

    committed: set[int]
    pruned: set[int]  # committed once, and pruned since
    hinted: set[int]  # committed empty, perhaps: the marker knows (``StoredArtifact.reasons_aside``)

    @property
    def made(self) -> set[int]:
        return self.committed | self.pruned


class StoredArtifact(ABC):
    """An artifact in a folder or a bucket; files are read on demand. Buckets also raise StoreUnreadable and
    StoreUnwritable (no permission)."""

    kind: str
    key: str
    folder: Path | str  # in a bucket: from its root

    def place(self, part: int | None = None) -> StoredPlace:
        """Return the fields by which errors name this artifact, or a part of it."""
        return {"artifact": f"{self.kind}/{self.key}", "part": part}

    def damage(self, part: int, name: str, problem: str) -> DamagedPart:
        """Return an error about a file of a committed part."""
        return DamagedPart(f"{self} part {part}: {problem}", file=name, remedy=REPAIR, **self.place(part))

    # -- primitives of a store ---------------------------------------------------------------------------------

    @property
    @abstractmethod
    def identity(self) -> Identity:
        """Raises, in a bucket, MissingArtifact, DamagedPart, WrongArtifact or NewerSchema."""

    @abstractmethod
    def names(self) -> list[str]:
        """List the artifact's files, and possibly parts' folders; empty if there is no folder."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """True if the artifact's folder holds a file of this name."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A file of the artifact's folder. Raises FileNotFoundError; DamagedPart where it is no plain file."""

    @abstractmethod
    def create(self, name: str, text: str) -> bool:
        """Create a file in the artifact's folder atomically. Returns False if it exists already."""

    @abstractmethod
    def replace(self, name: str, text: str) -> None:
        """Write a file of the artifact's folder, so that a reader sees the old text or the new."""

    @abstractmethod
    def part_names(self, marker: Marker) -> set[str]:
        """List all files in a part's folder, expected or not.

        Raises:
            DamagedPart: one that the marker names is gone, has another size, or is no plain file.
        """

    @abstractmethod
    def pieces(self, marker: Marker, name: str) -> Iterator[bytes]:
        """Read a file of a part in pieces. Raises FileNotFoundError."""

    @property
    def parts(self) -> int:
        return self.identity.parts

    # -- state -------------------------------------------------------------------------------------------------

    def is_committed(self, part: int) -> bool:
        return self.has(paths.marker_name(part))

    def _is_made(self, part: int) -> bool:
        return self.is_committed(part) or self.has(paths.tombstone_name(part))

    def standing(self) -> Standing:
        """Return every part's state from one listing. A part with a marker is committed, whatever else is there."""
        listing = "\n".join(self.names())
        parts = self.parts
        committed, pruned, hinted = (
            {part for part in paths.parts_named(listing, suffix) if part < parts}
            for suffix in (".json", ".pruned", ".set_aside")
        )
        return Standing(committed, pruned - committed, hinted)

    def committed(self) -> set[int]:
        """Return every part that can be read."""
        return self.standing().committed

    def pruned(self) -> set[int]:
        """Return parts that were committed and pruned since."""
        return self.standing().pruned

    def reasons_aside(self, standing: Standing | None = None) -> dict[int, str]:
        """Return parts that were set aside (``Artifact.set_aside``), with the reasons."""
        standing = standing or self.standing()
        reasons = {part: self.marker(part).set_aside for part in sorted(standing.hinted & standing.committed)}
        return {part: reason for part, reason in reasons.items() if reason is not None}

    def missing(self) -> list[int]:
        """Return parts that were never made or must be made again."""
        return list(self._missing())

    def first_missing(self, count: int = 8) -> list[int]:
        """Return the first parts of ``missing``, as the number of a training's resumable states is unbounded."""
        return list(islice(self._missing(), count))

    def _missing(self) -> Iterator[int]:
        made = self.standing().made
        return (part for part in range(self.parts) if part not in made)

    def is_complete(self) -> bool:
        """The one definition: every part was committed, and nothing is left to do.

        A part that was pruned since counts. Reading it raises ``PrunedPart``, and a plan that still has to read it
        revives it first (``storage.pruning.revive``), which makes it missing. The manifest is a convenience for people.
        """
        return len(self.standing().made) == self.parts

    # -- markers and manifest ----------------------------------------------------------------------------------

    def marker(self, part: int) -> Marker:
        """Raises MissingPart, PrunedPart, DamagedPart (not a marker), WrongArtifact or NewerSchema."""
        try:
            return self._marker(part, paths.marker_name(part))
        except FileNotFoundError as error:
            if self.has(paths.tombstone_name(part)):
                problem = f"{self} part {part} was pruned: its data are gone"
                raise PrunedPart(problem, remedy=REMADE, **self.place(part)) from error
            problem, remedy = f"{self} part {part} is not committed", "Run the stage that makes it."
            raise MissingPart(problem, remedy=remedy, **self.place(part)) from error

    def remains(self, part: int) -> Marker:
        """Return the marker of a committed part, or the tombstone of a pruned one."""
        try:
            return self.marker(part)
        except PrunedPart:
            return self.tombstone(part)

    def tombstone(self, part: int) -> Marker:
        """Return the tombstone of a pruned part. Raises as ``marker``; MissingPart if there is none."""
        try:
            return self._marker(part, paths.tombstone_name(part))
        except FileNotFoundError as error:
            problem = f"{self} part {part} has no tombstone: it was called back, or never pruned."
            raise MissingPart(problem, **self.place(part)) from error

    def _marker(self, part: int, name: str) -> Marker:
        return parse_marker(self.read(name), self.kind, self.key, part, f"{self.folder}/{name}")

    @property
    def manifest(self) -> dict[str, Any]:
        """Raises MissingPart (there is none yet), DamagedPart or NewerSchema."""
        where = f"{self.folder}/{paths.MANIFEST}"
        try:
            text = self.read(paths.MANIFEST)
        except FileNotFoundError as error:
            problem = f"{self} is not complete: parts {self.first_missing()} are missing"
            raise MissingPart(problem, **self.place()) from error
        with naming(where):
            fields = parse_json(text)
            refuse_newer_schema(fields, Path(where))
            TypeAdapter(list[int]).validate_python(fields.get("pruned_parts", []), strict=True)
        content: dict[str, Any] = fields
        return content

    def manifest_content(self, pruned: Collection[int] | None = None) -> dict[str, Any]:
        """Return the manifest's content; ``part_checksums`` are those at commit time, ``pruned`` the pruned parts."""
        named = self.pruned() if pruned is None else pruned
        sums = {str(part): self.remains(part).committed_checksum for part in range(self.parts)}
        content = {**self.identity.to_json(), "key": self.key, "part_checksums": sums, "pruned": bool(named)}
        return {**content, "pruned_parts": sorted(named)} if named else content

    def finish(self) -> None:
        """Write the manifest once every part is committed."""
        # one look at the last part first: who works through a thousand parts need not list all of them each time
        if not self._is_made(self.parts - 1) or self.has(paths.MANIFEST) or not self.is_complete():
            return
        self.create(paths.MANIFEST, file_text(self.manifest_content()))

    def renew_manifest(self) -> None:
        """Update the manifest of a complete artifact after a part was pruned or rebuilt."""
        if not self.is_complete():
            return
        text = file_text(self.manifest_content())
        if not self.has(paths.MANIFEST) or self.read(paths.MANIFEST) != text.encode():
            self.replace(paths.MANIFEST, text)

    # -- bytes -------------------------------------------------------------------------------------------------

    def verify_part(self, part: int) -> None:
        """Compare every byte of a part, or of its remains, with its marker; DamagedPart names the first bad file."""
        marker = self.remains(part)
        there = self.part_names(marker)
        for name in marker.files:
            for _ in self.checked(marker, name):
                pass
        strangers = sorted(there - set(marker.files))
        if strangers and not marker.is_pruned:  # files that an interrupted pruning left are no damage: `gc` lists them
            added_to = f"{self.folder}/{paths.data_name(part, marker.nonce)}"
            problem = f"{self} part {part}: {strangers[0]} was added to {added_to}"
            raise DamagedPart(problem, file=strangers[0], **self.place(part))

    def checked(self, marker: Marker, name: str) -> Iterator[bytes]:
        """Like ``pieces``, for a file that the marker names; DamagedPart follows the last piece if the hash differs."""
        digest = hashlib.sha256()
        try:
            for piece in self.pieces(marker, name):
                digest.update(piece)
                yield piece
        except FileNotFoundError as error:
            raise self.damage(marker.part, name, f"{name} is gone") from error
        if digest.hexdigest() != marker.files[name]["sha256"]:
            raise self.damage(marker.part, name, f"the bytes of {name} changed")

    def _check_size(self, marker: Marker, name: str, present: int | None) -> None:
        """Raise DamagedPart if a file is missing (``present`` is None) or has another size than its marker states."""
        if present is None:
            raise self.damage(marker.part, name, f"{name} is gone")
        if present != (size := marker.files[name]["size"]):
            raise self.damage(marker.part, name, f"{name} has {present} bytes, not {size}")
