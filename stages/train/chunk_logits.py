"""A chunk of the head: its matrix products, and its logits with the wanted ids apart and the rest as a sum.

Letters: C rows of a chunk, V vocabulary, K' columns of wanted ids, N wanted ids, E merged stops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from eopd.stages.memory import GPU_GROUP_BYTES, GROUP_BYTES
from eopd.stages.models.lm_head import LMHead
from eopd.stages.train.objectives.base import SparseStudent, outcomes
from eopd.stages.train.objectives.layout import LOG_ZERO
from eopd.stages.train.objectives.teacher_batch import TeacherBatch

# -- head products ----------------------------------------------------------------------------------------------------

# The three matrix products of a head: logits, gradient of the hidden states, gradient of the weight.
#
# Logits are float32 (float64 for float64 inputs) whatever the inputs' dtype; products of low-precision inputs are
# accumulated in float32. On the CPU low precision is computed in float32, one block of the vocabulary at a time; on a
# GPU by the hardware's own low-precision product with float32 output.
#
# Letters: C tokens of a chunk, V vocabulary, D hidden size.


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


# -- wanted ids and the rest ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rest:
    """The workspace after ``take_rest``: exp(logit - largest), and sums of it, float64 [C]."""

    largest: Tensor
    total: Tensor  # sum of exp(logit - largest)
    moment: Tensor  # sum of exp(logit - largest) * (logit - largest)

    @property
    def log_mass(self) -> Tensor:
        return self.largest + self.total.log()


@dataclass(frozen=True)
class Taken:
    """The parts of a chunk's logits that remain once the workspace holds exp(logit - largest)."""

    places: Tensor  # [N] of the wanted ids in the workspace, flattened
    z: Tensor  # [C, K'] logits at them, float64; LOG_ZERO where a column is unused
    z_stops: Tensor  # [C, E] logits of merged stops
    log_rest: Tensor  # [C] log-sum-exp of all others
    rest: Rest


def take(logits: Tensor, teacher: TeacherBatch) -> Taken:
    """Read the wanted ids out of ``logits`` [C, V], which become exp(logit - largest) with 0 in those places."""
    places = teacher.row_of_support() * logits.shape[1] + teacher.support_ids
    flat = logits.view(-1)
    z = torch.full((len(logits), teacher.width), LOG_ZERO, dtype=torch.float64, device=logits.device)
    z.view(-1)[teacher.support_slots] = flat[places].double()
    z_stops = logits[:, teacher.stop_columns].double()
    flat[places] = LOG_ZERO
    logits[:, teacher.stop_columns] = LOG_ZERO
    rest = take_rest(logits)
    return Taken(places, z, z_stops, rest.log_mass, rest)


def sparse_student(taken: Taken, teacher: TeacherBatch) -> SparseStudent:
    logprob, log_rest = outcomes(taken.z, taken.z_stops, taken.log_rest)
    sampled = logprob.gather(1, teacher.sampled_column[:, None])[:, 0]
    return SparseStudent(logprob, log_rest, sampled, entropy_of(logprob.detach(), log_rest.detach(), taken.rest))


def group_rows(logits: Tensor) -> int:
    group = GPU_GROUP_BYTES if logits.is_cuda else GROUP_BYTES
    return max(1, group // (logits.shape[1] * logits.element_size()))


def take_rest(logits: Tensor) -> Rest:
    """Turn ``logits`` [C, V], with wanted ids set to LOG_ZERO, into exp(logit - largest) in place."""
    rows, vocab = logits.shape
    group = group_rows(logits)
    largest = logits.new_empty(rows)
    total, moment = torch.empty_like(largest), torch.empty_like(largest)
    spare = logits.new_empty(min(group, rows), vocab)
    for start in range(0, rows, group):
        part = logits[start : start + group]
        shifted = spare[: len(part)]
        torch.amax(part, dim=1, out=largest[start : start + group])
        torch.sub(part, largest[start : start + group, None], out=shifted)
        torch.exp(shifted, out=part)
        torch.sum(part, dim=1, out=total[start : start + group])
        torch.mul(part, shifted, out=shifted)
        torch.sum(shifted, dim=1, out=moment[start : start + group])
    return Rest(largest.double(), total.double(), moment.double())


def entropy_of(logprob: Tensor, log_rest: Tensor, rest: Rest) -> Tensor:
    """Return the entropy [C] of outcomes [C, K] and the rest's sums."""
    inside = -(logprob.exp() * logprob).sum(dim=1)
    mean_log = log_rest + rest.moment / rest.total - rest.total.log()  # mean of log q under q within the rest
    return inside - log_rest.exp() * mean_log
