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
from eopd.storage.errors import DamagedPart, MissingPart, PrunedPart
from eopd.storage.identity import Identity
from eopd.storage.markers import REMADE, REPAIR, Marker, file_text, parse_marker, refuse_newer_schema
from eopd.storage.untrusted import naming, parse_json


@dataclass(frozen=True)
class Standing:
    """What one listing of an artifact's folder shows: numbers of parts."""

    committed: set[int]
    pruned: set[int]  # committed once, their data given up since
    hinted: set[int]  # committed empty, perhaps: the marker knows (``StoredArtifact.reasons_aside``)

    @property
    def made(self) -> set[int]:
        return self.committed | self.pruned


class StoredArtifact(ABC):
    """Cheap to make: nothing is read before it is asked for. Buckets add StoreUnreadable and StoreUnwritable (no
    permission) to whatever is raised."""

    kind: str
    key: str
    folder: Path | str  # in a bucket: from its root

    # -- what a store has to answer ----------------------------------------------------------------------------

    @property
    @abstractmethod
    def identity(self) -> Identity:
        """Raises, in a bucket, MissingArtifact, DamagedPart, WrongArtifact or NewerSchema."""

    @abstractmethod
    def names(self) -> list[str]:
        """Of the files in the artifact's folder, parts' folders perhaps among them; none where there is no folder."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is such a file in the artifact's folder."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A file of the artifact's folder. Raises FileNotFoundError; DamagedPart where it is no plain file."""

    @abstractmethod
    def create(self, name: str, text: str) -> bool:
        """Create a file of the artifact's folder whole or not at all. False when there is one already."""

    @abstractmethod
    def replace(self, name: str, text: str) -> None:
        """Write a file of the artifact's folder, so that a reader sees the old text or the new."""

    @abstractmethod
    def part_names(self, marker: Marker) -> set[str]:
        """Of all files in a part's folder, whoever put them there.

        Raises:
            DamagedPart: one that the marker names is gone, has another size, or is no plain file.
        """

    @abstractmethod
    def pieces(self, marker: Marker, name: str) -> Iterator[bytes]:
        """A file of a part, however large, in its order. Raises FileNotFoundError."""

    @property
    def parts(self) -> int:
        return self.identity.parts

    # -- state -------------------------------------------------------------------------------------------------

    def is_committed(self, part: int) -> bool:
        return self.has(paths.marker_name(part))

    def _is_made(self, part: int) -> bool:
        return self.is_committed(part) or self.has(paths.tombstone_name(part))

    def standing(self) -> Standing:
        """Every part's state, from one listing of the folder. With a marker it is committed, whatever is beside it."""
        listing = "\n".join(self.names())
        parts = self.parts
        committed, pruned, hinted = (
            {part for part in paths.parts_named(listing, suffix) if part < parts}
            for suffix in (".json", ".pruned", ".set_aside")
        )
        return Standing(committed, pruned - committed, hinted)

    def committed(self) -> set[int]:
        """Every part that can be read."""
        return self.standing().committed

    def pruned(self) -> set[int]:
        """Parts that were committed and whose data were given up since."""
        return self.standing().pruned

    def reasons_aside(self, standing: Standing | None = None) -> dict[int, str]:
        """Parts that were set aside (``Artifact.set_aside``), and why."""
        standing = standing or self.standing()
        reasons = {part: self.marker(part).set_aside for part in sorted(standing.hinted & standing.committed)}
        return {part: reason for part, reason in reasons.items() if reason is not None}

    def missing(self) -> list[int]:
        """Parts that have never been made, or have to be made again."""
        return list(self._missing())

    def first_missing(self, count: int = 8) -> list[int]:
        """As ``missing``: only the first ones, for states of a training there may be any number of."""
        return list(islice(self._missing(), count))

    def _missing(self) -> Iterator[int]:
        made = self.standing().made
        return (part for part in range(self.parts) if part not in made)

    def is_complete(self) -> bool:
        """The one definition: every part was committed, and nothing is left to do.

        A part that was pruned since counts. Its data are gone: who reads it finds ``PrunedPart``, and a plan in which
        something still has to read it calls it back first (``storage.pruning.revive``), which makes it missing. The
        manifest is a convenience for people.
        """
        return len(self.standing().made) == self.parts

    # -- markers and manifest ----------------------------------------------------------------------------------

    def marker(self, part: int) -> Marker:
        """Raises MissingPart, PrunedPart, DamagedPart (not a marker), WrongArtifact or NewerSchema."""
        try:
            return self._marker(part, paths.marker_name(part))
        except FileNotFoundError as error:
            if self.has(paths.tombstone_name(part)):
                raise PrunedPart(f"{self} part {part} was pruned: its data are gone. {REMADE}") from error
            raise MissingPart(f"{self} part {part} is not committed. Run the stage that makes it.") from error

    def remains(self, part: int) -> Marker:
        """The marker of a part that is committed; of a pruned one, that of what is left of it."""
        try:
            return self.marker(part)
        except PrunedPart:
            return self.tombstone(part)

    def tombstone(self, part: int) -> Marker:
        """What a pruned part left in its marker's place. Raises as ``marker``; MissingPart: there is none."""
        try:
            return self._marker(part, paths.tombstone_name(part))
        except FileNotFoundError as error:
            raise MissingPart(f"{self} part {part} has no tombstone: it was called back, or never pruned.") from error

    def _marker(self, part: int, name: str) -> Marker:
        return parse_marker(self.read(name), self.kind, self.key, part, f"{self.folder}/{name}")

    @property
    def manifest(self) -> dict[str, Any]:
        """Raises MissingPart (there is none yet), DamagedPart or NewerSchema."""
        where = f"{self.folder}/{paths.MANIFEST}"
        try:
            text = self.read(paths.MANIFEST)
        except FileNotFoundError as error:
            raise MissingPart(f"{self} is not complete: parts {self.first_missing()} are missing") from error
        with naming(where):
            found = parse_json(text)
            refuse_newer_schema(found, Path(where))
            TypeAdapter(list[int]).validate_python(found.get("pruned_parts", []), strict=True)
        content: dict[str, Any] = found
        return content

    def manifest_content(self, pruned: Collection[int] | None = None) -> dict[str, Any]:
        """``part_checksums`` are those of the parts as they were committed; ``pruned`` those to be named as pruned."""
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
        """Have the manifest say what stands now, once every part is committed: one was pruned, or came back whole."""
        if not self.is_complete():
            return
        text = file_text(self.manifest_content())
        if not self.has(paths.MANIFEST) or self.read(paths.MANIFEST) != text.encode():
            self.replace(paths.MANIFEST, text)

    # -- bytes -------------------------------------------------------------------------------------------------

    def verify_part(self, part: int) -> None:
        """Every byte of a part (of what is left of it) against its marker; DamagedPart names the first bad file."""
        marker = self.remains(part)
        there = self.part_names(marker)
        for name in marker.files:
            for _ in self.checked(marker, name):
                pass
        strangers = sorted(there - set(marker.files))
        if strangers and not marker.is_pruned:  # what a kill kept from going is no damage: `gc` names it
            added_to = f"{self.folder}/{paths.data_name(part, marker.nonce)}"
            raise DamagedPart(f"{self} part {part}: {strangers[0]} was added to {added_to}")

    def checked(self, marker: Marker, name: str) -> Iterator[bytes]:
        """As ``pieces``, of a file that the marker names; after the last one, DamagedPart if they are not its bytes."""
        digest = hashlib.sha256()
        try:
            for piece in self.pieces(marker, name):
                digest.update(piece)
                yield piece
        except FileNotFoundError as error:
            raise DamagedPart(f"{self} part {marker.part}: {name} is gone. {REPAIR}") from error
        if digest.hexdigest() != marker.files[name]["sha256"]:
            raise DamagedPart(f"{self} part {marker.part}: the bytes of {name} changed. {REPAIR}")

    def _check_size(self, marker: Marker, name: str, found: int | None) -> None:
        """Raises DamagedPart where a file is gone (``found`` is None) or has not the bytes of its marker."""
        if found is None:
            raise DamagedPart(f"{self} part {marker.part}: {name} is gone. {REPAIR}")
        if found != (size := marker.files[name]["size"]):
            raise DamagedPart(f"{self} part {marker.part}: {name} has {found} bytes, not {size}. {REPAIR}")
