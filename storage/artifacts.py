"""Artifacts: what every stage reads and writes, under one commit rule.

An artifact is a folder ``<store>/<kind>/<key>/`` of parts. Its key is the hash of its identity: inputs and settings,
never speed or place. A part's data are written to ``part-00003.<nonce>/`` and synced; the commit is the exclusive
creation of ``part-00003.json``, which names the nonce, every file's size and SHA-256 and the input parts' checksums.
The first commit wins; the loser drops its folder. A part without its marker does not exist, and nothing committed is
ever changed in place; its data may be pruned as a whole (``storage.pruning``).
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from eopd.storage import paths
from eopd.storage.errors import MissingArtifact, MissingPart, StoreError
from eopd.storage.files import create_exclusively, fsync_tree, naming_full_disks, replace_atomically, sha256_file
from eopd.storage.identity import Identity, parse_identity
from eopd.storage.markers import Marker, file_text, marker_text
from eopd.storage.stored import StoredArtifact
from eopd.storage.untrusted import open_plain, read_plain, refuse_links, walk

READ_BYTES = 1 << 20


class Artifact(StoredArtifact):
    """One artifact in a local store. Cheap to construct: files are read on demand."""

    folder: Path

    def __init__(self, store: Path, identity: Identity) -> None:
        self._store = store
        self._identity = identity
        self.kind = identity.kind
        self.key = identity.key
        self.folder = store / self.kind / self.key

    def __repr__(self) -> str:
        return f"{self.kind}/{self.key}"

    @property
    def identity(self) -> Identity:
        return self._identity

    def is_begun(self) -> bool:
        """True if work on the artifact has started."""
        return self.has(paths.IDENTITY)

    def is_under_way(self) -> bool:
        """True if work on some part has started: there are parts, remains of pruned parts, or claims."""
        return any(name.startswith(paths.PART) for name in self.names())

    # -- reading -----------------------------------------------------------------------------------------------

    def refuse_links(self) -> None:
        """Check that the artifact's folder lies in the store. Raises DamagedPart if a link leads to it."""
        refuse_links(self._store, self.kind, *self.key.split("/"))

    def names(self) -> list[str]:
        self.refuse_links()
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return []

    def has(self, name: str) -> bool:
        self.refuse_links()
        return os.path.lexists(self.folder / name)

    def read(self, name: str) -> bytes:
        self.refuse_links()
        return read_plain(self.folder / name)

    def part_folder(self, part: int) -> Path:
        """Return the folder of a committed part, with its files' presence, kind and sizes checked against the
        marker."""
        return self._checked_folder(self.marker(part))

    def remaining_folder(self, part: int) -> Path:
        """Like ``part_folder``; for a pruned part, return the folder with the files that were kept."""
        return self._checked_folder(self.remains(part))

    def _checked_folder(self, marker: Marker) -> Path:
        part = marker.part
        folder = self._data_folder(marker)
        for inner in sorted({above for name in marker.files for above in (folder / name).parents} | {folder}):
            if inner.is_relative_to(folder) and inner.is_symlink():
                raise self.damage(part, str(inner), f"{inner} is a link, which may lead anywhere")
        for name in marker.files:
            try:
                status = (folder / name).lstat()
            except (FileNotFoundError, NotADirectoryError):
                self._check_size(marker, name, None)
            else:
                if not stat.S_ISREG(status.st_mode):
                    raise self.damage(part, name, f"{name} is no plain file")
                self._check_size(marker, name, status.st_size)
        return folder

    def _data_folder(self, marker: Marker) -> Path:
        self.refuse_links()
        return self.folder / paths.data_name(marker.part, marker.nonce)

    def part_names(self, marker: Marker) -> set[str]:
        self._checked_folder(marker)
        return self.names_there(marker)

    def names_there(self, marker: Marker) -> set[str]:
        """List paths of all files in a part's folder, expected or not.

        Raises:
            DamagedPart: the folder is a link.
        """
        folder = self._data_folder(marker)
        if folder.is_symlink():
            raise self.damage(marker.part, str(folder), f"{folder} is a link, which may lead anywhere")
        names = (entry.path for entry in walk(folder) if not entry.is_dir(follow_symlinks=False))
        return {os.path.relpath(name, folder) for name in names}

    def pieces(self, marker: Marker, name: str) -> Iterator[bytes]:
        with os.fdopen(open_plain(self._data_folder(marker) / name), "rb") as file:
            while piece := file.read(READ_BYTES):
                yield piece

    # -- writing -----------------------------------------------------------------------------------------------

    @contextmanager
    def write_part(
        self, part: int, *, inputs: Mapping[str, str] | None = None, info: Mapping[str, Any] | None = None
    ) -> Iterator[Path]:
        """Yield an empty folder; commit what was written to it on a clean exit, drop it on an exception.

        ``info`` may be a dict that the caller fills before the block ends. ``set_aside`` in it is the reason why the
        part is committed empty, and leaves a hint in the folder for listings. ``pruned`` in it (``storage.pruning``)
        makes the commit the tombstone of a pruned part. If another process committed the part first, the folder is
        dropped without harm.
        """
        assert 0 <= part < self.parts, (part, self.parts)
        self.refuse_links()
        nonce = secrets.token_hex(8)
        folder = self.folder / paths.data_name(part, nonce)
        won = False
        try:
            with naming_full_disks(folder):
                folder.mkdir(parents=True)
                self.begin()
                yield folder
                _open_to_readers(folder)
                marker = Marker(part, nonce, _listing(folder), dict(inputs or {}), dict(info or {}))
                if "set_aside" in marker.info:
                    create_exclusively(self.folder / paths.set_aside_name(part), "")
                name, text = marker.file_name, marker_text(marker, self.kind, self.key)
                won = create_exclusively(self.folder / name, text, lambda: fsync_tree(folder))
        finally:
            if not won and not self.names_data(part, nonce):  # who is stopped after the commit has committed
                shutil.rmtree(folder, ignore_errors=True)
        self.finish()

    def names_data(self, part: int, nonce: str) -> bool:
        """True if a part's marker or tombstone names the data folder of ``nonce``, or is unreadable and may name it."""
        try:
            return self.remains(part).nonce == nonce
        except MissingPart:
            return False
        except (StoreError, OSError):
            return True

    def set_aside(self, part: int, reason: str) -> None:
        """Commit an empty part with the reason; `eopd store verify --repair` re-queues it."""
        with self.write_part(part, info={"set_aside": reason}):
            pass

    def drop_part(self, part: int) -> None:
        """Remove a committed part: its marker first, so that no reader finds a marker without data."""
        marker = self.marker(part)  # which refuses links
        (self.folder / paths.marker_name(part)).unlink(missing_ok=True)
        shutil.rmtree(self.folder / paths.data_name(part, marker.nonce), ignore_errors=True)

    def begin(self) -> None:
        """Write the identity before any part exists: from then on the artifact is finished as it was requested."""
        if not self.is_begun():
            with naming_full_disks(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.create(paths.IDENTITY, file_text(self.identity.to_json()))

    def create(self, name: str, text: str) -> bool:
        """Raises StoreFull, StoreUnwritable or, where a link leads to the artifact, DamagedPart."""
        self.refuse_links()
        return create_exclusively(self.folder / name, text)

    def replace(self, name: str, text: str) -> None:
        """Raises StoreFull, StoreUnwritable or, where a link leads to the artifact, DamagedPart."""
        self.refuse_links()
        replace_atomically(self.folder / name, text)


def open_artifact(store: Path, kind: str, key: str) -> Artifact:
    """Open an existing artifact by the identity in its folder.

    Raises:
        MissingArtifact: there is none.
        DamagedPart, WrongArtifact, NewerSchema: its identity does not hash to its key, or is newer than this eopd.
    """
    path = store / kind / key / paths.IDENTITY
    try:
        if not paths.is_key(key):  # it may come from another artifact's identity
            raise FileNotFoundError(path)
        refuse_links(store, kind, *key.split("/"))
        text = read_plain(path)
    except FileNotFoundError as error:
        raise MissingArtifact(f"there is no {kind} artifact {key} in {store}", artifact=f"{kind}/{key}") from error
    return Artifact(store, parse_identity(text, kind, key, str(path)))


def _open_to_readers(folder: Path) -> None:
    """Give every file below a part's folder the mode that the umask gives a new file.

    Files written through a temporary file (as safetensors does) are readable by their owner alone, whatever the umask.
    The mode is that of the folder, which was made under the same umask, or under the access list of the folder above
    it. A file with another hard link is left alone: somebody may have linked it there to share it.
    """
    wanted = stat.S_IMODE(folder.lstat().st_mode) & 0o666
    for entry in walk(folder):
        if not entry.is_file(follow_symlinks=False):
            continue
        handle = open_plain(entry.path)
        try:
            status = os.fstat(handle)
            if stat.S_IMODE(status.st_mode) != wanted and status.st_nlink == 1:
                with suppress(OSError):  # where it cannot be changed, it is as it was written
                    os.fchmod(handle, wanted)
        finally:
            os.close(handle)


def _listing(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    }
