"""Avg@k and Pass@k as the page shows them beside each other: at which k, under which name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eopd.stages.report import words
from eopd.stages.report.data import Estimate, RoundData, RunData


@dataclass(frozen=True)
class Rate:
    """``name`` such as Pass@8; ``k`` None: all samples of each evaluation, however many those are."""

    which: Literal["avg", "pass"]
    k: int | None
    name: str
    note: str

    def of(self, item: RoundData) -> Estimate | None:
        """After one round, with its interval; None where it was not measured."""
        values = getattr(item, f"{self.which}_at_k")
        k = max(values, default=None) if self.k is None else self.k
        if k not in values:
            return None
        return Estimate(values[k], *getattr(item, f"{self.which}_interval").get(k, (None, None)))


def rates(runs: Sequence[RunData]) -> list[Rate]:
    """Avg@k of all samples, since its expectation is the same for every k, and Pass@k at the largest k that all
    evaluated runs have.
    """
    found = []
    samples = sorted({max(item.avg_at_k) for run in runs for item in run.rounds if item.avg_at_k})
    if samples:
        few = "" if len(samples) == 1 else f", of {words.joined([str(n) for n in samples])} a problem"
        name = f"Avg@{samples[0]}" if len(samples) == 1 else "Avg@k"
        found.append(Rate("avg", None, name, f"mean share of right samples{few}"))
    ks = [set().union(*(item.pass_at_k for item in run.rounds)) for run in runs]
    shared = set.intersection(*filter(None, ks)) if any(ks) else set()
    if shared:
        k = max(shared)
        found.append(Rate("pass", k, f"Pass@{k}", f"share of problems solved in {k} samples"))
    return found
