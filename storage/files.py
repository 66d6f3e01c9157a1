"""Durable small-file operations on a local or shared POSIX file system, and canonical JSON."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eopd.storage.errors import NoHardLinks, StoreFull, StoreUnwritable

NO_INODES = "no inodes left"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_IN_THE_WAY = {errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}  # of link(2), for a file of our own
NEEDS_LINKS = "FAT, exFAT and some network file systems have none: set store: to ext4, XFS, NFS or Lustre"


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no blanks, no NaN. Floats as Python's shortest repr."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def naming_full_disks(path: Path) -> Iterator[None]:
    """Turn the errno of a full or unwritable store into an error that says what to do.

    It names the file that the system names, which may lie elsewhere; ``path`` where the system names none.
    """
    try:
        yield
    except Exception as error:
        number, named = _errno(error), getattr(error, "filename", None)
        named = named if isinstance(named, str) else path
        if number in _FULL:
            short, remedy = _what_is_short(number, Path(named))
            raise StoreFull(
                f"{short} while writing {named}",
                file=named,
                remedy=f"Nothing committed is lost: {remedy}, then run the same command again.",
            ) from error
        if number in _UNWRITABLE:
            reason = os.strerror(number)
            raise StoreUnwritable(
                f"cannot use {named}: {reason}", file=named, remedy="Check its owner and permissions."
            ) from error
        if number in _IN_THE_WAY:
            raise StoreUnwritable(
                f"cannot write {named}: {os.strerror(number)}", file=named, remedy="Remove what is in its place."
            ) from error
        raise


def _what_is_short(number: int, path: Path) -> tuple[str, str]:
    """Describe what a write that failed with this errno lacked, and the remedy."""
    if number == errno.EDQUOT:
        return "quota exceeded", "remove files that count towards it, or have it raised"
    if number == errno.EFBIG:
        return "no space left (files may not be that large here)", "raise the limit (ulimit -f), or use another disk"
    if number == errno.ENOSPC and free_of(path).inodes == 0:
        return NO_INODES, "remove files, however small"
    return "no space left", "free space"


@dataclass(frozen=True)
class Free:
    """Free space and inodes for unprivileged writers."""

    bytes: int
    inodes: int | None  # None: the file system does not count them

    def __str__(self) -> str:
        return f"{self.bytes:,} bytes free" + ("" if self.inodes is None else f", {self.inodes:,} inodes free")


def free_of(path: Path) -> Free:
    """Measure the file system that ``path`` lies on, or would lie on."""
    for place in (path, *path.absolute().parents):
        with suppress(OSError):
            system = os.statvfs(place)
            return Free(system.f_bavail * system.f_frsize, system.f_favail if system.f_files else None)
    return Free(0, None)


def is_full(error: BaseException | None) -> bool:
    """True if an error, or one of its causes, says that no space (or quota) is left."""
    while error is not None:
        if isinstance(error, StoreFull) or _errno(error) in _FULL:
            return True
        error = error.__cause__
    return False


def _errno(error: BaseException) -> int:
    """Return the errno of an error, or 0. safetensors only writes it into its message, as "(os error 28)"."""
    if isinstance(error, OSError):
        return error.errno or 0
    if type(error).__name__ != "SafetensorError":  # by name: the store does not need safetensors
        return 0
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match.group(1)) if match else 0


def fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """fsync every file and folder below ``folder``, and itself."""
    entries = list(os.walk(folder, topdown=False))
    files = [os.path.join(here, name) for here, _, names in entries for name in names]
    for file in files:
        with _reading(file) as handle:
            _begin_writing(handle)
    for file in files:
        with _reading(file) as handle:
            os.fsync(handle)
    for here, _, _ in entries:
        fsync_folder(Path(here))


@contextmanager
def _reading(path: str) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _begin_writing(handle: int) -> None:
    """Ask the kernel to start writing a file out, where it can be asked (Linux).

    This affects speed only, so errors are ignored: with all files on their way before the first fsync waits, a
    journalling file system commits them together, and not one by one.
    """
    if _sync_file_range is not None:
        _sync_file_range(handle, 0, 0, SYNC_FILE_RANGE_WRITE)


SYNC_FILE_RANGE_WRITE = 2  # of linux/fs.h
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def _nothing() -> None:
    pass


@contextmanager
def _written_beside(path: Path, text: str, meanwhile: Callable[[], None] = _nothing) -> Iterator[Path]:
    """Write a synced temporary file next to ``path``, removed at the end; ``meanwhile`` runs during the sync."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            _begin_writing(file.fileno())
            meanwhile()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def create_exclusively(path: Path, text: str, meanwhile: Callable[[], None] = _nothing) -> bool:
    """Create ``path`` atomically. Returns False if it exists already.

    ``meanwhile`` is called before ``path`` is created, to sync whatever must be on the disk first.
    """
    with naming_full_disks(path):
        with _written_beside(path, text, meanwhile) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                # NFS repeats a request whose answer was lost, and the second finds what the first made: then it is ours
                if temporary.stat().st_nlink == 1:
                    return False
            except OSError as error:
                if error.errno in _NO_LINKS:
                    raise NoHardLinks(
                        f"no hard links in {path.parent}: {error.strerror}", file=path.parent, remedy=NEEDS_LINKS
                    ) from error
                raise
        fsync_folder(path.parent)
    return True


def replace_atomically(path: Path, text: str) -> None:
    """Write ``path`` so that a reader sees the old text or the new, never a mixture."""
    with naming_full_disks(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _written_beside(path, text) as temporary:
            os.replace(temporary, path)
        fsync_folder(path.parent)


def existing(path: Path) -> Path:
    """Return ``path``, or the nearest folder above it that exists.

    Raises:
        OSError: the system refuses the path, such as one with a name that is too long.
        RuntimeError: it leads through a loop of links.
    """
    path = path.resolve()
    while path != path.parent:
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent
        else:
            break
    return path
