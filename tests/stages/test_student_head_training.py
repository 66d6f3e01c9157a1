"""The sparse head inside training: low precision, autocast, tied and frozen heads, memory, several processes."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from eopd.stages.memory import head_rows
from eopd.stages.models.lm_head import LMHead
from eopd.stages.train.objectives.base import Objective, TeacherBatch
from eopd.stages.train.objectives.registry import make_objective
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.student import sparse_head_loss, student_logprobs
from tests.stages.dense_oracle import Case, make_case, oracle

EOPD = ObjectiveSettings(name="eopd", rkl="topk")


def build(case: Case, settings: ObjectiveSettings = EOPD) -> tuple[Objective, TeacherBatch]:
    objective = make_objective(settings)
    return objective, TeacherBatch.build(case.rows, case.rule, case.stops, objective.plan, case.vocab)


def head_with(case: Case, weight: Tensor) -> LMHead:
    return replace(case.head, weight=weight)


class LargestTensor(TorchDispatchMode):
    """Notes the largest result of any operation, and shapes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *(t.untyped_storage().nbytes() // t.element_size() for t in tensors)])
        if "mm" in str(func):
            self.products += [tuple(t.shape) for t in tensors]
        return out


def test_nothing_of_the_size_of_tokens_times_vocabulary_is_made() -> None:
    case = make_case(1, tokens=96, vocab=4000, dim=8)
    objective, batch = build(case)
    hidden, weight = case.hidden.clone().requires_grad_(), case.head.weight.clone().requires_grad_()
    with LargestTensor() as seen:
        loss, _ = sparse_head_loss(hidden, head_with(case, weight), batch, objective, case.context, chunk_tokens=16)
        loss.backward()
    assert seen.largest == 16 * 4000  # the workspace; T * V would be 6 times that, the weight is half of it


def test_three_products_and_none_for_what_is_frozen() -> None:
    case = make_case(2, tokens=30, vocab=64, dim=8)
    objective, batch = build(case)
    for trains_hidden, trains_weight in ((True, True), (True, False), (False, True), (False, False)):
        hidden = case.hidden.clone().requires_grad_(trains_hidden)
        weight = case.head.weight.clone().requires_grad_(trains_weight)
        with LargestTensor() as seen:
            loss, _ = sparse_head_loss(hidden, head_with(case, weight), batch, objective, case.context)
            if loss.requires_grad:
                loss.backward()
        expected = [(30, 64)] + [(30, 8)] * trains_hidden + [(64, 8)] * trains_weight
        assert sorted(seen.products) == sorted(expected)
        assert (hidden.grad is not None) == trains_hidden
        assert (weight.grad is not None) == trains_weight
    with torch.no_grad():
        loss, _ = sparse_head_loss(case.hidden, case.head, batch, objective, case.context)
    assert not loss.requires_grad


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_within_a_thousandth(weights: torch.dtype, autocast: bool) -> None:
    case = make_case(3, tokens=64, vocab=300, dim=32)
    hidden, weight = case.hidden.bfloat16(), case.head.weight.to(weights)
    exact = replace(case, hidden=hidden.float(), head=head_with(case, weight.float()))
    expected, grad_hidden, grad_weight, _, _ = oracle(exact, EOPD)
    objective, batch = build(case)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = sparse_head_loss(hidden, head_with(case, weight), batch, objective, case.context, chunk_tokens=20)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    # What the caller sees is rounded to the dtype of the parameter (2^-9); so compare before and after.
    for result, wanted in ((hidden.grad, grad_hidden), (weight.grad, grad_weight)):
        assert result is not None
        error = (result.double() - wanted.to(result.dtype).double()).norm() / wanted.norm()
        assert error <= 1e-3
    logprob, _ = student_logprobs(hidden.detach(), head_with(case, weight.detach()), batch, case.context)
    q = exact.head.logits(exact.hidden).double().log_softmax(dim=1)
    ids = torch.from_numpy(case.rows.token_ids).long()
    apart = ~torch.isin(ids, torch.tensor(case.stops.union))
    assert torch.allclose(logprob[apart], q.gather(1, ids[:, None])[apart, 0], atol=1e-5)


class TinyTied(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(case.head.weight.clone(), freeze=False)
        self.layer = nn.Linear(case.hidden.shape[1], case.hidden.shape[1])

    def forward(self, ids: Tensor, recompute: bool = False) -> Tensor:
        x = self.embedding(ids)
        return checkpoint(self.layer, x, use_reentrant=False) if recompute else self.layer(x)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_reaches_a_tied_parameter(recompute: bool) -> None:
    case = make_case(4, tokens=25, vocab=50)
    torch.manual_seed(0)
    model, ids = TinyTied(case), torch.randint(50, (25,))
    objective, batch = build(case)

    def gradient(scale: float = 1.0) -> Tensor:
        model.zero_grad()
        hidden = model(ids, recompute)
        head = head_with(case, model.embedding.weight)
        loss, _ = sparse_head_loss(hidden, head, batch, objective, case.context, chunk_tokens=10)
        (scale * loss).backward()
        assert model.embedding.weight.grad is not None
        return model.embedding.weight.grad.clone()

    whole = gradient()
    # By hand: the two ways in which the parameter acts.
    hidden = model(ids).detach()
    _, grad_hidden, grad_head, _, _ = oracle(replace(case, hidden=hidden), EOPD)
    model.zero_grad()
    model(ids).backward(grad_hidden.float())
    assert model.embedding.weight.grad is not None
    assert torch.allclose(whole, model.embedding.weight.grad + grad_head.float(), atol=1e-6)
    assert torch.allclose(gradient(0.25), whole / 4, atol=1e-7)


def test_a_loss_can_be_differentiated_once() -> None:
    case = make_case(5)
    objective, batch = build(case)
    loss, _ = sparse_head_loss(case.hidden.requires_grad_(), case.head, batch, objective, case.context)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="differentiated once"):
        loss.backward()


def test_all_masked_and_no_tokens() -> None:
    case = make_case(6)
    objective, batch = build(case)
    hidden = case.hidden.clone().requires_grad_()
    weight = case.head.weight.clone().requires_grad_()
    none = replace(case.context, mask=torch.zeros(37))
    loss, metrics = sparse_head_loss(hidden, head_with(case, weight), batch, objective, none)
    loss.backward()
    assert loss.item() == 0.0
    assert metrics["tokens"].item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    empty, _ = sparse_head_loss(hidden[:0], head_with(case, weight), batch.slice(0, 0), objective, none.slice(0, 0))
    empty.backward()
    assert empty.item() == 0.0


def test_chunks_fit_the_workspace() -> None:
    assert head_rows(151936) == 416
    assert head_rows(151936, gpu_bytes=24 * 2**30) == 640
    assert head_rows(151936, gpu_bytes=80 * 2**30) == 1760
    assert head_rows(32) == 2**21
    assert head_rows(10**8) == 32


def _check_two_processes(kind: str, rank: int) -> None:
    """The gradient of two processes, each with half of the tokens, equals the whole's on one."""
    case = make_case(7, tokens=24, vocab=50)
    ids = torch.arange(24) % 50
    objective, batch = build(case)

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16))
            self.head = nn.Linear(16, 50, bias=False)

        def forward(self, start: int, stop: int, normaliser: float) -> Tensor:
            hidden = self.backbone(ids[start:stop])
            context = replace(case.context.slice(start, stop), normaliser=normaliser)
            head = LMHead(self.head.weight, None, 1.0, None, 50)
            return sparse_head_loss(hidden, head, batch.slice(start, stop), objective, context, chunk_tokens=5)[0]

    alone = Student()
    alone(0, 24, 24.0).backward()
    together: nn.Module = Student()
    if kind == "ddp":
        together = DistributedDataParallel(together)
    else:
        if kind == "fsdp2-head-apart":
            fully_shard(together.head)
        fully_shard(together.backbone)
        fully_shard(together)
    # Gradients are averaged over processes, so each divides by its share of all tokens.
    together(12 * rank, 12 * rank + 12, 24.0 / 2).backward()
    for (name, one), other in zip(alone.named_parameters(), together.parameters(), strict=True):
        result = other.grad.full_tensor() if isinstance(other.grad, DTensor) else other.grad
        assert torch.allclose(one.grad, result, atol=1e-6), f"{kind}: {name}"


def _two_processes(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for kind in ("ddp", "fsdp2", "fsdp2-head-apart"):
        _check_two_processes(kind, rank)
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_ddp_and_fsdp2_give_the_gradient_of_one_process() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_two_processes, (port,), nprocs=2)
