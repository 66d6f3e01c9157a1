"""Reading of files and JSON that others may have written: a shared store, a copied artifact, a run's notes.

Files are opened only where they are plain files: a link is not followed, a named pipe is not waited for. JSON is read
up to a size, a depth and a size of numbers, and its types are those of a schema. What does not fit is an error that
names the file, so that the caller can go on to the next one.
"""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from eopd.storage.errors import DamagedPart

LARGEST_TEXT = 256 << 20
"""Bytes of a JSON file, or of a file of JSON lines."""
_LARGEST_INTEGER = 1 << 64
_NOT_PLAIN = {errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO, errno.ENODEV, errno.ENAMETOOLONG}
A_PLAIN_FILE = "a plain file"
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_plain(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Open a plain file and return its descriptor. A file that ``flags`` create is open to all users.

    Raises:
        DamagedPart: something else is in its place. FileNotFoundError, PermissionError and other OSErrors.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in _NOT_PLAIN:
            raise DamagedPart(f"{path} is {kind_of(path)}, not a plain file", file=path) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DamagedPart(f"{path} is {kind_of(path)}, not a plain file", file=path)
    return handle


def read_plain(path: str | Path, largest: int = LARGEST_TEXT) -> bytes:
    """Read the bytes of a plain file.

    Raises:
        DamagedPart: something else is in its place, or it has more than ``largest`` bytes. OSError as ``open_plain``.
    """
    with os.fdopen(open_plain(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise DamagedPart(f"{path} has {size:,} bytes, more than the {largest:,} of such a file", file=path)
        return file.read(size)


def kind_of(path: str | Path) -> str:
    """Describe the kind of entry at ``path``."""
    try:
        return _KINDS.get(stat.S_IFMT(os.lstat(path).st_mode), A_PLAIN_FILE)
    except OSError as error:
        return f"not to be found ({os.strerror(error.errno or 0)})"


def refuse_links(root: Path, *names: str) -> None:
    """Check that the folders from ``root`` to ``root/names[0]/names[1]/...``, as far as they exist, are no links.

    ``root`` itself may be a link: its owner chose it.

    Raises:
        DamagedPart: one of them is a link, or no folder.
    """
    path = str(root)
    for name in names:
        path = f"{path}/{name}"
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return
        if stat.S_ISLNK(mode):
            raise DamagedPart(
                f"{path} is a link, which may lead out of the store", file=path, remedy="put the folder itself there"
            )
        if not stat.S_ISDIR(mode):
            raise DamagedPart(f"{path} is {kind_of(path)}, not a folder", file=path, remedy="remove it")


def walk(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """Yield every entry below ``folder``, folders before their content. Links are not followed, except ``folder``.

    What cannot be listed, or vanishes meanwhile, is passed over. Depth is bounded by the length of paths alone.
    """
    waiting = [str(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                listed = list(entries)
        except OSError:
            continue
        for entry in listed:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)


def parse_json(text: bytes | str, *, allow_nan: bool = False) -> Any:
    """Parse JSON: UTF-8, at most 200 levels deep, without lone surrogates, huge integers, NaN and infinities.

    Args:
        allow_nan: take NaN and infinities, which the figures of a training may hold.

    Raises:
        ValueError: it is not JSON, or not within these bounds.
    """
    parsed = from_json(text, allow_inf_nan=allow_nan)
    waiting = [parsed]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, int):
            if abs(value) >= _LARGEST_INTEGER:
                raise ValueError("a number is out of range")
        elif isinstance(value, float) and not (allow_nan or math.isfinite(value)):  # of 1e400
            raise ValueError("a number is out of range")
    return parsed


def read_json(path: Path) -> Any:
    """Read the JSON of a plain file. Raises DamagedPart; OSError as ``open_plain``."""
    text = read_plain(path)
    with naming(str(path)):
        return parse_json(text)


@contextmanager
def naming(where: str, remedy: str = "") -> Iterator[None]:
    """Turn the errors of ``parse_json`` and of a schema into a DamagedPart that names the file.

    ``where`` is the file; ``remedy`` ends the message.
    """
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))[:200] or "it"
        raise DamagedPart(f"{where}: {field}: {first['msg'][:200]}", file=where, remedy=remedy) from error
    except ValueError as error:
        raise DamagedPart(f"{where} is not JSON ({error})", file=where, remedy=remedy) from error


MISFITS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,  # RecursionError too
)
"""Errors of code whose input has unexpected types or sizes."""


@contextmanager
def naming_misfits(where: str) -> Iterator[None]:
    """Turn the errors of code that reads the content of ``where`` (an artifact or a file) into a DamagedPart."""
    try:
        yield
    except MISFITS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DamagedPart(f"{where} holds what it should not ({reason})", file=where) from error
