"""From settings to the plan of a run in its store: facts gathered, coverages found."""

from __future__ import annotations

from eopd.pipeline.config import RunSettings
from eopd.pipeline.inspect import gather_facts
from eopd.pipeline.plan import Facts, Plan, make_plan
from eopd.storage.artifacts import Artifact, Identity
from eopd.storage.coverage import Coverage, cheapest, needs_of
from eopd.storage.errors import StoreError
from eopd.storage.fingerprints import Digests
from eopd.storage.stacked import StackedStores


def plan_run(settings: RunSettings, facts: Facts | None = None, digests: Digests | None = None) -> tuple[Facts, Plan]:
    """Facts (gathered, unless given) and plan. A wider coverage that one of the stores has serves scores.

    Args:
        digests: as ``gather_facts``; who plans several runs over one store hashes each file once with them.
    """
    stores = StackedStores.at(settings.store, settings.read_only_stores)
    facts = facts or gather_facts(settings, digests)
    return facts, make_plan(settings, facts, lambda identity: serving_coverage(stores, identity))


def serving_coverage(stores: StackedStores, identity: Identity) -> Identity:
    """``identity``, or the cheapest complete sibling that holds all that it would hold.

    What has been begun as asked is finished as asked: a run never changes its mind half-way.
    """
    if identity.coverage is None or Artifact(stores.private, identity).is_begun():
        return identity
    able: dict[str, Coverage] = {}
    found: dict[str, Identity] = {}
    for artifact in stores.coverages(identity.base_key):
        mapping = artifact.identity.coverage
        if mapping is None or mapping.get("extra") != identity.coverage.get("extra"):
            continue
        try:
            able[artifact.key] = Coverage.from_mapping(mapping)
        except (StoreError, KeyError, TypeError, ValueError):
            continue  # a coverage of another kind of record, such as an imported capture
        found[artifact.key] = artifact.identity
    best = cheapest(able, needs_of(Coverage.from_mapping(identity.coverage).head))
    return identity if best is None else found[best]
