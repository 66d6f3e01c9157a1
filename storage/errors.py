"""Errors of a store, grouped by how a handler would react."""

from __future__ import annotations


class StoreError(Exception):
    """Base of everything a store reports. The message names the artifact, part or file and what to do."""


class MissingPart(StoreError):
    """A part has no commit marker: it was never finished. Run the stage that makes it."""


class PrunedPart(MissingPart):
    """A part was finished and its data were pruned since. The plan rebuilds it if something needs it."""


class MissingArtifact(StoreError):
    """A store has no such artifact."""


class DamagedPart(StoreError):
    """A committed part does not hold what its marker says. `eopd store verify --repair` re-queues it."""


class WrongArtifact(StoreError):
    """A folder, marker or manifest belongs to another artifact than the requested one."""


class NewerSchema(StoreError):
    """A newer eopd wrote this file. Upgrade to read it."""


class StoreFull(StoreError):
    """The disk, quota or bucket is full. Nothing committed is lost; free space and run the same command again."""


class StoreUnwritable(StoreError):
    """The store refuses writes (permissions, a read-only mount or bucket)."""


class NoHardLinks(StoreUnwritable):
    """The file system has no hard links, by which commits are made. Only another one helps."""


class StoreUnreadable(StoreError):
    """The store does not answer (network, service or file system). Try again, or use another copy."""


UNSOUND = (DamagedPart, WrongArtifact, MissingPart, MissingArtifact, NewerSchema)
"""Errors about stored data. Others mean that the data could not be read, which is no damage."""
