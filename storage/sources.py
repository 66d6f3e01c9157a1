"""Sources of scores: a local artifact, or any other source that can verify its parts in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from zarr.abc.store import Store

from eopd.storage.artifacts import Artifact
from eopd.storage.markers import Marker
from eopd.storage.zarr_inline import FolderStore


class ScoreSource(Protocol):
    """Parts of one artifact, each with its commit marker.

    One with ``part_store(part, marker) -> Store`` has its parts read where they are, and not as files of a folder.
    """

    @property
    def parts(self) -> int: ...

    def committed(self) -> set[int]: ...

    def marker(self, part: int) -> Marker:
        """Raises MissingPart, DamagedPart, WrongArtifact or NewerSchema."""
        ...


def filled_parts(source: ScoreSource) -> Iterator[int]:
    """Return the committed parts that hold data, in order; parts that were set aside are left out. Reads every
    marker."""
    return (part for part in sorted(source.committed()) if source.marker(part).set_aside is None)


def passes_on(source: Artifact, source_part: int, output: Artifact, part: int) -> bool:
    """Return True if a part of ``source`` was set aside, and then set ``part`` of ``output`` aside too."""
    reason = source.marker(source_part).set_aside
    if reason is None:
        return False
    if not output.is_committed(part):
        output.set_aside(part, reason)
    return True


def open_store(source: ScoreSource, part: int) -> tuple[Store, Marker]:
    """Open the files of a committed part, checked against its marker by presence and size; returns them and the
    marker."""
    marker = source.marker(part)
    if hasattr(source, "part_store"):
        store: Store = source.part_store(part, marker)
        return store, marker
    assert isinstance(source, Artifact), source
    return FolderStore(source.part_folder(part), marker.files), marker
