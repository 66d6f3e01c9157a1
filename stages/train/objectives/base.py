"""Objectives: pure functions of (sparse student, teacher, context) that return a loss per token.

The vocabulary of a token is split into **outcomes**: K columns that the batch names (head, draws, sampled token, ids of
the student's own; the stop tokens as one column where they are merged), and the rest as one mass.

Letters: T tokens, K outcome columns (padded; an unused one has log-prob ``LOG_ZERO``). Logs are natural (nats).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eopd.stages.models.transfer import on_device
from eopd.stages.train.objectives.layout import Layout, SupportPlan
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.stops import StopHandling, swap_stops
from eopd.storage.coverage import Need, SampledNeed, StopsNeed
from eopd.storage.teacher_record import HeadRule, TeacherRows

# -- batches of teacher records ---------------------------------------------------------------------------------------

# Teacher rows of one packed batch as padded tensors, with stop handling applied.
#
# Built once a micro-batch from ``TeacherRows`` (numpy), read by the student head (which ids to evaluate) and by the
# objectives (what the teacher says of them).
#
# Letters: T tokens, N ids to evaluate (ragged), K' padded ids of a token, K = K' + 1 outcomes where stops are merged
# (the merged outcome is column 0), else K = K'. V student vocabulary, E merged stop ids.


Index = NDArray[np.int64]


@dataclass(frozen=True)
class TeacherBatch:
    """Fields marked [T, K] are padded: unused columns have log-prob ``LOG_ZERO`` and weight 0."""

    support_ids: Tensor  # [N] int64 ids to evaluate, merged stops not among them
    support_slots: Tensor  # [N] int64 place of each in [T, K'] flattened
    support_offsets: Index  # [T+1] on the CPU: token t's ids are [offsets[t], offsets[t+1])
    stop_columns: Tensor  # [E] int64 ids merged into outcome 0, those of the student's vocabulary
    width: int  # K'
    logprob: Tensor  # [T, K] teacher log-prob where known, else LOG_ZERO
    in_head: Tensor  # [T, K] bool
    in_extra: Tensor  # [T, K] bool: named by the caller (the student's own top ids)
    target: Tensor  # [T, K] weights of the unbiased forward KL: head probabilities and draws
    tail: Tensor  # [T] log mass outside the head
    known_tail: Tensor  # [T] log mass outside head and extra
    entropy: Tensor  # [T] full vocabulary, nats
    sampled: Tensor  # [T] log-prob of the sampled token
    sampled_column: Tensor  # [T] int64 its outcome
    is_scored: bool = True  # False: only tokens are known, and every statistic of the teacher is NaN

    @property
    def tokens(self) -> int:
        return len(self.support_offsets) - 1

    def slice(self, start: int, stop: int) -> TeacherBatch:
        """Return tokens [start, stop) without synchronising with the device."""
        low, high = int(self.support_offsets[start]), int(self.support_offsets[stop])
        names = (
            "logprob",
            "in_head",
            "in_extra",
            "target",
            "tail",
            "known_tail",
            "entropy",
            "sampled",
            "sampled_column",
        )
        return replace(
            self,
            support_ids=self.support_ids[low:high],
            support_slots=self.support_slots[low:high] - start * self.width,
            support_offsets=self.support_offsets[start : stop + 1] - low,
            **{name: getattr(self, name)[start:stop] for name in names},
        )

    def row_of_support(self) -> Tensor:
        """Return the row number [N] of each evaluated id."""
        return torch.div(self.support_slots, max(self.width, 1), rounding_mode="floor")

    @classmethod
    def build(
        cls,
        rows: TeacherRows,
        rule: HeadRule,
        stops: StopHandling,
        plan: SupportPlan,
        vocab_size: int,
        device: torch.device | str = "cpu",
        *,
        is_scored: bool = True,
    ) -> TeacherBatch:
        """Build the batch of ``rows``; ``rule`` is the coverage's (weight of a draw), ``vocab_size`` the student's.

        Ids outside the student's vocabulary fall to the tail. Raises ValueError when the rows lack what stop
        handling needs, or when a sampled token is outside the student's vocabulary.
        """
        bad = np.flatnonzero((rows.token_ids < 0) | (rows.token_ids >= vocab_size))
        if len(bad):
            raise ValueError(f"sampled token {rows.token_ids[bad[0]]} is outside the student's {vocab_size} ids")
        merged: tuple[int, ...] = ()
        if plan.stops:
            if plan.stop_logprobs:
                stops.require(rows)
            else:
                rows = stops.filled(rows)
            merged = stops.merged if any(i < vocab_size for i in stops.merged) else ()
            if stops.mode == "remap":
                rows = swap_stops(rows, stops)
        stop_logprobs = stops.stop_logprobs(rows) if merged else np.zeros((rows.tokens, 0))
        arrays = Layout(rows, rule, plan, vocab_size, merged, stop_logprobs).arrays()
        offsets, width = arrays.pop("support_offsets"), arrays.pop("width")
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return on_device(device, cls(support_offsets=offsets, width=int(width), is_scored=is_scored, **tensors))


# -- objectives -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseStudent:
    """The student at the outcomes of a batch; ``logprob``, ``rest`` and ``sampled`` carry gradient."""

    logprob: Tensor  # [T, K]
    rest: Tensor  # [T] log of the mass outside all outcomes
    sampled: Tensor  # [T] log-prob of the sampled token
    entropy: Tensor  # [T] over all outcomes and the whole rest, nats, without gradient


@dataclass(frozen=True)
class StepContext:
    """Context of a step besides the two models. ``mask`` is 0 or a weight."""

    mask: Tensor  # [T]
    normaliser: float  # valid tokens of the optimiser step over all micro-batches and ranks, divided by the ranks
    temperature: float = 1.0
    q_old: Tensor | None = None  # [T] log-prob of the sampled token at the round's start
    student_entropy_round: Tensor | None = None  # [T] student entropy at the round's start
    entropy_threshold: float | None = None  # quantile of student_entropy_round over the round (reopold)
    unsure: Tensor | None = None  # [T] bool: above that quantile, equal entropies by key (``reopold.above_quantile``)
    token_key: Tensor | None = None  # [T] int64, one number a (round, response, position) (tropd)
    teacher_prefix: Tensor | None = None  # [T] bool: the teacher wrote this token (``guided``, tropd)
    weight: Tensor | None = None  # [T] factor of the loss, whatever the objective (staleness, position); None: 1
    seed: int = 0
    epoch: int = 0

    def slice(self, start: int, stop: int) -> StepContext:
        names = ("mask", "q_old", "student_entropy_round", "unsure", "token_key", "teacher_prefix", "weight")
        given = {name: getattr(self, name) for name in names}
        return replace(self, **{name: value[start:stop] for name, value in given.items() if value is not None})

    def require(self, name: str, objective: str) -> Tensor:
        """Return a tensor field that ``objective`` needs; raises ValueError if the loop did not give it."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"objective {objective!r} needs context.{name}, which was not given")
        assert isinstance(value, Tensor)
        return value


@dataclass(frozen=True)
class TokenLoss:
    """``loss`` [T] before mask and normaliser; ``parts``: named [T] figures to be summed as metrics."""

    loss: Tensor
    parts: dict[str, Tensor]


LossFunction = Callable[[SparseStudent, TeacherBatch, StepContext], TokenLoss]


@dataclass(frozen=True)
class Objective:
    """One objective: its needs of the cache, the content of its batches, and the function itself.

    ``per_round``: fields of StepContext that come from the round-start pass.
    """

    settings: ObjectiveSettings
    needs: tuple[Need, ...]
    plan: SupportPlan
    token_loss: LossFunction
    per_round: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return self.settings.name

    def needs_with(self, stop_ids: Collection[int]) -> tuple[Need, ...]:
        """Return the needs of a run whose models end with ``stop_ids``: the log-prob of a single one is never read."""
        return tuple(need for need in self.needs if len(set(stop_ids)) > 1 or not isinstance(need, StopsNeed))


def guided(objective: Objective) -> Objective:
    """Combine the objective on the student's own tokens with beta log(p/q) on those that the teacher wrote (arXiv
    2606.01249).

    Its gradient on the teacher's tokens is beta times that of supervised fine-tuning. `tropd` has it as it is.
    """
    if objective.name == "tropd":
        return objective
    beta, own_loss = objective.settings.prefix_beta, objective.token_loss

    def token_loss(student: SparseStudent, teacher: TeacherBatch, context: StepContext) -> TokenLoss:
        prefix = context.require("teacher_prefix", objective.name).bool()
        tokens = own_loss(student, teacher, context)
        taught = torch.where(prefix, beta * (teacher.sampled - student.sampled), 0.0)
        parts = {name: torch.where(prefix, 0.0, value) for name, value in tokens.parts.items()}
        return TokenLoss(torch.where(prefix, taught, tokens.loss), {**parts, "loss_prefix": taught})

    return replace(objective, needs=(*objective.needs, SampledNeed()), token_loss=token_loss)


def outcomes(z: Tensor, z_stops: Tensor, log_rest: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probs [T, K] and log of the rest [T] from logits at outcomes.

    ``z`` [T, K'], ``z_stops`` [T, E] (merged into column 0; E may be 0), ``log_rest`` [T] log-sum-exp of all others.
    """
    if z_stops.shape[1]:
        z = torch.cat([z_stops.logsumexp(dim=1, keepdim=True), z], dim=1)
    total = torch.cat([z, log_rest[:, None]], dim=1).logsumexp(dim=1)
    return z - total[:, None], log_rest - total
