"""The sparse head against the dense oracle: value and gradients, every objective, odd shapes, several chunks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from eopd.stages.train.objectives.base import TeacherBatch
from eopd.stages.train.objectives.registry import make_objective
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.stops import StopHandling
from eopd.stages.train.student import sparse_head_loss, student_logprobs
from eopd.storage.teacher_record import HeadRule
from tests.bounds import entropy_rounding, logits_rounding, logprobs_rounding, unit
from tests.stages.dense_oracle import Case, dense, make_case, oracle, sampled_pair

FULL_DRAWS = HeadRule(k_max=24, min_prob=0.01, full_head_above=-1.0, draws="full", n_draws=50)
RAGGED = HeadRule(k_max=24, min_prob=0.05, full_head_above=1.5)
ROUNDING = 4 * math.sqrt(17) * unit()
"""Bound on the errors of loss and gradients over the largest logit, about 1e-6: the roundings of a product over 16
hidden units and a bias add up like their square root (``tests.bounds.forward_rounding``)."""

OBJECTIVES: list[dict[str, Any]] = [
    {"name": "sft"},
    *(
        {"name": "opd", "advantage": a, "ratio": r}
        for a in ("old", "current")
        for r in ("ppo", "is", "truncated", "none")
    ),
    {"name": "opd", "rkl": "topk"},
    {"name": "opd", "rkl": "topk", "student_topk": 4},
    {"name": "lightning_opd"},
    *({"name": "fkl", "support": m} for m in ("renormalised", "true", "bucket", "sampled")),
    {"name": "rkl_topk"},
    {"name": "rkl_topk", "student_topk": 4, "k": 4},
    {"name": "jsd"},
    {"name": "jsd", "beta": 0.1},
    *({"name": "eopd", "support": m} for m in ("renormalised", "true", "bucket", "sampled")),
    {"name": "eopd", "rkl": "topk"},
    {"name": "eopd", "rkl": "topk", "support": "bucket", "student_topk": 4, "alpha": 0.3, "tau": 1.4},
    {"name": "fkl", "support": "sampled", "draws": "full"},
    {"name": "rs_kd"},
    *({"name": "tropd", "outlier": o, "k": 12, "prefix_beta": 0.5} for o in ("fkl", "clip", "mask", "jsd")),
    *({"name": "reopold", "floor_form": f} for f in ("mixture", "logit")),
    {"name": "reopold", "advantage": "current", "ratio": "none"},
    {"name": "vopd"},
    {"name": "vopd", "student_topk": 4, "ratio": "is"},
    {"name": "vopd", "student_topk": 4, "baseline": "renormalised"},
    {"name": "vopd", "baseline": "renormalised"},
]


def measure(
    case: Case, given: dict[str, Any], chunk: int | None = 9, *, has_prefixes: bool = False
) -> dict[str, float]:
    """Largest differences to the oracle, over max(1, largest |logit|)."""
    settings = ObjectiveSettings.model_validate(given)
    objective = make_objective(settings, has_prefixes=has_prefixes)
    hidden = case.hidden.clone().requires_grad_()
    weight = case.head.weight.clone().requires_grad_()
    bias = None if case.head.bias is None else case.head.bias.clone().requires_grad_()
    head = replace(case.head, weight=weight, bias=bias)
    batch = TeacherBatch.build(case.rows, case.rule, case.stops, objective.plan, case.vocab)
    loss, _ = sparse_head_loss(hidden, head, batch, objective, case.context, chunk_tokens=chunk)
    loss.backward()
    expected, grad_hidden, grad_weight, grad_bias, largest = oracle(case, settings, has_prefixes=has_prefixes)
    assert expected.isfinite()
    assert grad_weight.abs().max() > 0
    unit = max(1.0, largest)
    result = {"value": (loss.double() - expected).abs(), "hidden": (hidden.grad.double() - grad_hidden).abs().max()}
    result["weight"] = (weight.grad.double() - grad_weight).abs().max()
    if bias is not None:
        result["bias"] = (bias.grad.double() - grad_bias).abs().max()
    return {name: value.item() / unit for name, value in result.items()}


def rule_for(given: dict[str, Any]) -> HeadRule | None:
    full = given["name"] == "rs_kd" or given.get("draws") == "full"
    return FULL_DRAWS if full else None


@pytest.mark.parametrize("stops", ["class", "remap"])
@pytest.mark.parametrize("given", OBJECTIVES, ids=lambda g: "-".join(map(str, g.values())))
def test_value_and_gradient_equal_the_dense_oracle(given: dict[str, Any], stops: str) -> None:
    if given["name"] != "sft":
        given = {**given, "stops": stops}
    case = make_case(1, rule=rule_for(given), extra=4, stops=StopHandling(stops, (3, 7), (5, 3)))
    assert max(measure(case, given).values()) <= ROUNDING


TRAITS: list[dict[str, Any]] = [
    {"bias": True},
    {"scale": 0.25, "sharpness": 12.0},
    {"softcap": 4.0},
    {"softcap": 4.0, "scale": 2.0, "temperature": 0.7, "bias": True},
    {"temperature": 0.6},
    {"teacher_vocab": 120},
    {"teacher_vocab": 120, "stops": StopHandling("class", (3,), (110, 3))},
    {"sharpness": 30.0},
    {"tokens": 1},
    {"tokens": 50, "vocab": 67, "dim": 3},
    {"stops": StopHandling("class", (3,), (3,))},
    {"stops": StopHandling("class", (), ())},
]


@pytest.mark.parametrize("traits", TRAITS, ids=str)
@pytest.mark.parametrize("support", ["renormalised", "bucket", "sampled"])
def test_head_traits_vocabularies_and_odd_shapes(traits: dict[str, Any], support: str) -> None:
    case = make_case(2, **traits)
    for given in (
        {"name": "eopd", "support": support, "tau": 0.1},
        {"name": "eopd", "support": support, "rkl": "topk"},
    ):
        assert max(measure(case, given).values()) <= ROUNDING, given


@pytest.mark.parametrize("seed", range(4))
def test_ragged_heads_with_draws(seed: int) -> None:
    case = make_case(seed, rule=RAGGED, tokens=61)
    assert max(measure(case, {"name": "fkl", "support": "sampled"}).values()) <= ROUNDING


@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 1000, None])
def test_chunking_does_not_matter(chunk: int | None) -> None:
    assert max(measure(make_case(3), {"name": "eopd"}, chunk).values()) <= ROUNDING


@pytest.mark.parametrize("mode", ["class", "remap"])
def test_round_start_logprobs_and_entropies(mode: Any) -> None:
    case = make_case(4, stops=StopHandling(mode, (3, 7), (5, 3)), temperature=0.8)
    objective = make_objective(ObjectiveSettings(name="eopd", stops=mode))
    batch = TeacherBatch.build(case.rows, case.rule, case.stops, objective.plan, case.vocab)
    logprob, entropy = student_logprobs(case.hidden, case.head, batch, case.context, chunk_tokens=8)
    d = dense(case, mode, case.hidden.double(), case.head.weight.double(), None)
    error = logprobs_rounding(logits_rounding(case.head, case.hidden, 0.8), d.q)
    assert ((logprob - sampled_pair(d, case)[1]).abs() <= error).all()
    assert ((entropy - d.mean_entropy).abs() <= entropy_rounding(error, d.mean_entropy)).all()


@pytest.mark.parametrize("given", [{"name": "eopd"}, {"name": "fkl", "support": "sampled"}, {"name": "sft"}], ids=str)
def test_weights_of_responses_scale_their_loss(given: dict[str, Any]) -> None:
    case = make_case(5)
    weight = torch.rand(len(case.context.mask), generator=torch.Generator().manual_seed(1))
    assert max(measure(replace(case, context=replace(case.context, weight=weight)), given).values()) <= ROUNDING


@pytest.mark.parametrize("given", OBJECTIVES, ids=str)
def test_tokens_of_the_teacher_have_a_loss_of_their_own(given: dict[str, Any]) -> None:
    """beta (log p - log q) on them, whatever the objective does on the student's."""
    case = make_case(seed=3, rule=rule_for(given), extra=4)
    assert case.context.teacher_prefix is not None
    assert 0 < case.context.teacher_prefix.sum() < len(case.context.mask) - 1
    values = measure(case, {"prefix_beta": 0.5, **given}, has_prefixes=True)
    assert max(values.values()) <= ROUNDING
