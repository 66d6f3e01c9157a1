"""The student's sparse head: log-probs at the ids an objective asks for, and exact gradients, never [T, V].

Logits live in one workspace of C rows. In a chunk the wanted ids are taken out of it first; what stays is summed
as "the rest", so that a tail is exact however small. The loss is then a function of few numbers a token, its gradient
there comes from autograd, and the gradient of all other logits is proportional to their softmax: the workspace is
turned into it in place. Three matrix products in all, as many as a dense head needs.

Letters: T tokens, C rows of a chunk, V vocabulary, D hidden size, K outcome columns, N wanted ids, E merged stops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eopd.stages.models.lm_head import LMHead
from eopd.stages.train.head_products import HeadProducts, local_parameter
from eopd.stages.train.objectives.base import LOG_ZERO, Objective, SparseStudent, StepContext, TokenLoss, outcomes
from eopd.stages.train.objectives.divergence import forward_kl, reverse_kl
from eopd.stages.train.objectives.teacher_batch import TeacherBatch

WORKSPACE_BYTES = 256 * 2**20
"""Logits alive at once, unless ``chunk_tokens`` says otherwise."""

GROUP_BYTES = 16 * 2**20
"""Rows handled together between reading and writing the workspace on the CPU: few enough to stay in a cache, many
enough that threads do not wait for each other more than they work."""


def default_chunk_tokens(vocab_size: int, itemsize: int = 4) -> int:
    """Rows of a chunk: as many as fit ``WORKSPACE_BYTES``, a multiple of 32."""
    return max(32, WORKSPACE_BYTES // (vocab_size * itemsize) // 32 * 32)


def sparse_head_loss(
    hidden: Tensor,
    head: LMHead,
    batch: TeacherBatch,
    objective: Objective,
    context: StepContext,
    *,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of final hidden states [T, D] and figures to log.

    Returns (sum over tokens of mask * loss / normaliser: a scalar that can be differentiated once to ``hidden``, head
    weight and bias; metrics: sums over tokens of ``mask`` times each figure, to be added over micro-batches and ranks
    and divided by the sum ``tokens``).

    Raises:
        ValueError: ``hidden`` and ``batch`` differ in tokens, or the context lacks what the objective needs.
    """
    if len(hidden) != batch.tokens:
        raise ValueError(
            f"{len(hidden)} hidden states for {batch.tokens} teacher rows: response and cache do not match"
        )
    head = replace(
        head, weight=local_parameter(head.weight), bias=None if head.bias is None else local_parameter(head.bias)
    )
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
    """Log-prob of the sampled token and entropy, each [T] float64 in nats, of hidden states [T, D]; no gradient.

    Stops are merged as ``batch`` says; of ``context`` only the temperature is read.
    """
    _check_tokens(hidden, batch)
    logprobs = torch.empty(len(hidden), dtype=torch.float64, device=hidden.device)
    entropies = torch.empty_like(logprobs)
    pass_ = _Pass(hidden.detach(), _whole(head), context.temperature, _Wanted(False, False, False), chunk_tokens)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for start, stop in pass_.chunks():
            teacher = batch.slice(start, stop)
            student = _student(_take(pass_.logits(start, stop), teacher), teacher)
            logprobs[start:stop], entropies[start:stop] = student.sampled, student.entropy
    return logprobs, entropies


def _check_tokens(hidden: Tensor, batch: TeacherBatch) -> None:
    if len(hidden) != batch.tokens:
        raise ValueError(
            f"{len(hidden)} hidden states for {batch.tokens} teacher rows: response and cache do not match"
        )


def _whole(head: LMHead) -> LMHead:
    """``head`` with parameters gathered where they are sharded."""
    bias = None if head.bias is None else local_parameter(head.bias)
    return replace(head, weight=local_parameter(head.weight), bias=bias)


@dataclass(frozen=True)
class _Wanted:
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool

    def __iter__(self) -> Iterator[bool]:
        return iter((self.hidden, self.weight, self.bias))


@dataclass(frozen=True)
class _Rest:
    """The workspace after ``_take_rest``: exp(logit - largest); sums of it, float64 [C]."""

    largest: Tensor
    total: Tensor  # sum of exp(logit - largest)
    moment: Tensor  # sum of exp(logit - largest) * (logit - largest)

    @property
    def log_mass(self) -> Tensor:
        return self.largest + self.total.log()


@dataclass(frozen=True)
class _Taken:
    """What is left of a chunk's logits once the workspace holds exp(logit - largest)."""

    places: Tensor  # [N] of the wanted ids in the workspace, flattened
    z: Tensor  # [C, K'] logits at them, float64; LOG_ZERO where a column is unused
    z_stops: Tensor  # [C, E] logits of merged stops
    log_rest: Tensor  # [C] log-sum-exp of all others
    rest: _Rest


def _take(logits: Tensor, teacher: TeacherBatch) -> _Taken:
    """Read the wanted ids out of ``logits`` [C, V], which become exp(logit - largest) with 0 in those places."""
    places = teacher.row_of_support() * logits.shape[1] + teacher.support_ids
    flat = logits.view(-1)
    z = torch.full((len(logits), teacher.width), LOG_ZERO, dtype=torch.float64, device=logits.device)
    z.view(-1)[teacher.support_slots] = flat[places].double()
    z_stops = logits[:, teacher.stop_columns].double()
    flat[places] = LOG_ZERO
    logits[:, teacher.stop_columns] = LOG_ZERO
    rest = _take_rest(logits)
    return _Taken(places, z, z_stops, rest.log_mass, rest)


def _student(taken: _Taken, teacher: TeacherBatch) -> SparseStudent:
    logprob, log_rest = outcomes(taken.z, taken.z_stops, taken.log_rest)
    sampled = logprob.gather(1, teacher.sampled_column[:, None])[:, 0]
    return SparseStudent(logprob, log_rest, sampled, _entropy(logprob.detach(), log_rest.detach(), taken.rest))


def _group_rows(logits: Tensor) -> int:
    return max(1, GROUP_BYTES // (logits.shape[1] * logits.element_size()))


def _take_rest(logits: Tensor) -> _Rest:
    """``logits`` [C, V], wanted ids set to LOG_ZERO, become exp(logit - largest) in place."""
    rows, vocab = logits.shape
    group = rows if logits.is_cuda else _group_rows(logits)
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
    return _Rest(largest.double(), total.double(), moment.double())


def _entropy(logprob: Tensor, log_rest: Tensor, rest: _Rest) -> Tensor:
    """Entropy [C] from outcomes [C, K] and the rest's sums."""
    inside = -(logprob.exp() * logprob).sum(dim=1)
    mean_log = log_rest + rest.moment / rest.total - rest.total.log()  # mean of log q under q within the rest
    return inside - log_rest.exp() * mean_log


class _Pass:
    """One walk over the chunks; holds the workspace and the gradients so far."""

    def __init__(
        self, hidden: Tensor, head: LMHead, temperature: float, needs: _Wanted, chunk_tokens: int | None
    ) -> None:
        self.products = HeadProducts.of(head, hidden)
        self.hidden, self.head, self.temperature, self.needs = hidden, head, temperature, needs
        dtype, device = self.products.dtype, hidden.device
        most = chunk_tokens or default_chunk_tokens(head.vocab_size, dtype.itemsize)
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
        """Final logits [C, V] over the temperature, in the workspace."""
        out = self.workspace[: stop - start]
        self.products.logits_(self.hidden[start:stop], out)
        if self.head.softcap is not None:
            out.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        factor = self.head.scale / self.temperature
        return out if factor == 1.0 else out.mul_(factor)

    def chunk_loss(
        self, start: int, stop: int, teacher: TeacherBatch, objective: Objective, context: StepContext
    ) -> None:
        """Adds the loss, metrics and gradients of tokens [start, stop)."""
        logits = self.logits(start, stop)
        taken = _take(logits, teacher)
        leaves = (taken.z, taken.z_stops, taken.log_rest)
        with torch.enable_grad():
            for leaf in leaves:
                leaf.requires_grad_(any(self.needs))
            student = _student(taken, teacher)
            tokens = objective.token_loss(student, teacher, context)
            mask = context.mask.double()
            loss = (torch.where(mask > 0, tokens.loss, 0.0) * mask).sum() / context.normaliser
            if any(self.needs):
                grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        self.loss += loss.detach()
        for name, value in _figures(student, teacher, tokens, taken).items():
            total = (torch.where(mask > 0, value.detach().double(), 0.0) * mask).sum()
            self.metrics[name] = self.metrics[name] + total if name in self.metrics else total
        if any(self.needs):
            self._turn_into_gradient(logits, teacher, taken, grads)
            self._add_gradients(start, stop, logits)

    def _turn_into_gradient(
        self, logits: Tensor, teacher: TeacherBatch, taken: _Taken, grads: tuple[Tensor, ...]
    ) -> None:
        """The workspace, exp(logit - largest), becomes the gradient of the products before scale and soft-capping."""
        factor, cap = self.head.scale / self.temperature, self.head.softcap

        def slope(final: Tensor) -> Tensor | float:
            return factor if cap is None else factor * (1.0 - (final.detach() / (factor * cap)) ** 2)

        share = (grads[2] / taken.rest.total).to(logits.dtype)[:, None]
        if cap is None:
            logits.mul_(share * factor)
        else:
            rows = _group_rows(logits)
            for start in range(0, len(logits), rows):
                part, largest = logits[start : start + rows], taken.rest.largest[start : start + rows, None]
                # The logit is read back from its exponential; where that underflowed the gradient is 0 anyway.
                final = part.clamp_min(1e-37).log_().add_(largest.to(part.dtype))
                part.mul_(share[start : start + rows]).mul_(slope(final))
        grad_z = (grads[0] * slope(taken.z)).view(-1)[teacher.support_slots]
        logits.view(-1)[taken.places] = grad_z.to(logits.dtype)
        logits[:, teacher.stop_columns] = (grads[1] * slope(taken.z_stops)).to(logits.dtype)

    def _add_gradients(self, start: int, stop: int, grad_logits: Tensor) -> None:
        if self.grad_hidden is not None:
            self.grad_hidden[start:stop] = self.products.hidden_gradient(grad_logits)
        if self.grad_weight is not None:
            self.products.add_weight_gradient(self.grad_weight, grad_logits, self.hidden[start:stop], start == 0)
        if self.grad_bias is not None:
            self.grad_bias += grad_logits.sum(dim=0)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        weight, bias = self.grad_weight, self.grad_bias
        return (
            self.grad_hidden,
            None if weight is None else weight.to(self.head.weight.dtype),
            None if bias is None or self.head.bias is None else bias.to(self.head.bias.dtype),
        )


def _figures(student: SparseStudent, teacher: TeacherBatch, tokens: TokenLoss, taken: _Taken) -> dict[str, Tensor]:
    """Figures [C] that every objective reports, and its own."""
    figures = {
        "tokens": torch.ones_like(tokens.loss),
        "loss": tokens.loss,
        "teacher_entropy": teacher.entropy,
        "student_entropy": student.entropy,
        "retained_mass": torch.where(teacher.in_head, teacher.logprob.exp(), 0.0).sum(dim=1),
        "student_mass_on_support": torch.where(teacher.in_head, student.logprob.exp(), 0.0).sum(dim=1),
        **tokens.parts,
    }
    if teacher.logprob.shape[1]:
        best, column = torch.where(teacher.in_head, teacher.logprob, LOG_ZERO).max(dim=1)
        at_best = student.logprob.gather(1, column[:, None])[:, 0]
        # The largest single logit of the rest, as a log-prob: its share of the rest is 1 / total.
        rival = torch.maximum(student.logprob.amax(dim=1), student.rest - taken.rest.total.log())
        figures["top1_agreement"] = (at_best >= rival) & (best > LOG_ZERO)
        with torch.no_grad():  # whatever is trained on: how far the models are apart, head and one bucket
            figures["rkl"] = reverse_kl(student, teacher, "head")
            figures["fkl"] = forward_kl(student, teacher, "bucket")
    return figures


class _GradientsMadeInForward(torch.autograd.Function):
    """Passes on gradients that exist already, times the gradient of the loss."""

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
