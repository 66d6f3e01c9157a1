"""Artifacts of a bucket as stages read them: scores by byte range on demand, other files as local copies.

A model, a Parquet file or results are read as files. Those are copied part by part into a store beside the private one
(``<store>/.fetched``), under the ordinary commit rule and checked on the way, so that processes may share them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.abc.store import Store

from eopd.storage.artifacts import Artifact
from eopd.storage.errors import StoreUnwritable
from eopd.storage.listing import open_in
from eopd.storage.markers import Marker
from eopd.storage.remote import RemoteArtifact
from eopd.storage.transfer import copy
from eopd.storage.untrusted import refuse_links

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket


class FetchedArtifact(Artifact):
    """A complete artifact of a bucket; its listing and its parts' bytes are the bucket's.

    Args:
        remote: where it is.
        store: local store that receives the parts that are asked for as files.
    """

    def __init__(self, remote: RemoteArtifact, store: Path) -> None:
        super().__init__(store, remote.identity)
        self.remote = remote
        self.store = store

    def __repr__(self) -> str:
        return repr(self.remote)

    @cached_property
    def _names(self) -> list[str]:
        return self.remote.names()

    def names(self) -> list[str]:
        return self._names

    def has(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str) -> bytes:
        return self.remote.read(name)

    def part_names(self, marker: Marker) -> set[str]:
        return self.remote.part_names(marker)

    def pieces(self, marker: Marker, name: str) -> Iterator[bytes]:
        return self.remote.pieces(marker, name)

    def part_store(self, part: int, marker: Marker) -> Store:
        """Return the part's files, read in place."""
        return self.remote.part_store(part, marker)

    def _checked_folder(self, marker: Marker) -> Path:
        """Return the part's files, downloaded if they are not here yet.

        Raises:
            DamagedPart, StoreUnreadable; StoreFull, StoreUnwritable: they cannot be kept here.
        """
        refuse_links(self.store.parent, self.store.name)
        here = Artifact(self.store, self.identity)
        if marker.part not in here.standing().made:
            copy(self.remote, self.store, [marker.part])
        with suppress(OSError):  # another user's, or on a mount that is only read
            os.utime(here.folder)  # `eopd store gc` removes parts that were not used lately
        return here.remaining_folder(marker.part)

    # -- nothing of it is written ------------------------------------------------------------------------------

    @contextmanager
    def write_part(
        self, part: int, *, inputs: Mapping[str, str] | None = None, info: Mapping[str, Any] | None = None
    ) -> Iterator[Path]:
        raise self._refusal()
        yield self.folder

    def drop_part(self, part: int) -> None:
        raise self._refusal()

    def create(self, name: str, text: str) -> bool:
        raise self._refusal()

    def replace(self, name: str, text: str) -> None:
        raise self._refusal()

    def _refusal(self) -> StoreUnwritable:
        return StoreUnwritable(f"{self} is in a store that is only read")


def open_files(store: Path | Bucket, kind: str, key: str, fetched: Path) -> Artifact:
    """Open an artifact whose parts are read as files; those of a bucket are fetched into ``fetched`` on demand.

    Raises:
        MissingArtifact, DamagedPart, WrongArtifact, NewerSchema; in buckets also StoreUnreadable, StoreUnwritable.
    """
    artifact = open_in(store, kind, key)
    return artifact if isinstance(artifact, Artifact) else FetchedArtifact(artifact, fetched)
