"""Notes of a store on the runs that use it: files of ``<store>/.runs``, of two lines.

The first is the resolved config of a run, the second the folder that the run was started in; older notes lack it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eopd.storage import paths
from eopd.storage.errors import DamagedPart
from eopd.storage.files import replace_atomically, sha256_text
from eopd.storage.untrusted import read_plain, refuse_links

NAME_LENGTH = 16
LARGEST = 16_384


@dataclass(frozen=True)
class Note:
    config: Path
    started: Path | None


def write_note(store: Path, config: Path, started: Path) -> None:
    """Note that the run of ``config`` uses the store. Nothing is written where that stands there already."""
    refuse_links(store, paths.RUNS)
    path = store / paths.RUNS / sha256_text(str(config))[:NAME_LENGTH]
    note = Note(config, started)
    try:
        if _read(path) == note:
            return
    except (FileNotFoundError, DamagedPart):
        pass
    replace_atomically(path, f"{config}\n{started}\n")


def notes(store: Path) -> Iterator[tuple[str, Note | DamagedPart]]:
    """Name and content of every note of a store, sorted; of one that cannot be read, what is wrong with it.

    Raises:
        DamagedPart: the folder of the notes is a link.
    """
    refuse_links(store, paths.RUNS)
    try:
        names = sorted(os.listdir(store / paths.RUNS))
    except FileNotFoundError:
        return
    for name in names:
        if name.startswith("."):
            continue
        try:
            yield name, _read(store / paths.RUNS / name)
        except FileNotFoundError:
            continue
        except DamagedPart as error:
            yield name, error


def _read(path: Path) -> Note:
    """Raises DamagedPart, FileNotFoundError."""
    try:
        lines = read_plain(path, LARGEST).decode().strip().split("\n")
    except UnicodeDecodeError as error:
        raise DamagedPart(f"{path} is no text") from error
    if not 1 <= len(lines) <= 2 or not all(line.isprintable() and os.path.isabs(line) for line in lines):
        raise DamagedPart(f"{path} is no note of a run: it names no config by its whole path")
    return Note(Path(lines[0]), Path(lines[1]) if len(lines) == 2 else None)
