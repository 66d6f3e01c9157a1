"""Terms that objectives are made of: gates, the policy gradient on the sampled token, divergences on the support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eopd.stages.train.objectives.base import SparseStudent, TeacherBatch
from eopd.stages.train.objectives.layout import LOG_ZERO
from eopd.stages.train.objectives.settings import Advantage, Ratio, SupportMode
from eopd.storage.teacher_record import LOGPROB_FLOOR

# -- gate -------------------------------------------------------------------------------------------------------------

# Gates: which tokens a term acts on, as 0/1 weights [T] without gradient.


def above(value: Tensor, threshold: float) -> Tensor:
    """1[value > threshold] of ``value`` [T] (strict, as the EOPD paper has it; its code uses >=)."""
    return (value > threshold).to(value.dtype)


def accepted(log_ratio: Tensor, uniform: Tensor) -> Tensor:
    """1[u < min(1, exp(log_ratio))]: rejection test of the sampled token, ``uniform`` [T] in [0, 1)."""
    return (uniform < log_ratio.detach().clamp(max=0.0).exp()).to(log_ratio.dtype)


# -- policy gradient --------------------------------------------------------------------------------------------------

# Policy gradient on the sampled token: surrogates whose gradient is -A w grad log q(y), w a function of the ratio.
#
# Letters: T tokens. All arguments [T], nats; the advantage carries no gradient.


@dataclass(frozen=True)
class PolicyTerm:
    loss: Tensor  # [T]
    ratio: Tensor  # [T] q / q_old, without gradient (1 where no ratio is used)
    clipped: Tensor  # [T] 1 where the ratio's bound is active


def log_ratio_advantage(kind: Advantage, teacher: Tensor, student: Tensor, q_old: Tensor | None) -> Tensor:
    """Return A = sg(log p(y) - log q(y)), with q at the round's start (``old``) or at present (``current``)."""
    if kind == "current":
        return teacher - student.detach()
    assert q_old is not None
    return teacher - q_old


def policy_gradient(
    student: Tensor,
    advantage: Tensor,
    ratio: Ratio,
    q_old: Tensor | None,
    clip_eps: float = 0.2,
    truncate_at: float = 2.0,
) -> PolicyTerm:
    """Return the loss of ``student`` = log q(y) [T] under ``advantage``.

    ppo: max(-A r, -A clip(r, 1-eps, 1+eps)); is: -A r; truncated: -A min(r, c) with the weight held constant;
    none: -A with gradient -A grad log q(y) (r = 1).
    """
    advantage = advantage.detach()
    if ratio == "none":
        ones = torch.ones_like(advantage)
        return PolicyTerm(-advantage * (1.0 + student - student.detach()), ones, torch.zeros_like(ones))
    assert q_old is not None
    r = (student - q_old).exp()
    held = r.detach()
    if ratio == "is":
        return PolicyTerm(-advantage * r, held, torch.zeros_like(held))
    if ratio == "truncated":
        weight = held.clamp(max=truncate_at)
        loss = -advantage * weight * (1.0 + student - student.detach())
        return PolicyTerm(loss, held, (held > truncate_at).to(held.dtype))
    bounded = r.clamp(1.0 - clip_eps, 1.0 + clip_eps)
    free, tied = -advantage * r, -advantage * bounded
    return PolicyTerm(torch.maximum(free, tied), held, (tied > free).to(held.dtype).detach())


# -- divergence -------------------------------------------------------------------------------------------------------

# Divergences between teacher p and student q on the stored support.
#
# `bucket` makes everything outside the support one outcome: then the divergence is >= 0, at most the exact one, equal
# to it when the support is the vocabulary, and the teacher is its minimum. Reverse KL and JSD exist in that form
# only: without the bucket they fall when the student moves its mass off the support.
#
# Letters: T tokens, K outcome columns. Logs are natural (nats).


Over = Literal["head", "known", "extra"]
"""Which outcomes: the head, head and extra ids, or the extra ids alone."""


def members(teacher: TeacherBatch, over: Over) -> Tensor:
    """Return the outcomes of a support: [T, K] (bool)."""
    return {"head": teacher.in_head, "extra": teacher.in_extra, "known": teacher.in_head | teacher.in_extra}[over]


def kl_terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return a log(a/b) - a + b elementwise: each >= 0 in floating point too, their sum is KL(a || b) of
    distributions."""
    a, d = log_a.exp(), log_b - log_a
    near = d.clamp(-1.0, 1.0)
    return torch.where(near == d, a * (torch.expm1(near) - near), log_b.exp() - a - a * d)


def bucketed(student: SparseStudent, teacher: TeacherBatch, over: Over) -> tuple[Tensor, Tensor]:
    """Return (log p, log q) [T, K+1] on the support, the last column being everything else; each sums to 1.

    The student's tail is summed from its parts, never taken as 1 - sum, so that it is exact when it is small.
    """
    inside = members(teacher, over)
    assert over != "extra", "the teacher's mass outside extra ids alone is not stored"
    p_tail = teacher.tail if over == "head" else teacher.known_tail
    outside = torch.cat([torch.where(inside, LOG_ZERO, student.logprob), student.rest[:, None]], dim=1)
    q_tail = outside.logsumexp(dim=1)
    q_tail = torch.where(q_tail < LOG_ZERO / 10, LOGPROB_FLOOR, q_tail)  # nothing at all is outside
    log_p = torch.cat([torch.where(inside, teacher.logprob, LOG_ZERO), p_tail[:, None]], dim=1)
    log_q = torch.cat([torch.where(inside, student.logprob, LOG_ZERO), q_tail[:, None]], dim=1)
    return log_p, log_q


def forward_kl(student: SparseStudent, teacher: TeacherBatch, mode: SupportMode) -> Tensor:
    """Return KL(p || q) [T] by support mode; `true` may be negative, `sampled` is unbiased over the draws.

    renormalised: sum p~ log(p~/q), p~ = p / sum_head p, q over the full vocabulary (EOPD). true: sum_head p log(p/q).
    sampled: -H - sum_head p log q - c sum_draws log q (or -H - 1/N sum_draws log q where draws are full).
    """
    if mode == "bucket":
        return kl_terms(*bucketed(student, teacher, "head")).sum(dim=1)
    if mode == "sampled":
        return -teacher.entropy - (teacher.target * student.logprob).sum(dim=1)
    head = teacher.in_head
    log_p = torch.where(head, teacher.logprob, LOG_ZERO)
    if mode == "renormalised":
        log_p = torch.where(head, log_p - log_p.logsumexp(dim=1, keepdim=True), LOG_ZERO)
    return (log_p.exp() * (log_p - torch.where(head, student.logprob, LOG_ZERO))).sum(dim=1)


def reverse_kl(student: SparseStudent, teacher: TeacherBatch, over: Over = "known") -> Tensor:
    """Return KL(q || p) [T] over the support and one bucket."""
    log_p, log_q = bucketed(student, teacher, over)
    return kl_terms(log_q, log_p).sum(dim=1)


def jensen_shannon(student: SparseStudent, teacher: TeacherBatch, beta: float) -> Tensor:
    """Return beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q [T], over the head and one bucket."""
    log_p, log_q = bucketed(student, teacher, "head")
    weight = torch.tensor(beta, dtype=log_p.dtype)  # a number: on the device it would be a copy a chunk
    log_m = torch.logaddexp(log_p + weight.log(), log_q + torch.log1p(-weight))
    return (beta * kl_terms(log_p, log_m) + (1.0 - beta) * kl_terms(log_q, log_m)).sum(dim=1)
