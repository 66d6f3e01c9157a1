"""What a report is made of: plain data, so that the page needs no run to be tested.

Produced by ``stages.report.gather``; read by every other module of this package. Entropies, divergences and
log-probs are in nats; rates and fractions lie between 0 and 1. ``None`` means *not measured* and is never drawn as
zero; NaN and inf mean *measured and not finite*.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

_CONFIG = ConfigDict(extra="forbid")
Interval = tuple[float, float]
FIRST = "first_"
"""Before the name of a figure of teacher and student that is of the first student's samples, the fixed set."""
FORWARD_KL = "Forward KL"
"""Among figures by entropy bin."""


@dataclass(frozen=True, config=_CONFIG)
class Estimate:
    """A figure with its interval, for instance a paired difference between the last round and the first."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, config=_CONFIG)
class Histogram:
    """``counts[i]`` tokens with ``edges[i] <= entropy < edges[i + 1]`` (nats)."""

    edges: list[float]
    counts: list[int]

    def __post_init__(self) -> None:
        _check_bins("counts", self.edges, len(self.counts))


@dataclass(frozen=True, config=_CONFIG)
class BinnedMean:
    """A mean per teacher-entropy bin; ``None`` where a bin holds no token. ``counts`` are tokens a bin."""

    edges: list[float]
    means: list[float | None]
    counts: list[int] | None = None
    intervals: list[Interval | None] | None = None

    def __post_init__(self) -> None:
        _check_bins("means", self.edges, len(self.means))
        if self.counts is not None:
            _check_bins("counts", self.edges, len(self.counts))
        if self.intervals is not None:
            _check_bins("intervals", self.edges, len(self.intervals))

    @property
    def bounds(self) -> list[Interval | None]:
        return self.intervals or [None] * len(self.means)


@dataclass(frozen=True, config=_CONFIG)
class RoundData:
    """Figures of the student at a round's start. Round 0 is the first student, before any training.

    From ``student_entropy`` to ``fkl``: of the round's first step, before any update. ``tokens``: that it trains on.
    ``token_entropy``: of what the evaluation sampled (nats); ``ungraded``: answers that the grader gave up on;
    ``left_out``: problems that were not evaluated. From ``held_out_entropy`` on: of teacher and student on the
    evaluation's samples, exact over the full vocabulary; ``uncertain_fkl`` is of tokens whose teacher entropy exceeds
    the threshold, ``student_above`` and ``teacher_above`` are the shares of tokens with more entropy than that. They
    are of the student's own samples, those that begin with ``first_`` of the first student's, one fixed set.
    ``intervals``: of any of the single figures, by its name.
    ``measured``: whether this student was to be evaluated; a line goes from one that was to the next.
    ``benchmarks``: the evaluation's figures on each of its benchmarks, by name; those above are means over them.
    """

    round: int
    avg_at_k: dict[int, float] = field(default_factory=dict)
    pass_at_k: dict[int, float] = field(default_factory=dict)
    avg_interval: dict[int, Interval] = field(default_factory=dict)
    pass_interval: dict[int, Interval] = field(default_factory=dict)
    student_entropy: float | None = None
    teacher_entropy: float | None = None
    gate_fraction: float | None = None
    rkl: float | None = None
    fkl: float | None = None
    tokens: int | None = None
    truncation_rate: float | None = None
    stop_rate: float | None = None
    response_length: float | None = None
    distinct_correct: float | None = None
    self_bleu: float | None = None
    distinct_4: float | None = None
    token_entropy: float | None = None
    ungraded: int | None = None
    left_out: int | None = None
    held_out_entropy: float | None = None
    held_out_teacher_entropy: float | None = None
    held_out_fkl: float | None = None
    held_out_rkl: float | None = None
    uncertain_fkl: float | None = None
    agreement: float | None = None
    student_above: float | None = None
    teacher_above: float | None = None
    first_held_out_entropy: float | None = None
    first_held_out_teacher_entropy: float | None = None
    first_held_out_fkl: float | None = None
    first_held_out_rkl: float | None = None
    first_uncertain_fkl: float | None = None
    first_agreement: float | None = None
    first_student_above: float | None = None
    first_teacher_above: float | None = None
    intervals: dict[str, Interval] = field(default_factory=dict)
    measured: bool = True
    benchmarks: dict[str, RoundData] = field(default_factory=dict)


@dataclass(frozen=True, config=_CONFIG)
class StepRow:
    """One optimiser step. ``further`` holds whatever else the objective reported."""

    round: int
    step: int
    loss: float | None = None
    rkl: float | None = None
    fkl: float | None = None
    gate_fraction: float | None = None
    teacher_entropy: float | None = None
    student_entropy: float | None = None
    retained_mass: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    further: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> StepRow:
        """From one line of a metrics file: unknown numeric keys go to ``further``, other unknown keys are left out."""
        own = {item.name for item in fields(cls)} - {"further"}
        known = {name: value for name, value in row.items() if name in own}
        further = {
            name: float(value)
            for name, value in row.items()
            if name not in own and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        return cls(**known, further=further)


@dataclass(frozen=True, config=_CONFIG)
class RolloutView:
    """One response, token by token. ``entropy``: the teacher's, nats; ``logprobs``: the sampled token's under the
    student. ``verdict`` is the verifier's word, free text. Rollouts of one ``prompt`` are shown side by side.
    """

    prompt: str
    tokens: list[str]
    entropy: list[float | None] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    correct: bool | None = None
    verdict: str = ""
    round: int | None = None

    def __post_init__(self) -> None:
        for name in ("entropy", "logprobs"):
            found = len(getattr(self, name))
            if found not in (0, len(self.tokens)):
                raise ValueError(f"{name} has {found} entries for {len(self.tokens)} tokens: give one each, or none")


@dataclass(frozen=True, config=_CONFIG)
class CostRow:
    """What one stage of one round took. ``shared``: done once and read by several runs."""

    stage: str
    round: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    bytes: int | None = None
    shared: bool = False
    key: str = ""


@dataclass(frozen=True, config=_CONFIG)
class ProblemScores:
    """The evaluation after ``round``, problem by problem, so that runs can be compared in pairs.

    ``correct[s][i]`` of the ``samples`` samples of problem ``names[i]`` are right with ``seeds[s]``; ``benchmarks[i]``:
    the problem's benchmark (benchmarks count the same, whatever their size); ``sources``: the fingerprint of each
    benchmark's files.
    """

    round: int
    names: list[str]
    benchmarks: list[str]
    samples: int
    seeds: list[int]
    correct: list[list[int]]
    sources: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.seeds) != len(self.correct) or any(len(row) != len(self.names) for row in self.correct):
            raise ValueError("correct must hold a row for each seed and in it a count for each name")
        if len(self.benchmarks) != len(self.names):
            raise ValueError(f"benchmarks has {len(self.benchmarks)} entries for {len(self.names)} names")


@dataclass(frozen=True, config=_CONFIG)
class RunData:
    """One run, or several that differ in nothing but their seeds.

    ``threshold``: the gate's tau (nats); ``interval``: what the intervals are, such as "95 % bootstrap over problems";
    the gains are last minus first round, paired where they can be; ``scores``: one entry an evaluated round, in order.
    ``by_entropy_bin``: means by bin of teacher entropy, by title, of the student's own samples;
    ``first_by_entropy_bin``: of the first student's; ``read_with``: what both are measured with, by name (teacher ...).
    Runs of equal ``kin`` differ in ``seed`` at most. ``graders``: verifiers with their versions; ``warnings``: what a
    reader must know before believing the figures. ``head``: the ids that the divergences of training are of, in words.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: list[RoundData] = field(default_factory=list)
    training: list[StepRow] = field(default_factory=list)
    entropy_histogram_teacher: Histogram | None = None
    entropy_histogram_student: Histogram | None = None
    by_entropy_bin: dict[str, BinnedMean] = field(default_factory=dict)
    first_by_entropy_bin: dict[str, BinnedMean] = field(default_factory=dict)
    read_with: dict[str, str] = field(default_factory=dict)
    rollouts: list[RolloutView] = field(default_factory=list)
    cost: list[CostRow] = field(default_factory=list)
    threshold: float | None = None
    interval: str = ""
    avg_gain: Estimate | None = None
    pass_gain: Estimate | None = None
    scores: list[ProblemScores] = field(default_factory=list)
    seed: int | None = None
    kin: str = ""
    graders: list[str] = field(default_factory=list)
    head: str = ""
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, config=_CONFIG)
class ReportData:
    """Everything the page shows. ``generated``: a date and time in words, printed as it is."""

    title: str
    generated: str
    runs: list[RunData]


def _check_bins(name: str, edges: list[float], found: int) -> None:
    if found != max(len(edges) - 1, 0):
        raise ValueError(f"{name} has {found} entries for {len(edges)} edges: there must be one fewer than edges")
    if any(right <= left for left, right in itertools.pairwise(edges)):
        raise ValueError(f"edges must increase, got {edges}")
