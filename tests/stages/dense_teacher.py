"""The statistics head written out densely in float64: the oracle of its tests and of benchmarks/scoring.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eopd.stages.models.lm_head import LMHead


@dataclass(frozen=True)
class Dense:
    """Full distributions of T tokens, float64."""

    logits: Tensor  # [T, V] divided by the temperature
    logprobs: Tensor  # [T, V] nats
    entropy: Tensor  # [T] nats


def dense(head: LMHead, hidden: Tensor, temperature: float = 1.0) -> Dense:
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    logits = logits * head.scale / temperature
    logprobs = logits - torch.logsumexp(logits, 1, keepdim=True)
    return Dense(logits, logprobs, -(logprobs.exp() * logprobs).sum(1))
