"""Several stores as one: a private one in front of read-only ones (a team's folder, a bucket).

Reads take the first store that holds what is asked for; writes go to the first store only. Nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.storage import paths
from eopd.storage.artifacts import Artifact, Identity, open_artifact
from eopd.storage.coverage import Coverage, cheapest
from eopd.storage.errors import MissingPart, StoreError
from eopd.storage.needs import Need
from eopd.storage.remote import RemoteArtifact, folders
from eopd.storage.teacher_cache import TeacherCache

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

    def find(self, identity: Identity) -> Artifact | RemoteArtifact:
        """The first complete artifact of this identity; where none is, the private one, to be made or finished."""
        for store in self.stores:
            found = _open(store, identity.kind, identity.key)
            if found is not None and found.is_complete():
                return found
        return Artifact(self.private, identity)

    def find_scores(self, identity: str, needs: Sequence[Need]) -> Artifact | RemoteArtifact:
        """The cheapest complete coverage of scores that answers ``needs``, wherever it lies.

        Args:
            identity: key of the scores without coverage (``Identity.base_key``).

        Raises:
            NeedNotMet: there are complete coverages, but none answers; names what the cheapest lacks.
            MissingPart: no complete coverage of this identity is in any store.
        """
        found: dict[str, Artifact | RemoteArtifact] = {}
        for store in self.stores:
            for name in _coverages(store, identity):
                artifact = _open(store, "scores", f"{identity}/{name}")
                if name not in found and artifact is not None and artifact.is_complete():
                    found[name] = artifact
        if not found:
            raise MissingPart(f"no complete scores {identity} in {self.stores}. Run the score stage.")
        held: dict[str, Coverage] = {name: TeacherCache(artifact).coverage for name, artifact in found.items()}
        best = cheapest(held, needs)
        if best is None:
            widest = max(held, key=lambda name: held[name].cost())
            held[widest].require(needs, repr(found[widest]))
            raise AssertionError(needs)
        return found[best]


def _open(store: Path | Bucket, kind: str, key: str) -> Artifact | RemoteArtifact | None:
    if not isinstance(store, Path):
        remote = RemoteArtifact(store, kind, key)
        try:
            _ = remote.identity
        except StoreError:
            return None
        return remote
    return open_artifact(store, kind, key) if (store / kind / key / paths.IDENTITY).exists() else None


def _coverages(store: Path | Bucket, identity: str) -> list[str]:
    if not isinstance(store, Path):
        return folders(store, f"scores/{identity}")
    found = (store / "scores" / identity).glob(f"*/{paths.IDENTITY}")
    return sorted(path.parent.name for path in found)
