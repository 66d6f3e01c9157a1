"""Artifacts: what every stage reads and writes, under one commit rule.

An artifact is a folder ``<store>/<kind>/<key>/`` of parts. Its key is the hash of its identity: what it is made
from and with, never how fast or where. A part's data are written to ``part-00003.<nonce>/`` and synced; the commit
is the exclusive creation of ``part-00003.json``, which names the nonce, every file's size and SHA-256 and the
input parts' checksums. First commit wins; the loser drops its folder. A part without its marker does not exist,
and nothing committed is ever changed in place; its data may be given up as a whole (``storage.pruning``).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from eopd.storage import paths
from eopd.storage.errors import DamagedPart, MissingArtifact, MissingPart, PrunedPart, WrongArtifact
from eopd.storage.files import (
    canonical_json,
    create_exclusively,
    fsync_tree,
    naming_full_disks,
    sha256_file,
    sha256_text,
)
from eopd.storage.markers import (
    REMADE,
    REPAIR,
    SCHEMA,
    Marker,
    file_text,
    marker_text,
    parse_marker,
    refuse_newer_schema,
)

KEY_LENGTH = 20


@dataclass(frozen=True)
class Identity:
    """What an artifact is: the content of its key.

    ``settings`` are the semantic ones only. ``inputs`` maps a role to the key of the artifact, or the fingerprint
    of the external model or file, that plays it. ``coverage`` (scores only) is keyed apart, so that several
    coverages stand beside one identity.
    """

    kind: str
    version: int
    parts: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    coverage: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        assert self.kind in paths.KINDS, self.kind
        assert self.parts > 0, f"{self.kind} artifact of {self.parts} parts"

    @cached_property
    def base_key(self) -> str:
        """Key of the identity without its coverage."""
        made_of = {
            "kind": self.kind,
            "version": self.version,
            "parts": self.parts,
            "settings": self.settings,
            "inputs": self.inputs,
        }
        return sha256_text(canonical_json(made_of))[:KEY_LENGTH]

    @cached_property
    def key(self) -> str:
        if self.coverage is None:
            return self.base_key
        return f"{self.base_key}/{sha256_text(canonical_json(self.coverage))[:KEY_LENGTH]}"

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "version": self.version,
            "parts": self.parts,
            "settings": dict(self.settings),
            "inputs": dict(self.inputs),
            "coverage": None if self.coverage is None else dict(self.coverage),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any], where: Path) -> Identity:
        refuse_newer_schema(found, where)
        try:
            return cls(
                kind=found["kind"],
                version=found["version"],
                parts=found["parts"],
                settings=found["settings"],
                inputs=found["inputs"],
                coverage=found["coverage"],
            )
        except (KeyError, AssertionError, TypeError) as error:
            raise WrongArtifact(f"{where} is no identity of an artifact: {error!r}") from error


@dataclass(frozen=True)
class Standing:
    """What one listing of an artifact's folder shows: numbers of parts."""

    committed: set[int]
    pruned: set[int]  # committed once, their data given up since
    hinted: set[int]  # committed empty, perhaps: the marker knows (``Artifact.reasons_aside``)

    @property
    def made(self) -> set[int]:
        return self.committed | self.pruned


class Artifact:
    """One artifact of a store. Cheap to make: nothing is read before it is asked for."""

    def __init__(self, store: Path, identity: Identity) -> None:
        self.identity = identity
        self.folder = store / identity.kind / identity.key

    def __repr__(self) -> str:
        return f"{self.kind}/{self.key}"

    @property
    def kind(self) -> str:
        return self.identity.kind

    @property
    def key(self) -> str:
        return self.identity.key

    @property
    def parts(self) -> int:
        return self.identity.parts

    # -- state -------------------------------------------------------------------------------------------------

    def is_committed(self, part: int) -> bool:
        return (self.folder / paths.marker_name(part)).exists()

    def _is_made(self, part: int) -> bool:
        return self.is_committed(part) or (self.folder / paths.tombstone_name(part)).exists()

    def standing(self) -> Standing:
        """Every part's state, from one listing of the folder. With a marker it is committed, whatever is beside it."""
        try:
            listing = "\n".join(os.listdir(self.folder))
        except FileNotFoundError:
            listing = ""
        parts = self.parts
        committed, pruned, hinted = (
            {part for part in paths.parts_named(listing, suffix) if part < parts}
            for suffix in (".json", ".pruned", ".set_aside")
        )
        return Standing(committed, pruned - committed, hinted)

    def is_begun(self) -> bool:
        """Whether somebody has set out to make it."""
        return (self.folder / paths.IDENTITY).exists()

    def committed(self) -> set[int]:
        """Every part that can be read."""
        return self.standing().committed

    def pruned(self) -> set[int]:
        """Parts that were committed and whose data were given up since."""
        return self.standing().pruned

    def reasons_aside(self, standing: Standing | None = None) -> dict[int, str]:
        """Parts that were set aside (``set_aside``), and why."""
        standing = standing or self.standing()
        reasons = {part: self.marker(part).set_aside for part in sorted(standing.hinted & standing.committed)}
        return {part: reason for part, reason in reasons.items() if reason is not None}

    def missing(self) -> list[int]:
        """Parts that have never been made, or have to be made again."""
        made = self.standing().made
        return [part for part in range(self.parts) if part not in made]

    def is_complete(self) -> bool:
        """The one definition: every part was committed, and nothing is left to do.

        A part that was pruned since counts. Its data are gone: who reads it finds ``PrunedPart``, and a plan in which
        something still has to read it calls it back first (``storage.pruning.revive``), which makes it missing. The
        manifest is a convenience for people.
        """
        return len(self.standing().made) == self.parts

    # -- reading -----------------------------------------------------------------------------------------------

    def marker(self, part: int) -> Marker:
        """Raises MissingPart, PrunedPart, DamagedPart (not a marker), WrongArtifact or NewerSchema."""
        path = self.folder / paths.marker_name(part)
        try:
            text = path.read_bytes()
        except FileNotFoundError as error:
            if (self.folder / paths.tombstone_name(part)).exists():
                raise PrunedPart(f"{self} part {part} was pruned: its data are gone. {REMADE}") from error
            raise MissingPart(f"{self} part {part} is not committed. Run the stage that makes it.") from error
        return parse_marker(text, self.kind, self.key, part, str(path))

    def remains(self, part: int) -> Marker:
        """The marker of a part that is committed; of a pruned one, that of what is left of it."""
        try:
            return self.marker(part)
        except PrunedPart:
            path = self.folder / paths.tombstone_name(part)
            return parse_marker(path.read_bytes(), self.kind, self.key, part, str(path))

    def part_folder(self, part: int) -> Path:
        """Folder of a committed part, its files' presence, kind and sizes checked against the marker."""
        return self._checked_folder(self.marker(part))

    def remaining_folder(self, part: int) -> Path:
        """As ``part_folder``; of a pruned part, the folder with the files that were kept."""
        return self._checked_folder(self.remains(part))

    def _checked_folder(self, marker: Marker) -> Path:
        part = marker.part
        folder = self.folder / paths.data_name(part, marker.nonce)
        for inner in sorted({(folder / name).parent for name in marker.files} | {folder}):
            if inner.is_symlink():
                raise DamagedPart(f"{self} part {part}: {inner} is a link, which may lead anywhere. {REPAIR}")
        for name, entry in marker.files.items():
            try:
                found = (folder / name).lstat()
            except (FileNotFoundError, NotADirectoryError) as error:
                raise DamagedPart(f"{self} part {part}: {name} is gone. {REPAIR}") from error
            if not stat.S_ISREG(found.st_mode):
                raise DamagedPart(f"{self} part {part}: {name} is no plain file. {REPAIR}")
            if found.st_size != entry["size"]:
                raise DamagedPart(
                    f"{self} part {part}: {name} has {found.st_size} bytes, not {entry['size']}. {REPAIR}"
                )
        return folder

    def verify_part(self, part: int) -> None:
        """Every byte of a part (of what is left of it) against its marker; DamagedPart names the first bad file."""
        folder = self.remaining_folder(part)
        for name, entry in self.remains(part).files.items():
            if sha256_file(folder / name) != entry["sha256"]:
                raise DamagedPart(f"{self} part {part}: the bytes of {name} changed. {REPAIR}")

    @property
    def manifest(self) -> dict[str, Any]:
        path = self.folder / paths.MANIFEST
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise MissingPart(f"{self} is not complete: parts {self.missing()[:8]} are missing") from error
        refuse_newer_schema(found, path)
        return found

    # -- writing -----------------------------------------------------------------------------------------------

    @contextmanager
    def write_part(
        self, part: int, *, inputs: Mapping[str, str] | None = None, info: Mapping[str, Any] | None = None
    ) -> Iterator[Path]:
        """Yield an empty folder; commit what was written to it on a clean exit, drop it on an exception.

        ``info`` may be a dict that the caller fills before the block ends; a ``set_aside`` in it is the reason why the
        part is committed empty, and leaves a hint in the folder for listings. When another process committed the
        part first, the folder is dropped without harm.
        """
        assert 0 <= part < self.parts, (part, self.parts)
        nonce = secrets.token_hex(8)
        folder = self.folder / paths.data_name(part, nonce)
        won = False
        try:
            with naming_full_disks(folder):
                folder.mkdir(parents=True)
                self.begin()
                yield folder
                marker = Marker(part, nonce, _listing(folder), dict(inputs or {}), dict(info or {}))
                if "set_aside" in marker.info:
                    create_exclusively(self.folder / paths.set_aside_name(part), "")
                text = marker_text(marker, self.kind, self.key)
                won = create_exclusively(self.folder / paths.marker_name(part), text, lambda: fsync_tree(folder))
        finally:
            if not won:
                shutil.rmtree(folder, ignore_errors=True)
        self.finish()

    def set_aside(self, part: int, reason: str) -> None:
        """Commit a part that holds nothing and says why; `eopd store verify --repair` re-queues it."""
        with self.write_part(part, info={"set_aside": reason}):
            pass

    def drop_part(self, part: int) -> None:
        """Remove a committed part: its marker first, so that no reader finds a marker without data."""
        marker = self.marker(part)
        (self.folder / paths.marker_name(part)).unlink(missing_ok=True)
        shutil.rmtree(self.folder / paths.data_name(part, marker.nonce), ignore_errors=True)

    def begin(self) -> None:
        """Say what it is, before any part is there: from now on it is finished as it was asked for."""
        path = self.folder / paths.IDENTITY
        if not path.exists():
            with naming_full_disks(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                create_exclusively(path, file_text(self.identity.to_json()))

    def finish(self) -> None:
        """Write the manifest once every part is committed."""
        path = self.folder / paths.MANIFEST
        # one look at the last part first: who works through a thousand parts need not list all of them each time
        if not self._is_made(self.parts - 1) or path.exists() or not self.is_complete():
            return
        create_exclusively(path, file_text(self.manifest_content()))

    def manifest_content(self, pruned: Collection[int] | None = None) -> dict[str, Any]:
        """``part_checksums`` are those of the parts as they were committed; ``pruned`` those to be named as pruned."""
        named = self.pruned() if pruned is None else pruned
        sums = {str(part): self.remains(part).committed_checksum for part in range(self.parts)}
        content = {**self.identity.to_json(), "key": self.key, "part_checksums": sums, "pruned": bool(named)}
        return {**content, "pruned_parts": sorted(named)} if named else content


def open_artifact(store: Path, kind: str, key: str) -> Artifact:
    """An artifact that exists, from what its folder says it is.

    Raises:
        MissingArtifact: there is none.
        DamagedPart, WrongArtifact, NewerSchema: its identity does not hash to its key, or is newer than this eopd.
    """
    path = store / kind / key / paths.IDENTITY
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise MissingArtifact(f"there is no {kind} artifact {key} in {store}") from error
    return Artifact(store, parse_identity(text, kind, key, str(path)))


def parse_identity(text: bytes, kind: str, key: str, where: str) -> Identity:
    """Raises DamagedPart (not JSON), WrongArtifact (it does not hash to its key) or NewerSchema."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DamagedPart(f"{where} is not JSON") from error
    identity = Identity.from_json(found, Path(where))
    try:
        owner = (identity.kind, identity.key)
    except ValueError as error:  # not a number
        raise DamagedPart(f"{where} holds what no identity holds: {error}") from error
    if owner != (kind, key):
        raise WrongArtifact(f"{where} describes {owner[0]}/{owner[1]}, not {kind}/{key}")
    return identity


def _listing(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    }
