"""The student as a module: packed rows in, loss or log-probs out, never [T, V].

Backbone, LM head and objective stand in one forward so that the hooks of DDP and FSDP2 see all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from eopd.stages.memory import GPU_GROUP_BYTES, GROUP_BYTES, head_rows
from eopd.stages.models.lm_head import LMHead, lm_head_of
from eopd.stages.models.memory import gpu_bytes
from eopd.stages.models.packing import Packed, final_hidden, layout_of
from eopd.stages.train.objectives.base import Objective, SparseStudent, StepContext, TeacherBatch, TokenLoss, outcomes
from eopd.stages.train.objectives.layout import LOG_ZERO
from eopd.stages.train.objectives.terms import forward_kl, reverse_kl

# -- student head -----------------------------------------------------------------------------------------------------

# The student's sparse head: log-probs at the ids an objective asks for, and exact gradients, never [T, V].
#
# Logits live in one workspace of C rows. In a chunk the wanted ids are taken out of it first; what stays is summed as
# "the rest", so that a tail is exact however small. The loss is then a function of few numbers a token, its gradient
# there comes from autograd, and the gradient of all other logits is proportional to their softmax: the workspace is
# turned into it in place. Three matrix products in all, as many as a dense head needs.
#
# Letters: T tokens, C rows of a chunk, V vocabulary, D hidden size, K outcome columns, N wanted ids, E merged stops.


def sparse_head_loss(
    hidden: Tensor,
    head: LMHead,
    batch: TeacherBatch,
    objective: Objective,
    context: StepContext,
    *,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of final hidden states [T, D], and figures to log.

    Returns (sum over tokens of mask * loss / normaliser: a scalar that can be differentiated once to ``hidden``, head
    weight and bias; metrics: sums over tokens of ``mask`` times each figure, to be added over micro-batches and ranks
    and divided by the sum ``tokens``).

    Raises:
        ValueError: ``hidden`` and ``batch`` differ in tokens, or the context lacks what the objective needs.
    """
    _check_tokens(hidden, batch)
    head = _whole(head)
    wanted = torch.is_grad_enabled()
    needs = _Wanted(
        wanted and hidden.requires_grad,
        wanted and head.weight.requires_grad,
        wanted and head.bias is not None and head.bias.requires_grad,
    )
    pass_ = _Pass(hidden.detach(), head, context.temperature, needs, chunk_tokens)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for start, stop in pass_.chunks():
            pass_.chunk_loss(start, stop, batch.slice(start, stop), objective, context.slice(start, stop))
    loss = pass_.loss.to(torch.promote_types(hidden.dtype, torch.float32))
    if any(needs):
        apply: Callable[..., Tensor] = _GradientsMadeInForward.apply
        loss = apply(hidden, head.weight, head.bias, loss, *pass_.gradients())
    return loss, pass_.metrics


def student_logprobs(
    hidden: Tensor, head: LMHead, batch: TeacherBatch, context: StepContext, *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return log-prob of the sampled token and entropy, each [T] float64 in nats, of hidden states [T, D]; no gradient.

    Stops are merged as ``batch`` says; of ``context`` only the temperature is read.
    """
    _check_tokens(hidden, batch)
    logprobs = torch.empty(len(hidden), dtype=torch.float64, device=hidden.device)
    entropies = torch.empty_like(logprobs)
    pass_ = _Pass(hidden.detach(), _whole(head), context.temperature, _Wanted(False, False, False), chunk_tokens)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for start, stop in pass_.chunks():
            teacher = batch.slice(start, stop)
            student = sparse_student(take(pass_.logits(start, stop), teacher), teacher)
            logprobs[start:stop], entropies[start:stop] = student.sampled, student.entropy
    return logprobs, entropies


def _check_tokens(hidden: Tensor, batch: TeacherBatch) -> None:
    if len(hidden) != batch.tokens:
        raise ValueError(
            f"{len(hidden)} hidden states for {batch.tokens} teacher rows: response and cache do not match"
        )


def _whole(head: LMHead) -> LMHead:
    """Return ``head`` with sharded parameters gathered."""
    bias = None if head.bias is None else local_parameter(head.bias)
    return replace(head, weight=local_parameter(head.weight), bias=bias)


@dataclass(frozen=True)
class _Wanted:
    """Flags for the gradients that are needed."""

    hidden: bool
    weight: bool
    bias: bool

    def __iter__(self) -> Iterator[bool]:
        return iter((self.hidden, self.weight, self.bias))


class _Pass:
    """One walk over the chunks; holds the workspace and the gradients so far."""

    def __init__(
        self, hidden: Tensor, head: LMHead, temperature: float, needs: _Wanted, chunk_tokens: int | None
    ) -> None:
        self.products = HeadProducts.of(head, hidden)
        self.hidden, self.head, self.temperature, self.needs = hidden, head, temperature, needs
        dtype, device = self.products.dtype, hidden.device
        most = chunk_tokens or head_rows(head.vocab_size, dtype.itemsize, gpu_bytes(device))
        chunks = max(1, -(-len(hidden) // most))
        self.rows = max(1, -(-len(hidden) // chunks))  # equal chunks: a short last one costs as many passes
        self.workspace = torch.empty(self.rows, head.vocab_size, dtype=dtype, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.metrics: dict[str, Tensor] = {}
        self.grad_hidden = torch.zeros_like(hidden) if needs.hidden else None
        new = torch.empty if len(hidden) else torch.zeros
        self.grad_weight = new(head.weight.shape, dtype=dtype, device=device) if needs.weight else None
        self.grad_bias = torch.zeros(head.vocab_size, dtype=dtype, device=device) if needs.bias else None

    def chunks(self) -> Iterator[tuple[int, int]]:
        for start in range(0, len(self.hidden), self.rows):
            yield start, min(start + self.rows, len(self.hidden))

    def logits(self, start: int, stop: int) -> Tensor:
        """Return final logits [C, V] over the temperature, in the workspace."""
        out = self.workspace[: stop - start]
        self.products.logits_(self.hidden[start:stop], out)
        if self.head.softcap is not None:
            out.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        factor = self.head.scale / self.temperature
        return out if factor == 1.0 else out.mul_(factor)

    def chunk_loss(
        self, start: int, stop: int, teacher: TeacherBatch, objective: Objective, context: StepContext
    ) -> None:
        """Add the loss, metrics and gradients of tokens [start, stop)."""
        logits = self.logits(start, stop)
        taken = take(logits, teacher)
        leaves = (taken.z, taken.z_stops, taken.log_rest)
        with torch.enable_grad():
            for leaf in leaves:
                leaf.requires_grad_(any(self.needs))
            student = sparse_student(taken, teacher)
            tokens = objective.token_loss(student, teacher, context)
            if context.weight is not None:
                tokens = replace(tokens, loss=tokens.loss * context.weight)
            mask = context.mask.double()
            loss = (torch.where(mask > 0, tokens.loss, 0.0) * mask).sum() / context.normaliser
            if any(self.needs):
                grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        self.loss += loss.detach()
        for name, value in _figures(student, teacher, tokens, taken, context).items():
            total = (torch.where(mask > 0, value.detach().double(), 0.0) * mask).sum()
            self.metrics[name] = self.metrics[name] + total if name in self.metrics else total
        if any(self.needs):
            self._turn_into_gradient(logits, teacher, taken, grads)
            self._add_gradients(start, stop, logits)

    def _turn_into_gradient(
        self, logits: Tensor, teacher: TeacherBatch, taken: Taken, grads: tuple[Tensor, ...]
    ) -> None:
        """Turn the workspace, exp(logit - largest), into the gradient of the products before scale and soft-capping."""
        factor, cap = self.head.scale / self.temperature, self.head.softcap

        def slope(final: Tensor) -> Tensor | float:
            return factor if cap is None else factor * (1.0 - (final.detach() / (factor * cap)) ** 2)

        share = (grads[2] / taken.rest.total).to(logits.dtype)[:, None]
        if cap is None:
            logits.mul_(share * factor)
        else:
            rows = group_rows(logits)
            for start in range(0, len(logits), rows):
                part, largest = logits[start : start + rows], taken.rest.largest[start : start + rows, None]
                # The logit is read back from its exponential; where that underflowed the gradient is 0 anyway.
                final = part.clamp_min(1e-37).log_().add_(largest.to(part.dtype))
                part.mul_(share[start : start + rows]).mul_(slope(final))
        grad_z = (grads[0] * slope(taken.z)).view(-1)[teacher.support_slots]
        logits.view(-1)[taken.places] = grad_z.to(logits.dtype)
        logits[:, teacher.stop_columns] = (grads[1] * slope(taken.z_stops)).to(logits.dtype)

    def _add_gradients(self, start: int, stop: int, grad_logits: Tensor) -> None:
        operand = self.products.operand(grad_logits)
        if self.grad_hidden is not None:
            self.grad_hidden[start:stop] = self.products.hidden_gradient(operand)
        if self.grad_weight is not None:
            self.products.add_weight_gradient(self.grad_weight, operand, self.hidden[start:stop], start == 0)
        if self.grad_bias is not None:
            self.grad_bias += grad_logits.sum(dim=0)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        weight, bias = self.grad_weight, self.grad_bias
        return (
            self.grad_hidden,
            None if weight is None else weight.to(self.head.weight.dtype),
            None if bias is None or self.head.bias is None else bias.to(self.head.bias.dtype),
        )


def _figures(
    student: SparseStudent, teacher: TeacherBatch, tokens: TokenLoss, taken: Taken, context: StepContext
) -> dict[str, Tensor]:
    """Return figures [C] that every objective reports, and its own."""
    figures = {
        "tokens": torch.ones_like(tokens.loss),
        "loss": tokens.loss,
        "student_entropy": student.entropy,
        **tokens.parts,
    }
    if teacher.is_scored:
        figures["teacher_entropy"] = teacher.entropy
        figures["retained_mass"] = torch.where(teacher.in_head, teacher.logprob.exp(), 0.0).sum(dim=1)
        figures["student_mass_on_support"] = torch.where(teacher.in_head, student.logprob.exp(), 0.0).sum(dim=1)
    if teacher.is_scored and teacher.logprob.shape[1]:
        best, column = torch.where(teacher.in_head, teacher.logprob, LOG_ZERO).max(dim=1)
        at_best = student.logprob.gather(1, column[:, None])[:, 0]
        # The largest single logit of the rest, as a log-prob: its share of the rest is 1 / total.
        rival = torch.maximum(student.logprob.amax(dim=1), student.rest - taken.rest.total.log())
        figures["top1_agreement"] = (at_best >= rival) & (best > LOG_ZERO)
        with torch.no_grad():  # for every objective: the distance of the models on the head and one bucket
            figures["rkl"] = reverse_kl(student, teacher, "head")
            figures["fkl"] = forward_kl(student, teacher, "bucket")
    if context.teacher_prefix is not None:
        figures["prefix_fraction"] = context.teacher_prefix.double()
    if context.weight is not None:
        figures["weight"] = context.weight
    if context.q_old is not None:  # KL(q_old || q), estimated on its own samples: log 1/r, and r - 1 - log r
        moved = student.sampled.detach() - context.q_old
        figures["staleness_k1"], figures["staleness_k3"] = -moved, moved.expm1() - moved
    return figures


class _GradientsMadeInForward(torch.autograd.Function):
    """Autograd function that scales gradients computed in the forward pass by the gradient of the loss."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, loss: Tensor, *made: Tensor | None
    ) -> Tensor:
        ctx.made = made
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.made is not None, "the loss of a sparse head can be differentiated once"
        made, ctx.made = ctx.made, None
        # In place: a second copy of the weight's gradient would be as large as the weight.
        scaled = [None if g is None else g.mul_(grad_loss.to(g.dtype)) for g in made]
        return (*scaled, None, None, None, None)


# -- the module -------------------------------------------------------------------------------------------------------


class Student(nn.Module):
    """``autocast``: forward and backward in bfloat16 where that is safe, whatever wraps this module."""

    def __init__(
        self, model: PreTrainedModel, objective: Objective, chunk_tokens: int | None, *, autocast: bool = False
    ) -> None:
        super().__init__()
        self.model: PreTrainedModel = model
        self.layout = layout_of(model)  # measured here: once the model is wrapped or sharded it cannot be
        self._objective = objective
        self._chunk_tokens = chunk_tokens
        self._autocast = autocast

    def forward(
        self, packed: Packed, batch: TeacherBatch, context: StepContext, mode: Literal["loss", "logprobs"] = "loss"
    ) -> tuple[Tensor, dict[str, Tensor]] | tuple[Tensor, Tensor]:
        """Return the loss (a scalar) and sums to log, or with ``logprobs`` log-prob and entropy [T] of the sampled
        tokens in nats."""
        with torch.autocast(packed.input_ids.device.type, torch.bfloat16, enabled=self._autocast):
            hidden = final_hidden(self.model, packed)
            head = lm_head_of(self.model)
            if mode == "logprobs":
                return student_logprobs(hidden, head, batch, context, chunk_tokens=self._chunk_tokens)
            return sparse_head_loss(hidden, head, batch, self._objective, context, chunk_tokens=self._chunk_tokens)

    @property
    def vocab_size(self) -> int:
        return lm_head_of(self.model).vocab_size


# -- chunks of logits -------------------------------------------------------------------------------------------------

# A chunk of the head: its matrix products, and its logits with the wanted ids apart and the rest as a sum.
#
# Letters: C rows of a chunk, V vocabulary, K' columns of wanted ids, N wanted ids, E merged stops.


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
