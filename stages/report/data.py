"""Data of a report: plain values, so that a page can be drawn without a run.

Produced by ``stages.report.gather`` and ``compare``; read by the other modules of this package. Entropies, divergences
and log-probs are in nats, rates and fractions between 0 and 1. A figure that was not measured is absent.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OWN, FIRST = "own", "first"
"""Whose samples an alignment read: each round's own student's, or the first student's (one fixed set)."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def bounds(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True)
class Histogram:
    """``counts[i]`` tokens with ``edges[i] <= entropy < edges[i + 1]``."""

    edges: list[float]
    counts: list[int]

    def __post_init__(self) -> None:
        _check_bins(self.edges, self.counts)

    def share_above(self, threshold: float | None) -> float | None:
        """Return the share of tokens in bins from ``threshold`` on; None unless it is an edge."""
        start = next((i for i, edge in enumerate(self.edges) if threshold and abs(edge - threshold) < 1e-9), None)
        return None if start is None or not sum(self.counts) else sum(self.counts[start:]) / sum(self.counts)


@dataclass(frozen=True)
class BinnedMeans:
    """A mean per bin of teacher entropy; None if a bin has no token."""

    edges: list[float]
    means: list[Estimate | None]

    def __post_init__(self) -> None:
        _check_bins(self.edges, self.means)


@dataclass(frozen=True)
class RoundData:
    """The student at the start of a round. Round 0 is the first student, before any training.

    Args:
        figures: by name; ``avg`` is Avg@k at k = ``samples``. Names that begin with ``held_out_`` are of teacher and
            student on an evaluation's samples, those that begin with ``first_held_out_`` on the first student's.
        pass_at: Pass@k by k.
        samples: answers a problem.
        measured: whether this student was to be evaluated (``evaluate.every``); lines skip one that was not.
        benchmarks: the same on each benchmark, by name; the figures above are means over them.
    """

    round: int
    figures: dict[str, Estimate] = field(default_factory=dict)
    pass_at: dict[int, Estimate] = field(default_factory=dict)
    problems: int = 0
    samples: int = 0
    measured: bool = True
    benchmarks: dict[str, RoundData] = field(default_factory=dict)

    def value(self, name: str) -> float | None:
        return self.figures[name].value if name in self.figures else None


@dataclass(frozen=True)
class StepRow:
    """One optimizer step and what the objective reported."""

    round: int
    step: int
    figures: dict[str, float]


@dataclass(frozen=True)
class RolloutView:
    """One response, token by token.

    Args:
        prompt: the user's message.
        key: equal for responses to the same prompt.
        entropy: the teacher's, per token.
        logprobs: of the sampled tokens under the student.
        correct: the verifier's verdict; None if there is none.
        truncated: whether the response was cut at the length limit.
    """

    prompt: str
    key: str
    tokens: list[str]
    entropy: list[float]
    logprobs: list[float | None]
    correct: bool | None = None
    truncated: bool = False
    round: int = 0


@dataclass(frozen=True)
class CostRow:
    """Cost of one stage in one round. ``shared``: several runs read it."""

    stage: str
    round: int
    seconds: float | None = None
    tokens: int | None = None
    bytes: int | None = None
    shared: bool = False
    key: str = ""


@dataclass(frozen=True)
class ProblemScores:
    """Results of an evaluation by problem, so that runs can be compared in pairs.

    ``correct[s][i]`` of the ``samples`` answers to problem ``names[i]`` are right with ``seeds[s]``. ``benchmarks[i]``
    is that problem's benchmark, ``sources`` the fingerprint of each benchmark's files.
    """

    round: int
    names: list[str]
    benchmarks: list[str]
    samples: int
    seeds: list[int]
    correct: list[list[int]]
    sources: dict[str, str] = field(default_factory=dict)


Figures = dict[str, tuple[Estimate, Estimate]]
"""Accuracy and response tokens by name."""


@dataclass(frozen=True)
class RoutingData:
    """Modes chosen by the entropy of the first tokens, for one student.

    Args:
        policies: of each way to choose a mode.
        against: the router minus each of the others.
        points: (sum, roughness) of the entropies of each response, by the right mode with the fewest tokens; ``""`` if
            none is right.
    """

    round: int
    problems: int
    policies: Figures
    against: Figures
    points: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class AttributionData:
    """Documents by bin and query set, for one student.

    Args:
        z: of each bin, by query set; None if all bins are alike.
        tests: share of the scores' variance between bins, and p of the permutation test, by query set.
        contrasts: difference of two query sets' standardised scores in each bin, by their names.
    """

    round: int
    documents: int
    bins: list[str]
    z: dict[str, list[float | None]]
    tests: dict[str, tuple[float, float]]
    contrasts: dict[str, list[Estimate]] = field(default_factory=dict)

    @classmethod
    def of(cls, round_: int, content: Mapping[str, Any]) -> AttributionData:
        """Read the results of an attribution. Raises KeyError, TypeError or ValueError if they are others."""
        queries: dict[str, Any] = content["queries"]
        tables = [query["bins"] for query in queries.values()] + [pair["bins"] for pair in content["contrasts"]]
        bins = [" / ".join(map(str, row["bin"])) for row in tables[0]]
        if any(len(rows) != len(bins) for rows in tables):
            raise ValueError("query sets have different bins")
        z: dict[str, list[float | None]] = {}
        tests: dict[str, tuple[float, float]] = {}
        for name, query in queries.items():
            z[name] = [None if row["z"] is None else float(row["z"]) for row in query["bins"]]
            tests[name] = float(query["permutation"]["between"]), float(query["permutation"]["p"])
        contrasts = {
            " - ".join(map(str, pair["of"])): [
                Estimate(float(row["mean"]), *(row["interval"] or (None, None))) for row in pair["bins"]
            ]
            for pair in content["contrasts"]
        }
        return cls(round_, int(content["documents"]), bins, z, tests, contrasts)


@dataclass(frozen=True)
class RunData:
    """One run, or several that differ in their seeds alone.

    Args:
        bins: means by bin of teacher entropy, by whose samples (``OWN``, ``FIRST``) and name of the figure.
        read_with: what alignments must have in common to be comparable, by name.
        routing: of the last student that was routed.
        attribution: of the last student that was attributed.
        threshold: the gate's tau; None if the objective has no gate.
        interval: what the intervals are, such as "95 % bootstrap over problems".
        gains: last minus first evaluation, paired by problem, of ``avg`` and ``pass``.
        scores: of each evaluated round, in order.
        kin: equal for runs that differ in their seed alone.
        head: which ids the divergences of training are of.
        warnings: what a reader must know before believing the figures.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: list[RoundData] = field(default_factory=list)
    training: list[StepRow] = field(default_factory=list)
    teacher_entropy: Histogram | None = None
    student_entropy: Histogram | None = None
    bins: dict[str, dict[str, BinnedMeans]] = field(default_factory=dict)
    read_with: dict[str, str] = field(default_factory=dict)
    routing: RoutingData | None = None
    attribution: AttributionData | None = None
    rollouts: list[RolloutView] = field(default_factory=list)
    cost: list[CostRow] = field(default_factory=list)
    threshold: float | None = None
    interval: str = ""
    gains: dict[str, Estimate] = field(default_factory=dict)
    scores: list[ProblemScores] = field(default_factory=list)
    seed: int | None = None
    kin: str = ""
    graders: list[str] = field(default_factory=list)
    head: str = ""
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def evaluated(self) -> list[RoundData]:
        return [item for item in self.rounds if "avg" in item.figures]


@dataclass(frozen=True)
class ReportData:
    """The content of the page. ``generated``: a date and time in words."""

    title: str
    generated: str
    runs: list[RunData]


def _check_bins(edges: Sequence[float], content: Sequence[object]) -> None:
    if len(content) != max(len(edges) - 1, 0):
        raise ValueError(f"{len(edges)} edges for {len(content)} bins: there must be one more edge than bins")
    if any(right <= left for left, right in itertools.pairwise(edges)):
        raise ValueError(f"edges must increase, got {edges}")
