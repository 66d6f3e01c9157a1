"""Length of the teacher's part of a response (arXiv 2606.01249)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from eopd.stages.engines.sampling import derive_seed
from eopd.stages.rollout.settings import RolloutSettings


@dataclass(frozen=True)
class Prefixes:
    """Limits on the teacher's tokens in one round.

    The limit falls from ``start`` to ``end`` by half a cosine: L(t) = end + (start - end) (1 + cos(pi t)) / 2, rounded
    down, where t goes from 0 to 1 over the run. The paper states that the limit starts at the longest response and ends
    at 0, not whether a prefix is as long as the limit (`cap`) or shorter (`uniform`).
    """

    start: int
    end: int
    first: int  # place in the run of the round's first response (or of the round)
    step: int  # from one response of the round to the next: 1, or 0 if the whole round has one limit
    total: int  # places of the run
    uniform: bool

    def limit(self, rank: int) -> int:
        """Return the most tokens of the teacher in the response of that rank in its round."""
        progress = (self.first + self.step * rank) / max(self.total - 1, 1)
        return math.floor(self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * progress)) + 1e-9)

    def length(self, rank: int, seed: int, prompt_id: str, sample: int) -> int:
        """Return the tokens of the teacher in a response, if the teacher's response is long enough."""
        limit = self.limit(rank)
        return derive_seed(seed, "prefix", prompt_id, sample) % (limit + 1) if self.uniform else limit

    def identity(self) -> dict[str, Any]:
        """Return the values that enter the key of the round's rollouts: its limit, or where in the cosine it lies."""
        how = "uniform" if self.uniform else "cap"
        if not self.step:
            return {"limit": self.limit(0), "length": how}
        return {"start": self.start, "end": self.end, "first": self.first, "total": self.total, "length": how}


def prefixes_of(settings: RolloutSettings, rounds: int, round_: int, responses: int) -> Prefixes | None:
    """Return the prefixes of a round of so many responses; None if the teacher writes nothing in it."""
    if settings.source != "prefix":
        return None
    prefix = settings.prefix
    by_response = prefix.over == "responses"
    prefixes = Prefixes(
        start=settings.max_new_tokens if prefix.start is None else prefix.start,
        end=prefix.end,
        first=round_ * responses if by_response else round_,
        step=int(by_response),
        total=rounds * responses if by_response else rounds,
        uniform=prefix.length == "uniform",
    )
    return prefixes if max(prefixes.limit(0), prefixes.limit(responses - 1)) > 0 else None
