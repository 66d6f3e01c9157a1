"""Loss formulas of published systems, written out from their definitions over full distributions.

They are checked, not offered: each has a quirk that a setting should not invite. Arguments: log-probs over the full
vocabulary p (teacher), q (student) [T, V], and a boolean support [T, V].
"""

from __future__ import annotations

import torch
from torch import Tensor


def verl_topk(p: Tensor, q: Tensor, support: Tensor) -> Tensor:
    """sum_T p (log p - log q): neither renormalised nor tailed. verl then clamps it at 0, which hides its negatives."""
    return torch.where(support, p.exp() * (p - q), 0.0).sum(dim=1)


def trl_tail(p: Tensor, q: Tensor, support: Tensor) -> Tensor:
    """sum_T p log(p/q) + (1-P) log((1-P)/(1-Q)), P and Q the masses on the support."""
    p_mass = torch.where(support, p.exp(), 0.0).sum(dim=1)
    q_mass = torch.where(support, q.exp(), 0.0).sum(dim=1)
    return verl_topk(p, q, support) + (1 - p_mass) * ((1 - p_mass).log() - (1 - q_mass).log())


def nemo_renorm(p: Tensor, q: Tensor, support: Tensor) -> Tensor:
    """KL of both models renormalised on the support: blind to the student's mass outside it."""
    nothing = torch.full_like(p, -torch.inf)
    p_on = torch.where(support, p, nothing).log_softmax(dim=1)
    q_on = torch.where(support, q, nothing).log_softmax(dim=1)
    return torch.where(support, p_on.exp() * (p_on - q_on), 0.0).sum(dim=1)


def eopd_forward(p: Tensor, q: Tensor, support: Tensor) -> Tensor:
    """EOPD's asymmetry: the teacher renormalised on the support, the student over the full vocabulary."""
    nothing = torch.full_like(p, -torch.inf)
    p_on = torch.where(support, p, nothing).log_softmax(dim=1)
    return torch.where(support, p_on.exp() * (p_on - q), 0.0).sum(dim=1)


def eopd_loss(p: Tensor, q: Tensor, q_old: Tensor, sampled: Tensor, k: int, tau: float, eps: float) -> Tensor:
    """EOPD over a batch: clipped sampled-token term on every token, gated forward KL, both over all T tokens.

    ``q_old`` [T] is log q_old(y); ``sampled`` [T] the ids y.
    """
    entropy = -(p.exp() * p).sum(dim=1)
    support = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(k, dim=1).indices, True)
    at = sampled[:, None]
    ratio = (q.gather(1, at)[:, 0] - q_old).exp()
    advantage = (p.gather(1, at)[:, 0] - q_old).detach()
    clipped = ratio.clamp(1 - eps, 1 + eps)
    policy = torch.maximum(-advantage * ratio, -advantage * clipped)
    gated = torch.where(entropy > tau, eopd_forward(p, q, support), 0.0)
    return policy.mean() + gated.sum() / len(p)
