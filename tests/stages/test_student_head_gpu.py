"""The sparse head on a GPU: the same numbers as the dense oracle, in float32 and under bfloat16 autocast."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from eopd.stages.train.objectives.base import StepContext, TeacherBatch
from eopd.stages.train.objectives.registry import make_objective
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.student import sparse_head_loss
from tests.stages.dense_oracle import make_case, oracle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(context: StepContext) -> StepContext:
    moved = {f.name: getattr(context, f.name) for f in fields(context)}
    return replace(context, **{k: v.cuda() for k, v in moved.items() if isinstance(v, torch.Tensor)})


@pytest.mark.parametrize("name", ["eopd", "jsd", "tropd", "reopold", "vopd"])
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_gpu_equals_the_dense_oracle(name: str, low: bool) -> None:
    settings = ObjectiveSettings(name=name, k=12)
    objective = make_objective(settings)
    case = make_case(1, tokens=96, vocab=512, dim=64)
    hidden, weight = case.hidden, case.head.weight
    if low:
        hidden, weight = hidden.bfloat16().float(), weight.bfloat16().float()
        case = replace(case, hidden=hidden, head=replace(case.head, weight=weight))
    expected, grad_hidden, grad_weight, _, largest = oracle(case, settings)
    hidden, weight = hidden.cuda().requires_grad_(), weight.cuda().requires_grad_()
    batch = TeacherBatch.build(case.rows, case.rule, case.stops, objective.plan, case.vocab, "cuda")
    head = replace(case.head, weight=weight)
    with torch.autocast("cuda", torch.bfloat16, enabled=low):
        loss, metrics = sparse_head_loss(hidden, head, batch, objective, on_gpu(case.context), chunk_tokens=40)
    loss.backward()
    assert metrics["tokens"].device.type == "cuda"
    # Logits of bfloat16 inputs are exact; their gradient passes through one more rounding (2^-9) in each product.
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6 * max(1.0, largest))
    for result, wanted in ((hidden.grad, grad_hidden), (weight.grad, grad_weight)):
        assert result is not None
        error = (result.double().cpu() - wanted).norm() / wanted.norm()
        assert error <= (4e-3 if low else 2e-6)
