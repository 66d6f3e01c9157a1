"""Objectives: pure functions of (sparse student, teacher, context) that return a loss per token.

The vocabulary of a token is split into **outcomes**: K columns that the batch names (head, draws, sampled token, ids of
the student's own; the stop tokens as one column where they are merged), and the rest as one mass.

Letters: T tokens, K outcome columns (padded; an unused one has log-prob ``LOG_ZERO``). Logs are natural (nats).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eopd.stages.train.objectives.layout import SupportPlan
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.objectives.teacher_batch import TeacherBatch
from eopd.storage.coverage import Need, SampledNeed, StopsNeed


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
