"""Several stores as one: a private store in front of read-only ones (a team's folder, a bucket).

An artifact is read from one store as a whole, and written to the private one. Work in progress in the private store is
finished there (a cancelled submission of which no part was begun does not count); else the first store with the
complete artifact serves it in place. Nothing is copied except files from a bucket (``storage.stacked``). Scores of
another store count only if they were made from the rollouts that are read: two stores may hold rollouts of one key
whose bytes differ (a GPU's do).

A process looks up each artifact in the read-only stores once; later commits there are seen by the next process. Zarr
and obstore are imported when a bucket is opened: planning over folders needs neither.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.abc.store import Store

from eopd.storage import paths
from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.errors import UNSOUND, MissingArtifact, StoreError, StoreUnwritable
from eopd.storage.identity import Identity
from eopd.storage.listing import coverages, open_in
from eopd.storage.markers import Marker
from eopd.storage.places import open_place
from eopd.storage.remote import RemoteArtifact, copy
from eopd.storage.untrusted import refuse_links

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket


# -- fetched ----------------------------------------------------------------------------------------------------------

# Artifacts of a bucket as stages read them: scores by byte range on demand, other files as local copies.
#
# A model, a Parquet file or results are read as files. Those are copied part by part into a store beside the private
# one (``<store>/.fetched``), under the ordinary commit rule and checked on the way, so that processes may share them.


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


# -- stacked stores ---------------------------------------------------------------------------------------------------


class StackedStores:
    """Args:
    stores: folders or buckets, the first one private (the only one written to), the rest only read.
    """

    def __init__(self, stores: Sequence[Path | Bucket]) -> None:
        if not stores or not isinstance(stores[0], Path):
            raise ValueError(f"the first of stacked stores is a local folder to write to, got {list(stores)!r}")
        self.private: Path = stores[0]
        self.stores = list(stores)
        self._elsewhere: dict[tuple[str, str], tuple[int, Artifact] | None] = {}
        self._fitting: dict[tuple[int, str, str], bool] = {}

    @classmethod
    def at(cls, private: str, read_only: Sequence[str]) -> StackedStores:
        """Open the stores by folder and URL.

        Raises:
            StoreError: one of the read-only ones is no folder, or a bucket that cannot be opened.
        """
        behind = [open_place(place) for place in read_only]
        for place, store in zip(read_only, behind, strict=True):
            if isinstance(store, Path) and not store.is_dir():
                raise StoreError(
                    f"there is no store at {place}, which is to be read from (read_only_stores)",
                    setting="read_only_stores",
                    file=place,
                )
        return cls([Path(private), *behind])

    def find(self, identity: Identity) -> Artifact:
        """Return the artifact of this identity to read from, or to make (in the private store)."""
        own = Artifact(self.private, identity)
        if len(self.stores) == 1 or own.is_under_way():
            return own
        complete = self._complete(identity.kind, identity.key)
        if complete is None or not self._fits(*complete):
            return own
        return complete[1]

    def coverages(self, identity: str) -> list[Artifact]:
        """Return every complete coverage of the scores with this identity key, in the order of the stores."""
        by_key: dict[str, Artifact] = {}
        for artifact in coverages(self.private, identity):
            if is_whole(artifact):
                by_key[artifact.key] = artifact
        for store in self.stores[1:]:
            for name in _coverages(store, identity):
                key = f"{identity}/{name}"
                with suppress(*UNSOUND):  # of another artifact than the requested one: no reason to stop
                    elsewhere = self._complete("scores", key)
                    if key not in by_key and elsewhere is not None and self._fits(*elsewhere):
                        by_key[key] = elsewhere[1]
        return list(by_key.values())

    def _complete(self, kind: str, key: str) -> tuple[int, Artifact] | None:
        """Return the number of the first read-only store that has the complete artifact."""
        if (kind, key) not in self._elsewhere:
            self._elsewhere[kind, key] = next(self._search(kind, key), None)
        return self._elsewhere[kind, key]

    def _search(self, kind: str, key: str) -> Iterator[tuple[int, Artifact]]:
        for number, store in enumerate(self.stores[1:], 1):
            artifact = _open(store, kind, key, self.private / paths.FETCHED)
            if artifact is not None and is_whole(artifact):
                yield number, artifact

    def _fits(self, number: int, artifact: Artifact) -> bool:
        """True unless its parts were made from other bytes of rollouts than those that this stack reads.

        Artifacts made by part from rollouts record the checksum of each rollout part in their markers.
        """
        key = artifact.identity.inputs.get("rollouts")
        if key is None:
            return True
        known = self._fitting.get((number, artifact.kind, artifact.key))
        if known is not None:
            return known
        read = _open(self.private, "rollouts", key, self.private)
        if read is None or not read.standing().made:
            elsewhere = self._complete("rollouts", key)
            if elsewhere is None or elsewhere[0] == number:
                return True
            read = elsewhere[1]
        fits = True
        if artifact.parts == read.parts:
            made_from = {part: artifact.marker(part).inputs.get("rollouts") for part in read.committed()}
            by_part = any(made_from.values())
            fits = not by_part or all(checksum == read.marker(part).checksum for part, checksum in made_from.items())
        if is_whole(read):  # else more of them may come, and others than those
            self._fitting[number, artifact.kind, artifact.key] = fits
        return fits


def is_whole(artifact: Artifact) -> bool:
    """True if every part can be read: the artifact is complete, and nothing was pruned since."""
    return len(artifact.committed()) == artifact.parts


def _open(store: Path | Bucket, kind: str, key: str, fetched: Path) -> Artifact | None:
    if isinstance(store, Path):
        try:
            return open_artifact(store, kind, key)
        except MissingArtifact:
            return None
    from eopd.storage.remote import RemoteArtifact

    remote = RemoteArtifact(store, kind, key)
    return FetchedArtifact(remote, fetched) if remote.exists() else None


def _coverages(store: Path | Bucket, identity: str) -> list[str]:
    if not isinstance(store, Path):
        from eopd.storage.remote import folders

        return folders(store, f"scores/{identity}")
    return [artifact.identity.key.split("/")[1] for artifact in coverages(store, identity)]
