"""`reopold` (arXiv 2603.11137): the policy gradient with floored advantages, on tokens where the student is unsure."""

from __future__ import annotations

import math

from eopd.stages.train.objectives.base import Objective, SparseStudent, StepContext, SupportPlan, TokenLoss
from eopd.stages.train.objectives.eopd import round_start_fields
from eopd.stages.train.objectives.gate import above
from eopd.stages.train.objectives.policy_gradient import log_ratio_advantage, policy_gradient
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.objectives.teacher_batch import TeacherBatch
from eopd.storage.needs import SampledNeed, StopsNeed


def advantage_floor(settings: ObjectiveSettings) -> float:
    """Smallest advantage, nats: log(lambda) / (1 - lambda), or log(lambda / (1 - lambda)) of a second source."""
    weight = settings.floor_lambda
    if settings.floor_form == "mixture":
        return math.log(weight) / (1.0 - weight)
    return math.log(weight / (1.0 - weight))


def reopold(settings: ObjectiveSettings) -> Objective:
    """1[H_q > quantile over the round] times L_OPD with max(A, floor); H_q is the student's at the round's start."""

    def token_loss(student: SparseStudent, teacher: TeacherBatch, context: StepContext) -> TokenLoss:
        unsure = context.require("student_entropy_round", settings.name)
        if context.entropy_threshold is None:
            raise ValueError("objective 'reopold' needs context.entropy_threshold, which was not given")
        q_old = context.require("q_old", settings.name) if round_start_fields(settings) else None
        raw = log_ratio_advantage(settings.advantage, teacher.sampled, student.sampled, q_old)
        floor = advantage_floor(settings)
        term = policy_gradient(
            student.sampled, raw.clamp(min=floor), settings.ratio, q_old, settings.clip_eps, settings.truncate_at
        )
        kept = above(unsure.double(), context.entropy_threshold)
        parts = {"loss_rkl": kept * term.loss, "gate": kept, "floored": (raw < floor).double(), "ratio": term.ratio}
        return TokenLoss(kept * term.loss, {**parts, "ratio_squared": term.ratio**2, "clipped": term.clipped})

    fields = round_start_fields(settings) | {"student_entropy_round", "entropy_threshold"}
    return Objective(settings, (SampledNeed(), StopsNeed()), SupportPlan(head_k=settings.k), token_loss, fields)
