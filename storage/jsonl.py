"""JSONL files that are appended to: a crash or a full disk may cut a line short."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from eopd.storage.errors import DamagedPart
from eopd.storage.untrusted import naming, parse_json, read_plain


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line; start a new line if the last one was cut short."""
    with path.open("a+b") as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write(("\n" * torn + json.dumps(row) + "\n").encode())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read the objects of a file, none if there is no file; a line that was cut short is skipped.

    Raises:
        DamagedPart: it is no plain file.
    """
    try:
        text = read_plain(path)
    except FileNotFoundError:
        return
    yield from parse_lines(text)


def parse_lines(text: bytes) -> Iterator[dict[str, Any]]:
    """Parse bytes of a file as ``read_lines`` does."""
    for line in text.splitlines():
        with suppress(ValueError):
            value = parse_json(line, allow_nan=True)
            if isinstance(value, dict):
                yield value


def read_whole(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file that was written completely and committed.

    Raises:
        DamagedPart: one of its lines is no object.
    """
    rows = []
    for number, line in enumerate(read_plain(path).splitlines(), 1):
        with naming(f"{path} line {number}"):
            rows.append(parse_json(line, allow_nan=True))
        if not isinstance(rows[-1], dict):
            raise DamagedPart(f"{path} line {number} is no object", file=path, line=number)
    return rows
