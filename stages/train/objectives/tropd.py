"""`tropd` (arXiv 2606.01249): policy gradient on tokens that the teacher would have accepted, forward KL elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from eopd.stages.train.objectives.base import Objective, SparseStudent, StepContext, TeacherBatch, TokenLoss
from eopd.stages.train.objectives.layout import SupportPlan
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.objectives.terms import accepted, forward_kl, jensen_shannon, policy_gradient
from eopd.storage.coverage import HeadNeed, Need, SampledNeed, StopsNeed


def hashed_uniform(key: Tensor, seed: int, epoch: int) -> Tensor:
    """Return uniform numbers [T] in [0, 1) as a function of ``key`` [T] int64, seed and epoch (SplitMix64's finaliser).

    So that a token's fate depends neither on the batch it is in nor on where a run was resumed.
    """

    def mix(x: Tensor) -> Tensor:
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as a signed number
        x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
        return x ^ ((x >> 31) & 0x1FFFFFFFF)

    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15
    state = torch.full_like(key, seed) * golden + epoch
    mixed = mix(mix(state) + key * golden)
    return ((mixed >> 11) & (2**53 - 1)).double() * 2.0**-53


def tropd(settings: ObjectiveSettings) -> Objective:
    """M L_trusted + (1 - M) L_outlier on the student's tokens, M = 1[u < min(1, sg(p(y)/q(y)))].

    trusted: policy gradient with A = sg(log p - log q) at present, r = 1. outlier: `fkl` sum_head p log(p/q) with p
    as it is, `clip` the policy gradient with max(A, floor), `mask` nothing, `jsd` JSD 0.5 over head and bucket.
    Tokens the teacher wrote: prefix_beta log(p/q), differentiated.
    """

    def outlier(student: SparseStudent, teacher: TeacherBatch, advantage: Tensor) -> Tensor:
        if settings.outlier == "fkl":
            return forward_kl(student, teacher, "true")
        if settings.outlier == "jsd":
            return jensen_shannon(student, teacher, 0.5)
        if settings.outlier == "clip":
            return policy_gradient(student.sampled, advantage.clamp(min=settings.outlier_floor), "none", None).loss
        return torch.zeros_like(advantage)

    def token_loss(student: SparseStudent, teacher: TeacherBatch, context: StepContext) -> TokenLoss:
        key = context.require("token_key", settings.name)
        advantage = teacher.sampled - student.sampled.detach()
        trusted = accepted(advantage, hashed_uniform(key, context.seed, context.epoch))
        reverse = trusted * policy_gradient(student.sampled, advantage, "none", None).loss
        forward = (1.0 - trusted) * outlier(student, teacher, advantage)
        prefix = context.teacher_prefix
        own = torch.ones_like(trusted) if prefix is None else 1.0 - prefix.double()
        guided = (1.0 - own) * settings.prefix_beta * (teacher.sampled - student.sampled)
        parts = {"loss_rkl": own * reverse, "loss_outlier": own * forward, "loss_prefix": guided}
        loss = own * (reverse + forward) + guided
        return TokenLoss(loss, {**parts, "gate": own * trusted, "advantage": advantage})

    # The trust region reads the sampled token alone; a head is read by the divergences outside it.
    heads: dict[str, tuple[Need, ...]] = {"fkl": (HeadNeed(settings.k),), "jsd": (HeadNeed(1),)}
    needs = (*heads.get(settings.outlier, ()), SampledNeed(), StopsNeed())
    return Objective(settings, needs, SupportPlan(head_k=settings.k), token_loss, frozenset({"token_key"}))
