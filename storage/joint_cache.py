"""The scores of one set of rollouts by several teachers, read as one cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from eopd.storage.coverage import Coverage
from eopd.storage.needs import Need
from eopd.storage.ragged import offsets_of, take_ranges
from eopd.storage.sources import ScoreSource, filled_parts
from eopd.storage.teacher_cache import TeacherCache, concatenate
from eopd.storage.teacher_record import Int64, TeacherRows

_OF_A_TOKEN = {
    "head_offsets": ("head_ids", "head_logprobs"),
    "draw_offsets": ("draw_ids",),
    "extra_offsets": ("extra_ids", "extra_logprobs"),
}


class JointCache:
    """Random access to the scores of several artifacts, each of which holds those of its teacher's prompts.

    Part i of each was scored from part i of the same rollouts; a response is read from the artifact that has tokens of
    it. With one artifact it reads what ``TeacherCache`` reads.
    """

    def __init__(self, artifacts: Sequence[ScoreSource]) -> None:
        assert artifacts
        self.artifacts = tuple(artifacts)
        self.caches = tuple(TeacherCache(artifact) for artifact in artifacts)
        self._filled = tuple(set(filled_parts(artifact)) for artifact in artifacts)
        self._owners: dict[int, Int64] = {}

    def __repr__(self) -> str:
        return " and ".join(map(repr, self.artifacts))

    @cached_property
    def coverage(self) -> Coverage:
        """Coverage of the first artifact. Raises MissingPart if nothing is committed."""
        return self.caches[0].coverage

    def require(self, needs: Sequence[Need]) -> None:
        """Raise NeedNotMet, naming what is missing and the command that adds it."""
        for cache in self.caches:
            cache.require(needs)

    def parts(self) -> Iterator[int]:
        """Return the parts that hold scores of any teacher, in order."""
        return iter(sorted(set().union(*self._filled)))

    def sources(self, part: int) -> list[ScoreSource]:
        """Return the artifacts that hold scores of a part."""
        return [artifact for artifact, filled in zip(self.artifacts, self._filled, strict=True) if part in filled]

    def token_counts(self, part: int) -> Int64:
        """Return the number of scored tokens of each response [S]."""
        counts = [
            cache.token_counts(part) for cache, filled in zip(self.caches, self._filled, strict=True) if part in filled
        ]
        return np.max(counts, axis=0)

    def read_part(self, part: int) -> TeacherRows:
        """Read all responses of a part, possibly none."""
        if len(self.caches) == 1:
            return self.caches[0].read_part(part)
        return self.read([(part, row) for row in range(len(self.token_counts(part)))])

    def read(self, responses: Sequence[tuple[int, int]]) -> TeacherRows:
        """Read the rows of ``responses`` (part, row in the part), in this order, as ``TeacherCache.read``."""
        if len(self.caches) == 1 or not responses:
            return self.caches[0].read(responses)
        owners = np.asarray([self._owner(part)[row] for part, row in responses])
        pieces, order = [], []
        for number, cache in enumerate(self.caches):
            own = np.flatnonzero(owners == number)
            if len(own):
                pieces.append(cache.read([responses[place] for place in own]))
                order.append(own)
        return in_order(concatenate(pieces), np.argsort(np.concatenate(order)))

    def _owner(self, part: int) -> Int64:
        """Return which cache holds each response of a part [S]; the first that has the part if none has tokens."""
        if part not in self._owners:
            there = [number for number, filled in enumerate(self._filled) if part in filled]
            counts = np.stack([self.caches[number].token_counts(part) for number in there])
            self._owners[part] = np.asarray(there)[counts.argmax(axis=0)]
        return self._owners[part]


def in_order(rows: TeacherRows, order: Int64) -> TeacherRows:
    """Return the responses of ``rows`` in another order: first number ``order[0]``."""
    counts = np.diff(rows.response_offsets)[order]
    tokens = take_ranges(rows.response_offsets[:-1][order], counts)
    taken: dict[str, Any] = {
        name: getattr(rows, name)[tokens]
        for name in ("token_ids", "entropy", "sampled_logprob", "sampled_rank", "stop_logprobs", "tail_logmass")
    }
    for offsets_name, names in _OF_A_TOKEN.items():
        offsets = getattr(rows, offsets_name)
        entries = np.diff(offsets)[tokens]
        places = take_ranges(offsets[:-1][tokens], entries)
        taken |= {name: getattr(rows, name)[places] for name in names}
        taken[offsets_name] = offsets_of(entries)
    return replace(rows, response_offsets=offsets_of(counts), **taken)
