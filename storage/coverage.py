"""Coverage of a cache, and whether it meets a consumer's needs.

A coverage is the head rule, the draws and the extra ids that were stored. Each need is a predicate on it. An unmet need
is refused with the missing fields and how to add them; nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eopd.storage.errors import StoreError
from eopd.storage.teacher_record import HeadRule

# -- needs ------------------------------------------------------------------------------------------------------------

# Needs that a consumer may have of a teacher cache, as predicates.
#
# An objective declares its needs; a coverage meets each, or reports what is missing and what would add it.


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


# -- coverage ---------------------------------------------------------------------------------------------------------


class NeedNotMet(StoreError):
    """A cache lacks something that was requested. The message names it and how to add it."""


@dataclass(frozen=True)
class Missing:
    """A need that a coverage does not meet, and the settings that would add it; none if the capture was imported."""

    what: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Coverage:
    """The fields stored of every token."""

    head: HeadRule
    stop_ids: tuple[int, ...] = ()
    extra_k: int = 0  # entries of the student's own top-k a token
    vocab_size: int = 0  # a head of this many is the whole distribution; 0: unknown
    entropy: bool = True  # False: imported from a capture that has none, and estimated
    sampled: bool = True  # False: imported, and known only where the head holds the sampled token

    @classmethod
    def from_mapping(cls, stored: Mapping[str, Any]) -> Coverage:
        return cls(
            head=HeadRule(**stored["head"]),
            stop_ids=tuple(stored.get("stop_ids", ())),
            extra_k=int(stored.get("extra_k", 0)),
            vocab_size=int(stored.get("vocab_size", 0)),
            entropy=bool(stored.get("entropy", True)),
            sampled=bool(stored.get("sampled", True)),
        )

    def lacks(self, need: Need) -> Missing | None:
        """Return what is missing for a need; None if the need is met."""
        head = self.head
        match need:
            case EntropyNeed():
                return None if self.entropy else Missing("full-vocabulary entropy, which an import cannot add")
            case SampledNeed():
                return None if self.sampled else Missing("the sampled tokens' log-probs, which an import cannot add")
            case StopsNeed():
                return None if self.sampled else Missing("stop log-probs, which an import cannot add")
            case HeadNeed(1, _, _):
                return None  # every rule keeps the most probable entry of every token
            case HeadNeed(k, above, min_prob):
                whole = self.vocab_size > 0 and head.k_max >= self.vocab_size
                if not whole and head.k_max < k:
                    return Missing(f"heads of {k} entries (it keeps {head.k_max})", {"score.head.k_max": k})
                if head.full_head_above > above:
                    return Missing(
                        f"full heads where entropy > {above:g} (it has them where > {head.full_head_above:g})",
                        {"score.head.full_head_above": above},
                    )
                if head.full_head_above >= 0 and head.min_prob > min_prob:
                    return Missing(
                        f"ids of probability {min_prob:g} and more (it has those of {head.min_prob:g} and more)",
                        {"score.head.min_prob": min_prob},
                    )
                return None
            case DrawsNeed("beyond_head", _, max_weight):
                if head.draws != "beyond_head":
                    missing = f"draws beyond the head (it has draws: {head.draws})"
                    return Missing(missing, {"score.head.draws": "beyond_head"})
                if head.min_prob > max_weight:
                    return Missing(
                        f"draws of weight at most {max_weight:g} (its draws weigh {head.min_prob:g})",
                        {"score.head.min_prob": max_weight},
                    )
                return None
            case DrawsNeed(_, n, _):
                if head.draws != "full" or head.n_draws < n:
                    return Missing(
                        f"{n} draws a token from the full distribution (it has {head.n_draws} draws: {head.draws})",
                        {"score.head.draws": "full", "score.head.n_draws": n},
                    )
                return None
            case ExtraIdsNeed(k):
                if self.extra_k < k:
                    missing = f"teacher log-probs at the student's top-{k} (it has {self.extra_k})"
                    return Missing(missing, {"rollout.student_topk": k})
                return None
        raise AssertionError(need)

    def require(self, needs: Sequence[Need], where: str) -> None:
        """Raise NeedNotMet, naming every need that ``where`` does not meet and the settings that would add it."""
        missing = [one for need in needs if (one := self.lacks(need)) is not None]
        if not missing:
            return
        added = {name: value for one in missing for name, value in one.settings.items()}
        remedy = (
            f"Add {' '.join(f'{name}={value}' for name, value in added.items())} to the config, or give it to `eopd "
            "run CONFIG` with --set: a sibling coverage is made beside this one, and nothing that exists changes."
            if added
            else "Score these tokens instead of importing them."
        )
        problem = f"{where} lacks {'; '.join(one.what for one in missing)}"
        raise NeedNotMet(problem, setting=next(iter(added), None), remedy=remedy)

    def cost(self) -> tuple[int, float, float, int, int]:
        """Sort key: cost of storing and reading, cheapest first."""
        head = self.head
        return (head.k_max, -head.full_head_above, -head.min_prob, head.n_draws, self.extra_k)


def able(coverages: Mapping[str, Coverage], needs: Sequence[Need]) -> list[str]:
    """Return names of the coverages that meet every need, cheapest first."""
    names = [name for name, coverage in coverages.items() if all(coverage.lacks(need) is None for need in needs)]
    return sorted(names, key=lambda name: (coverages[name].cost(), name))


def needs_of(rule: HeadRule) -> tuple[Need, ...]:
    """Return the needs that a coverage must meet to hold everything that ``rule`` would store."""
    head: tuple[Need, ...] = (HeadNeed(rule.k_max, rule.full_head_above, rule.min_prob),)
    if rule.draws == "none":
        return head
    return (*head, DrawsNeed(rule.draws, n=rule.n_draws, max_weight=rule.min_prob))
