"""Needs that a consumer may have of a teacher cache, as predicates.

An objective declares its needs; a coverage meets each, or reports what is missing and what would add it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EntropyNeed:
    """Full-vocabulary entropy of every token."""


@dataclass(frozen=True)
class SampledNeed:
    """Log-prob of the sampled token."""


@dataclass(frozen=True)
class StopsNeed:
    """Log-probs of the stop ids."""


@dataclass(frozen=True)
class HeadNeed:
    """The ``k`` most probable ids of every token whose entropy exceeds ``above`` (nats; -1: every token); for other
    tokens those with probability at least ``min_prob``, and always the first."""

    k: int
    above: float = -1.0
    min_prob: float = 1.0


@dataclass(frozen=True)
class DrawsNeed:
    """Unbiased draws: ``beyond_head`` of the rest (any draw weight up to ``max_weight``), or ``full`` with >= n."""

    mode: Literal["beyond_head", "full"]
    n: int = 0
    max_weight: float = 1.0


@dataclass(frozen=True)
class ExtraIdsNeed:
    """Teacher log-probs at the student's own top-k ids at rollout time, at least ``k`` of them."""

    k: int = 1


Need = EntropyNeed | SampledNeed | StopsNeed | HeadNeed | DrawsNeed | ExtraIdsNeed
