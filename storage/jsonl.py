"""Files of one JSON object a line that are appended to: a write may be cut short by a crash or a full disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line; where the last one was cut short, on a line of its own."""
    with path.open("a+b") as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write(("\n" * torn + json.dumps(row) + "\n").encode())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, none where there is no file; a line that was cut short is passed over."""
    if path.exists():
        yield from parse_lines(path.read_bytes())


def parse_lines(text: bytes) -> Iterator[dict[str, Any]]:
    """As ``read_lines``, of what was read of one."""
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found
