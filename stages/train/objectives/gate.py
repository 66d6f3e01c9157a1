"""Gates: which tokens a term acts on, as 0/1 weights [T] without gradient."""

from __future__ import annotations

from torch import Tensor


def above(value: Tensor, threshold: float) -> Tensor:
    """1[value > threshold] of ``value`` [T] (strict, as the EOPD paper has it; its code uses >=)."""
    return (value > threshold).to(value.dtype)


def accepted(log_ratio: Tensor, uniform: Tensor) -> Tensor:
    """1[u < min(1, exp(log_ratio))]: rejection test of the sampled token, ``uniform`` [T] in [0, 1)."""
    return (uniform < log_ratio.detach().clamp(max=0.0).exp()).to(log_ratio.dtype)
