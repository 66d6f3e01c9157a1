"""Objectives without a policy gradient: `fkl`, `rkl_topk`, `jsd`, `rs_kd` (arXiv 2503.16870) and `sft`."""

from __future__ import annotations

from eopd.stages.train.objectives.base import Objective, SparseStudent, StepContext, TeacherBatch, TokenLoss
from eopd.stages.train.objectives.eopd import forward_needs, forward_plan
from eopd.stages.train.objectives.layout import SupportPlan
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.objectives.terms import forward_kl, jensen_shannon, reverse_kl
from eopd.storage.coverage import DrawsNeed, ExtraIdsNeed, HeadNeed, StopsNeed


def fkl(settings: ObjectiveSettings) -> Objective:
    """Forward KL on every token, by support mode."""

    def token_loss(student: SparseStudent, teacher: TeacherBatch, context: StepContext) -> TokenLoss:
        loss = forward_kl(student, teacher, settings.support)
        return TokenLoss(loss, {"loss_fkl": loss})

    return Objective(settings, (*forward_needs(settings), StopsNeed()), forward_plan(settings), token_loss)


def rkl_topk(settings: ObjectiveSettings) -> Objective:
    """Reverse KL over the head (and the student's own top ids) with a bucket for the rest."""

    def token_loss(student: SparseStudent, teacher: TeacherBatch, context: StepContext) -> TokenLoss:
        loss = reverse_kl(student, teacher, "known")
        return TokenLoss(loss, {"loss_rkl": loss})

    extra = (ExtraIdsNeed(settings.student_topk),) if settings.student_topk else ()
    plan = SupportPlan(head_k=settings.k, extra=settings.student_topk)
    return Objective(settings, (HeadNeed(1), *extra, StopsNeed()), plan, token_loss)


def jsd(settings: ObjectiveSettings) -> Objective:
    """Generalised Jensen-Shannon divergence over the head with a bucket for the rest."""

    def token_loss(student: SparseStudent, teacher: TeacherBatch, context: StepContext) -> TokenLoss:
        loss = jensen_shannon(student, teacher, settings.beta)
        return TokenLoss(loss, {"loss_jsd": loss})

    return Objective(settings, (HeadNeed(1), StopsNeed()), SupportPlan(head_k=settings.k), token_loss)


def rs_kd(settings: ObjectiveSettings) -> Objective:
    """-sum (count / N) log q over N draws with replacement from p: cross-entropy, so p's entropy is not subtracted."""

    def token_loss(student: SparseStudent, teacher: TeacherBatch, context: StepContext) -> TokenLoss:
        loss = -(teacher.target * student.logprob).sum(dim=1)
        return TokenLoss(loss, {"loss_draws": loss})

    plan = SupportPlan(head_k=settings.k, draws="full", stop_logprobs=False)
    return Objective(settings, (DrawsNeed("full", n=settings.n_draws),), plan, token_loss)


def sft(settings: ObjectiveSettings) -> Objective:
    """-log q(y): needs no teacher and leaves stop tokens as they are."""

    def token_loss(student: SparseStudent, teacher: TeacherBatch, context: StepContext) -> TokenLoss:
        return TokenLoss(-student.sampled, {"loss_sft": -student.sampled})

    return Objective(settings, (), SupportPlan(head_k=1, stops=False), token_loss)
