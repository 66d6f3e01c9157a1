"""`vopd` (arXiv 2605.07865): the policy gradient with the reverse KL of the token's distribution as baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from eopd.stages.train.objectives.base import Objective, SparseStudent, StepContext, TeacherBatch, TokenLoss
from eopd.stages.train.objectives.layout import LOG_ZERO, SupportPlan
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.objectives.terms import members, policy_gradient, reverse_kl
from eopd.storage.coverage import ExtraIdsNeed, HeadNeed, Need, SampledNeed, StopsNeed


def baseline(settings: ObjectiveSettings, student: SparseStudent, teacher: TeacherBatch) -> Tensor:
    """Return b [T]: reverse KL on a support that is chosen without the sampled token, which would bias the gradient.

    `bucket`: head (and the student's own top ids) and everything else as one outcome; `renormalised` (the published
    code): both models renormalised on the student's top ids, or on the head where none are stored.
    """
    if settings.baseline == "bucket":
        return reverse_kl(student, teacher, "known").detach()
    inside = members(teacher, "extra" if settings.student_topk else "head")
    log_p, log_q = (torch.where(inside, x, LOG_ZERO).log_softmax(dim=1) for x in (teacher.logprob, student.logprob))
    return torch.where(inside, log_q.exp() * (log_q - log_p), 0.0).sum(dim=1).detach()


def vopd(settings: ObjectiveSettings) -> Objective:
    """Policy gradient with A = -(log q(y) - log p(y) - b), q at present."""
    ratio = settings.ratio != "none"

    def token_loss(student: SparseStudent, teacher: TeacherBatch, context: StepContext) -> TokenLoss:
        q_old = context.require("q_old", settings.name) if ratio else None
        base = baseline(settings, student, teacher)
        advantage = teacher.sampled - student.sampled.detach() + base
        term = policy_gradient(
            student.sampled, advantage, settings.ratio, q_old, settings.clip_eps, settings.truncate_at
        )
        parts = {"loss_rkl": term.loss, "baseline": base, "advantage": advantage, "ratio": term.ratio}
        return TokenLoss(term.loss, {**parts, "ratio_squared": term.ratio**2, "clipped": term.clipped})

    extra: tuple[Need, ...] = (ExtraIdsNeed(settings.student_topk),) if settings.student_topk else ()
    plan = SupportPlan(head_k=settings.k, extra=settings.student_topk)
    per_round = frozenset({"q_old"} if ratio else ())
    return Objective(settings, (SampledNeed(), HeadNeed(1), *extra, StopsNeed()), plan, token_loss, per_round)
