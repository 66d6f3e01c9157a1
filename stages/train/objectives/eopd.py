"""Reverse KL on every token, plus forward KL where the teacher is uncertain: `opd`, `lightning_opd` and `eopd`.

Sources: docs/objectives.md. EOPD is arXiv 2603.07079, Lightning OPD 2604.13010.
"""

from __future__ import annotations

from torch import Tensor

from eopd.stages.train.objectives.base import Objective, SparseStudent, StepContext, TeacherBatch, TokenLoss
from eopd.stages.train.objectives.layout import SupportPlan
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.objectives.terms import above, forward_kl, log_ratio_advantage, policy_gradient, reverse_kl
from eopd.storage.coverage import DrawsNeed, EntropyNeed, ExtraIdsNeed, HeadNeed, Need, SampledNeed, StopsNeed


def forward_needs(settings: ObjectiveSettings, above_entropy: float = -1.0) -> tuple[Need, ...]:
    """Return the needs of `forward_kl` on tokens whose entropy exceeds ``above_entropy``."""
    if settings.support == "sampled":
        if settings.draws == "full":
            return (EntropyNeed(), DrawsNeed("full", n=settings.n_draws))
        return (EntropyNeed(), HeadNeed(1), DrawsNeed("beyond_head"))
    # Beside a bucket any head is a valid support; without one it must be the top k that the formula names.
    return (HeadNeed(1 if settings.support == "bucket" else settings.k, above_entropy),)


def forward_plan(settings: ObjectiveSettings) -> SupportPlan:
    """Return the outcomes of `forward_kl`: draws stand for what the *stored* head omits, so with draws the head is not
    cut to k."""
    if settings.support == "sampled":
        return SupportPlan(head_k=None, draws=settings.draws, extra=settings.student_topk)
    return SupportPlan(head_k=settings.k, extra=settings.student_topk)


def reverse_needs(settings: ObjectiveSettings) -> tuple[Need, ...]:
    if settings.rkl == "sampled":
        return (SampledNeed(),)
    return (HeadNeed(1), *((ExtraIdsNeed(settings.student_topk),) if settings.student_topk else ()))


def round_start_fields(settings: ObjectiveSettings) -> frozenset[str]:
    """Return the fields that come from the round's start: log q, if the objective reads it."""
    sampled = settings.rkl == "sampled"
    return frozenset({"q_old"} if sampled and (settings.advantage == "old" or settings.ratio != "none") else ())


def on_policy_term(
    settings: ObjectiveSettings, student: SparseStudent, teacher: TeacherBatch, context: StepContext
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return L_OPD [T]: the sampled token's surrogate, or the reverse KL over the support and its bucket."""
    if settings.rkl == "topk":
        loss = reverse_kl(student, teacher, "known")
        return loss, {"loss_rkl": loss}
    needed = round_start_fields(settings)
    q_old = context.require("q_old", settings.name) if needed else None
    advantage = log_ratio_advantage(settings.advantage, teacher.sampled, student.sampled, q_old)
    term = policy_gradient(student.sampled, advantage, settings.ratio, q_old, settings.clip_eps, settings.truncate_at)
    parts = {"loss_rkl": term.loss, "advantage": advantage, "ratio": term.ratio, "ratio_squared": term.ratio**2}
    return term.loss, {**parts, "clipped": term.clipped}


def opd(settings: ObjectiveSettings) -> Objective:
    """L_OPD on every token; `lightning_opd` too, with defaults of its own."""

    def token_loss(student: SparseStudent, teacher: TeacherBatch, context: StepContext) -> TokenLoss:
        return TokenLoss(*on_policy_term(settings, student, teacher, context))

    plan = SupportPlan(head_k=settings.k, extra=settings.student_topk)
    return Objective(settings, (*reverse_needs(settings), StopsNeed()), plan, token_loss, round_start_fields(settings))


def eopd(settings: ObjectiveSettings) -> Objective:
    """L_OPD + alpha 1[H > tau] L_FKL; both are divided by the number of all valid tokens."""
    if settings.alpha == 0:
        return opd(settings)

    def token_loss(student: SparseStudent, teacher: TeacherBatch, context: StepContext) -> TokenLoss:
        reverse, parts = on_policy_term(settings, student, teacher, context)
        gate = above(teacher.entropy, settings.tau)
        forward = gate * forward_kl(student, teacher, settings.support)
        return TokenLoss(reverse + settings.alpha * forward, {**parts, "loss_fkl": forward, "gate": gate})

    needs = (EntropyNeed(), *forward_needs(settings, settings.tau), *reverse_needs(settings), StopsNeed())
    unique = tuple(dict.fromkeys(needs))
    return Objective(settings, unique, forward_plan(settings), token_loss, round_start_fields(settings))
