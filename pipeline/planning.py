"""From settings to the plan of a run in its store: facts gathered, coverages found."""

from __future__ import annotations

from collections.abc import Sequence

from eopd.pipeline.config import RunSettings
from eopd.pipeline.inspect import gather_facts
from eopd.pipeline.plan import Facts, Plan, Shelf, make_plan
from eopd.pipeline.store_check import check_folders
from eopd.storage.artifacts import Artifact, Identity
from eopd.storage.coverage import Coverage, able, needs_of
from eopd.storage.errors import StoreError
from eopd.storage.fingerprints import Digests
from eopd.storage.stacked import StackedStores


def plan_run(settings: RunSettings, facts: Facts | None = None, digests: Digests | None = None) -> tuple[Facts, Plan]:
    """Facts (gathered, unless given) and plan. A wider coverage that one of the stores has serves scores.

    Args:
        digests: as ``gather_facts``; who plans several runs over one store hashes each file once with them.
    """
    check_folders(settings)
    stores = StackedStores.at(settings.store, settings.read_only_stores)
    facts = facts or gather_facts(settings, digests)
    return facts, make_plan(settings, facts, StoreShelf(stores))


class StoreShelf(Shelf):
    """What there is in stores. A run never changes its mind half-way: what was begun is finished as it was begun."""

    def __init__(self, stores: StackedStores) -> None:
        self._stores = stores

    def serving(self, asked: Identity) -> Sequence[Identity]:
        """``asked`` where it is begun or has no complete sibling that holds as much; else those, the cheapest first."""
        if asked.coverage is None or self.is_begun(asked):
            return [asked]
        coverages: dict[str, Coverage] = {}
        found: dict[str, Identity] = {}
        for artifact in self._stores.coverages(asked.base_key):
            mapping = artifact.identity.coverage
            if mapping is None or mapping.get("extra") != asked.coverage.get("extra"):
                continue
            try:
                coverages[artifact.key] = Coverage.from_mapping(mapping)
            except (StoreError, KeyError, TypeError, ValueError):
                continue  # a coverage of another kind of record, such as an imported capture
            found[artifact.key] = artifact.identity
        wanted = needs_of(Coverage.from_mapping(asked.coverage).head)
        return [found[name] for name in able(coverages, wanted)] or [asked]

    def is_begun(self, identity: Identity) -> bool:
        return Artifact(self._stores.private, identity).is_begun()
