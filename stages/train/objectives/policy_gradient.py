"""Policy gradient on the sampled token: surrogates whose gradient is -A w grad log q(y), w a function of the ratio.

Letters: T tokens. All arguments [T], nats; the advantage carries no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eopd.stages.train.objectives.settings import Advantage, Ratio


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
