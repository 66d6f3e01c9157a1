"""A control without a teacher: every sampled token is made less probable, whatever it is (arXiv 2608.31046)."""

from __future__ import annotations

import torch

from eopd.stages.train.objectives.base import Objective, SparseStudent, StepContext, TeacherBatch, TokenLoss
from eopd.stages.train.objectives.layout import SupportPlan
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.objectives.terms import policy_gradient


def fixed_advantage(settings: ObjectiveSettings) -> Objective:
    """The policy gradient of `opd` with ``options.advantage`` (nats) at every token in place of log p - log q."""

    def token_loss(student: SparseStudent, teacher: TeacherBatch, context: StepContext) -> TokenLoss:
        q_old = context.require("q_old", settings.name)
        advantage = torch.full_like(student.sampled, float(settings.options["advantage"]))
        term = policy_gradient(student.sampled, advantage, settings.ratio, q_old, settings.clip_eps)
        return TokenLoss(term.loss, {"ratio": term.ratio, "clipped": term.clipped})

    return Objective(settings, (), SupportPlan(head_k=None), token_loss, frozenset({"q_old"}))
