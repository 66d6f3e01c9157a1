"""Notes on which artifacts a run refers to, in the store (``<store>/.runs/<id>.json``) and in the run's folder.

Producer: ``pipeline.retention``, which decides by these notes what may be pruned and collected.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eopd.storage import paths
from eopd.storage.errors import DamagedPart
from eopd.storage.files import canonical_json, replace_atomically, sha256_text
from eopd.storage.untrusted import naming_misfits, read_json, refuse_links

NAME_LENGTH = 16
SCHEMA = 1

Parts = set[tuple[str, int]]
"""(key of a checkpoint, part of it)"""

Keys = set[tuple[str, str]]
"""(kind, key) of artifacts"""


@dataclass(frozen=True)
class Note:
    """The artifacts that one run refers to."""

    config: Path  # the run's resolved config
    store: Path
    read_only: tuple[Path, ...]  # folders that the run only reads
    artifacts: Keys
    wanted: Parts  # of checkpoints

    @classmethod
    def read(cls, path: Path) -> Note:
        """Raises DamagedPart if the file holds no note; FileNotFoundError."""
        content: Any = read_json(path)
        with naming_misfits(str(path)):
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']!r} is of another version of eopd")
            folders = [content["config"], content["store"], *content["read_only"]]
            if not all(
                isinstance(folder, str) and folder.isprintable() and os.path.isabs(folder) for folder in folders
            ):
                raise ValueError("it names a folder by no absolute path")
            return cls(
                config=Path(content["config"]),
                store=Path(content["store"]),
                read_only=tuple(map(Path, content["read_only"])),
                artifacts={(str(kind), str(key)) for kind, key in content["artifacts"]},
                wanted={(str(key), int(part)) for key, part in content["wanted"]},
            )

    def text(self) -> str:
        content: dict[str, Any] = {
            "schema": SCHEMA,
            "config": str(self.config),
            "store": str(self.store),
            "read_only": [str(folder) for folder in self.read_only],
            "artifacts": sorted(self.artifacts),
            "wanted": sorted(self.wanted),
        }
        return canonical_json(content) + "\n"


def note_name(config: Path) -> str:
    return f"{sha256_text(str(config))[:NAME_LENGTH]}.json"


def write_note(store: Path, note: Note, own_copy: Path | None = None) -> None:
    """Write a note into the store and, if ``own_copy`` names a file, into the run's folder. An equal note is kept."""
    refuse_links(store, paths.RUNS)
    for path in (own_copy, store / paths.RUNS / note_name(note.config)):
        if path is None:
            continue
        try:
            if Note.read(path) == note:
                continue
        except (FileNotFoundError, DamagedPart):
            pass
        replace_atomically(path, note.text())


def notes(store: Path) -> Iterator[tuple[str, Note | DamagedPart]]:
    """Return name and content of every note in a store, sorted; for an unreadable one, the problem.

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
            yield name, Note.read(store / paths.RUNS / name)
        except FileNotFoundError:
            continue
        except DamagedPart as error:
            yield name, error
