"""Several stores as one: a private store in front of read-only ones (a team's folder, a bucket).

An artifact is read from one store as a whole, and written to the private one. Work in progress in the private store is
finished there (a cancelled submission of which no part was begun does not count); else the first store with the
complete artifact serves it in place. Nothing is copied except files from a bucket (``storage.fetched``). Scores of
another store count only if they were made from the rollouts that are read: two stores may hold rollouts of one key
whose bytes differ (a GPU's do).

A process looks up each artifact in the read-only stores once; later commits there are seen by the next process. Zarr
and obstore are imported when a bucket is opened: planning over folders needs neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.storage import paths
from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.errors import UNSOUND, MissingArtifact, StoreError
from eopd.storage.identity import Identity
from eopd.storage.listing import coverages
from eopd.storage.places import open_place

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket


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
                raise StoreError(f"there is no store at {place}, which is to be read from (read_only_stores)")
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
    from eopd.storage.fetched import FetchedArtifact
    from eopd.storage.remote import RemoteArtifact

    remote = RemoteArtifact(store, kind, key)
    return FetchedArtifact(remote, fetched) if remote.exists() else None


def _coverages(store: Path | Bucket, identity: str) -> list[str]:
    if not isinstance(store, Path):
        from eopd.storage.remote import folders

        return folders(store, f"scores/{identity}")
    return [artifact.identity.key.split("/")[1] for artifact in coverages(store, identity)]
