"""An objective of a user's own, in one file: forward KL where the teacher is sure, nothing elsewhere."""

from __future__ import annotations

from eopd.stages.train.objectives.base import Objective, SparseStudent, StepContext, TeacherBatch, TokenLoss
from eopd.stages.train.objectives.layout import SupportPlan
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.objectives.terms import above, forward_kl
from eopd.storage.coverage import EntropyNeed, HeadNeed


def sure_only(settings: ObjectiveSettings) -> Objective:
    limit = float(settings.options["limit"])

    def token_loss(student: SparseStudent, teacher: TeacherBatch, context: StepContext) -> TokenLoss:
        sure = 1.0 - above(teacher.entropy, limit)
        loss = sure * forward_kl(student, teacher, "bucket")
        return TokenLoss(loss, {"gate": sure, "loss_fkl": loss})

    return Objective(settings, (EntropyNeed(), HeadNeed(1)), SupportPlan(head_k=settings.k), token_loss)


def no_objective(settings: ObjectiveSettings) -> str:
    return settings.name
