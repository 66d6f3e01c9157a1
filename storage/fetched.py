"""Artifacts of a bucket as stages read them: scores lazily, by byte range; what has to be files is fetched.

A model, a Parquet file or results are read as files. Those are copied part by part into a store beside the private one
(``<store>/.fetched``), under the ordinary commit rule and checked on the way, so that processes may share them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from zarr.abc.store import Store

from eopd.storage.artifacts import Artifact
from eopd.storage.errors import StoreUnwritable
from eopd.storage.markers import Marker
from eopd.storage.remote import RemoteArtifact
from eopd.storage.stored import Standing
from eopd.storage.transfer import copy


class FetchedArtifact(Artifact):
    """A complete artifact of a bucket.

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
    def _standing(self) -> Standing:
        return self.remote.standing()

    def standing(self) -> Standing:
        return self._standing

    def is_committed(self, part: int) -> bool:
        return part in self._standing.committed

    def marker(self, part: int) -> Marker:
        return self.remote.marker(part)

    def part_store(self, part: int, marker: Marker) -> Store:
        """The part's files, read in place."""
        return self.remote.part_store(part, marker)

    def part_folder(self, part: int) -> Path:
        """The part's files, fetched if they are not here yet.

        Raises:
            MissingPart, DamagedPart, StoreUnreadable; StoreFull, StoreUnwritable: they cannot be kept here.
        """
        here = Artifact(self.store, self.identity)
        if not here.is_committed(part):
            copy(self.remote, self.store, [part])
        with suppress(PermissionError):  # another user's
            os.utime(here.folder)  # `eopd store gc` takes what was not asked for lately
        return here.part_folder(part)

    @property
    def manifest(self) -> dict[str, Any]:
        return self.manifest_content()

    @contextmanager
    def write_part(
        self, part: int, *, inputs: Mapping[str, str] | None = None, info: Mapping[str, Any] | None = None
    ) -> Iterator[Path]:
        raise StoreUnwritable(f"{self} is in a store that is only read")
        yield self.folder
