"""The three matrix products of a head: logits, gradient of the hidden states, gradient of the weight.

Logits are float32 (float64 for float64 inputs) whatever the inputs' dtype; products of low-precision inputs are
accumulated in float32. On the CPU low precision is computed in float32, one block of the vocabulary at a time; on a
GPU by the hardware's own low-precision product with float32 output.

Letters: C tokens of a chunk, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from eopd.stages.models.lm_head import LMHead

VOCAB_BLOCK = 8192
"""Rows of a low-precision weight converted to float32 at once on the CPU."""


def local_parameter(parameter: Tensor) -> Tensor:
    """Return the whole parameter: a sharded one (FSDP2) is gathered once, and its gradient is averaged over the
    ranks."""
    if isinstance(parameter, DTensor):
        grads = [Partial("avg") for _ in range(parameter.device_mesh.ndim)]
        gathered = parameter.full_tensor(grad_placements=grads)
        assert isinstance(gathered, Tensor)
        return gathered
    return parameter


@dataclass(frozen=True)
class HeadProducts:
    """``weight`` [V, D] as it is used in products; ``exact`` where it is the dtype that logits have."""

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype  # of logits and of accumulated gradients
    exact: bool

    @classmethod
    def of(cls, head: LMHead, hidden: Tensor) -> HeadProducts:
        """Prepare products of ``head`` (its parameters already local) with ``hidden``; honours autocast on a GPU."""
        weight = head.weight.detach()
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        kind = weight.device.type
        if kind != "cpu" and torch.is_autocast_enabled(kind):
            weight = weight.to(torch.get_autocast_dtype(kind))
        bias = None if head.bias is None else head.bias.detach().to(wide)
        return cls(weight, bias, wide, weight.dtype == wide)

    @property
    def _native(self) -> bool:
        return not self.exact and self.weight.is_cuda

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.weight), VOCAB_BLOCK):
            where = slice(start, start + VOCAB_BLOCK)
            yield where, self.weight[where].to(self.dtype)

    def logits_(self, hidden: Tensor, out: Tensor) -> None:
        """Write hidden [C, D] @ weight.T + bias into ``out`` [C, V]."""
        if self._native:
            torch.mm(hidden.to(self.weight.dtype), self.weight.T, out_dtype=self.dtype, out=out)
        elif self.exact:
            torch.mm(hidden.to(self.dtype), self.weight.T, out=out)
        else:
            wide = hidden.to(self.dtype)
            for where, block in self._blocks():
                out[:, where] = wide @ block.T
        if self.bias is not None:
            out += self.bias

    def operand(self, grad_logits: Tensor) -> Tensor:
        """Return grad_logits [C, V] as both gradients are computed from it."""
        return grad_logits.to(self.weight.dtype) if self._native else grad_logits

    def hidden_gradient(self, operand: Tensor) -> Tensor:
        """Return grad_logits [C, V] @ weight, [C, D]."""
        if self._native:
            return torch.mm(operand, self.weight, out_dtype=self.dtype)
        if self.exact:
            return operand @ self.weight
        total = operand.new_zeros(len(operand), self.weight.shape[1])
        for where, block in self._blocks():
            total.addmm_(operand[:, where], block)
        return total

    def add_weight_gradient(self, total: Tensor, operand: Tensor, hidden: Tensor, first: bool) -> None:
        """Add grad_logits.T @ hidden to ``total`` [V, D] in place; if ``first``, overwrite it."""
        beta = 0.0 if first else 1.0
        if self._native:
            low = hidden.to(self.weight.dtype)
            torch.addmm(total, operand.T, low, out_dtype=self.dtype, beta=beta, out=total)
        else:
            total.addmm_(operand.T, hidden.to(self.dtype), beta=beta)
