"""Bounds on rounding errors that follow from the arithmetic, so that they hold on every processor and thread count.

A sum of n terms in a precision with unit roundoff u, added in any order, is off by at most ``n * u * sum(|terms|)``
(Higham, *Accuracy and Stability of Numerical Algorithms*, second edition, sections 3.1 and 4.2, without terms in u^2).
Everything below applies this to one computation; two results of the same computation differ by twice as much.

Letters: T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from eopd.stages.models.lm_head import LMHead

Scale = TypeVar("Scale", float, Tensor)


def unit(dtype: torch.dtype = torch.float32) -> float:
    """Unit roundoff: the largest relative error of one rounded operation."""
    return torch.finfo(dtype).eps / 2


def rounding(n: int, scale: Scale, dtype: torch.dtype = torch.float32) -> Scale:
    """Bound on the error of a sum or dot product of ``n`` terms whose absolute values add up to ``scale``."""
    return n * unit(dtype) * scale


def forward_rounding(scale: Scale, tokens: int = 64) -> Scale:
    """Bound on the errors of float32 hidden states or logits of at most ``scale`` by a model of ``tiny_models``.

    On the longest path from an id to a logit each of two layers has two norms, products with the weights of attention
    and MLP (64 + 64 + 64 + 96 terms), scores (32), a softmax and a sum over ``tokens``; then come a norm and the head.
    Worst cases multiply with the norms of the weights and say nothing. But roundings are independent of each other, so
    n of them add up like sqrt(n) (Higham and Mary, *A new approach to probabilistic rounding error analysis*, 2019);
    a factor of 5 is exceeded with a probability of about 1e-6 a value.
    """
    n = 2 * (2 * 64 + 64 + 32 + 2 * tokens + 64 + 64 + 96) + 64 + 64
    return 5 * math.sqrt(n) * unit() * scale


def logits_rounding(head: LMHead, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """[T] bound on the errors of a row's float32 logits, the largest over the vocabulary; float64.

    The matrix product sums D products and a bias. Soft-capping has a slope of at most 1 and adds the roundings of a
    division, of tanh (2 units) and of a product, each relative to the cap; scale and temperature add two.
    """
    terms = hidden.double().abs() @ head.weight.detach().double().abs().T
    if head.bias is not None:
        terms = terms + head.bias.detach().double().abs()
    largest = terms.amax(1)
    error = rounding(hidden.shape[1] + 1, largest)
    if head.softcap is not None:
        error = error + rounding(4, head.softcap)
        largest = largest.clamp(max=head.softcap)
    return (error + rounding(2, largest)) * abs(head.scale) / temperature


def logprobs_rounding(logits_error: Tensor, logits: Tensor) -> Tensor:
    """[T] bound on the errors of log-softmax of ``logits`` [T, V] which are themselves off by ``logits_error`` [T].

    The logit and the log of the sum are both off by ``logits_error``. Subtracting the largest logit rounds relative to
    the range, and so do the exponent and the result. The sum of V exponentials, each off by 2 units, is off by V + 2
    units of itself, and so is its log, in nats.
    """
    spread = (logits.amax(1) - logits.amin(1)).double()
    return 2 * logits_error + rounding(3, spread) + rounding(logits.shape[1] + 2, 1.0)


def entropy_rounding(logprobs_error: Tensor, entropy: Tensor) -> Tensor:
    """[T] bound on the error of ``-sum(p log p)``: errors e of log p move it by at most ``e * sum(p |log p|) + e``."""
    return logprobs_error * (1 + entropy)
