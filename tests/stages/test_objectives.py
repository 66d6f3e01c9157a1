"""Primitives (gradcheck, closed-form gradients, bounds), settings, needs, the registry."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from eopd.stages.train.objectives.base import TeacherBatch
from eopd.stages.train.objectives.registry import BUILDERS, make_objective
from eopd.stages.train.objectives.reopold import EQUAL_ENTROPY, above_quantile, advantage_floor
from eopd.stages.train.objectives.settings import FAMILY, ObjectiveSettings
from eopd.stages.train.objectives.terms import forward_kl, jensen_shannon, kl_terms, policy_gradient, reverse_kl
from eopd.stages.train.objectives.tropd import hashed_uniform
from eopd.stages.train.stops import StopHandling
from eopd.stages.train.student import sparse_head_loss
from eopd.storage.coverage import DrawsNeed, EntropyNeed, ExtraIdsNeed, HeadNeed, SampledNeed, StopsNeed
from eopd.storage.errors import InputError
from eopd.storage.teacher_record import HeadRule, TeacherRows
from tests.raises import raises
from tests.reference_formulas import eopd_forward, eopd_loss, nemo_renorm, trl_tail, verl_topk
from tests.stages.dense_oracle import Case, make_case, rows_of
from tests.stages.sparse_student import student_at

OWN = Path(__file__).with_name("made_up_objective.py")
NO_STOPS = StopHandling()


def batch_of(case: Case, **given: Any) -> TeacherBatch:
    objective = make_objective(ObjectiveSettings.model_validate(given))
    return TeacherBatch.build(case.rows, case.rule, case.stops, objective.plan, case.vocab)


@pytest.mark.parametrize("stops", [NO_STOPS, StopHandling("class", (3, 7), (5, 3))], ids=["apart", "merged"])
def test_gradcheck_of_every_divergence(stops: StopHandling) -> None:
    case = make_case(5, tokens=4, vocab=19, dim=5, rule=HeadRule(6, 0.02, -1.0), stops=stops, extra=2)
    batch = batch_of(case, name="eopd", support="sampled", rkl="topk", student_topk=2)
    logits = torch.randn(4, 19, dtype=torch.float64, requires_grad=True)
    losses = [lambda s, m=m: forward_kl(s, batch, m) for m in ("renormalised", "true", "bucket", "sampled")]
    losses += [lambda s: reverse_kl(s, batch, "head"), lambda s: reverse_kl(s, batch, "known")]
    losses += [lambda s: jensen_shannon(s, batch, 0.3)]
    for loss in losses:
        assert torch.autograd.gradcheck(lambda x, f=loss: f(student_at(x, batch)), (logits,))


@pytest.mark.parametrize(
    ("ratio", "weight"),
    [
        ("ppo", lambda r, a: r if not ((a > 0 and r > 1.2) or (a < 0 and r < 0.8)) else 0.0),
        ("is", lambda r, a: r),
        ("truncated", lambda r, a: min(r, 1.5)),
        ("none", lambda r, a: 1.0),
    ],
)
def test_surrogates_have_their_closed_form_gradient(ratio: Any, weight: Any) -> None:
    q_old = torch.full((8,), -2.0, dtype=torch.float64)
    moved = torch.tensor([-0.9, -0.3, -0.1, 0.0, 0.1, 0.15, 0.3, 0.9], dtype=torch.float64)
    for a in (-1.7, 0.6):
        q = (q_old + moved).requires_grad_()
        term = policy_gradient(q, torch.full_like(q_old, a), ratio, q_old, clip_eps=0.2, truncate_at=1.5)
        (gradient,) = torch.autograd.grad(term.loss.sum(), q)
        expected = [-a * weight(r, a) for r in moved.exp().tolist()]
        assert gradient.tolist() == pytest.approx(expected, abs=1e-12)


def test_is_with_the_present_advantage_is_exact_reverse_kl_in_expectation() -> None:
    torch.manual_seed(0)
    logits, old = torch.randn(6, dtype=torch.float64, requires_grad=True), torch.randn(6).double().log_softmax(0)
    p = torch.randn(6).double().log_softmax(0)
    q = logits.log_softmax(0)
    term = policy_gradient(q, (p - q).detach(), "is", old)
    (result,) = torch.autograd.grad((old.exp() * term.loss).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad((q.exp() * (q - p)).sum(), logits)
    assert torch.allclose(result, exact, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 30), sharp=st.floats(0.1, 60), same=st.booleans())
def test_bucketed_divergences_are_bounds_and_finite(seed: int, k: int, sharp: float, same: bool) -> None:
    made = torch.Generator().manual_seed(seed)
    teacher = (torch.randn(5, 30, generator=made).double() * sharp).log_softmax(dim=1)
    teacher[0] = torch.full((30,), -60.0).double()
    teacher[0, 4] = 0.0  # p = 1
    logits = teacher.clone() if same else torch.randn(5, 30, generator=made).double() * sharp
    logits.requires_grad_()
    ids = torch.randint(30, (5,), generator=made)
    rows = rows_of(teacher, ids, HeadRule(k, 0.5, -1.0, draws="none"), (), np.zeros((5, 0), int), seed)
    objective = make_objective(ObjectiveSettings(name="fkl", k=k))
    batch = TeacherBatch.build(rows, HeadRule(k), NO_STOPS, objective.plan, 30)
    student = student_at(logits, batch)
    q = logits.log_softmax(dim=1)
    forward, reverse = forward_kl(student, batch, "bucket"), reverse_kl(student, batch, "head")
    jsd = jensen_shannon(student, batch, 0.5)
    exact = (teacher.exp() * (teacher - q)).sum(dim=1)
    exact_reverse = (q.exp() * (q - teacher.clamp_min(-50.0))).sum(dim=1)
    for value in (forward, reverse, jsd):
        assert value.isfinite().all()
        assert (value >= 0).all()
    assert (jsd <= math.log(2) + 1e-6).all()
    slack = 1e-5 * (1 + exact.detach().abs())  # the record is float32
    assert (forward <= exact + slack).all()
    if k == 30:
        assert torch.allclose(forward, exact, atol=1e-4, rtol=1e-5)
        kept = teacher.min(dim=1).values > -49
        assert torch.allclose(reverse[kept], exact_reverse[kept], atol=1e-4, rtol=1e-5)
    (gradient,) = torch.autograd.grad((forward + reverse + jsd).sum(), logits)
    assert gradient.isfinite().all()
    if same:  # the teacher is a minimum
        assert (gradient[1:].abs() <= 2e-5 * max(1.0, sharp)).all()


def test_terms_of_a_divergence_are_never_negative_and_stable_near_equality() -> None:
    a = torch.linspace(-49, 0, 400, dtype=torch.float64)
    for shift in (0.0, 1e-12, -1e-12, 1e-7, 0.999, 1.001, -1.001, -30.0):
        assert (kl_terms(a, a + shift) >= 0).all()
    tiny = kl_terms(torch.zeros(1).double(), torch.full((1,), 1e-6).double())
    assert tiny.item() == pytest.approx(0.5e-12, rel=1e-5)


def test_only_bucket_and_sampled_make_the_teacher_stationary() -> None:
    case = make_case(6, tokens=3, vocab=12, rule=HeadRule(4, 0.001, -1.0), stops=NO_STOPS)
    logits = case.teacher.clone().requires_grad_()

    def slope(loss: Tensor) -> float:
        return float(torch.autograd.grad(loss.sum(), logits)[0].abs().max())

    bucket = batch_of(case, name="fkl", support="bucket", k=4)
    assert slope(forward_kl(student_at(logits, bucket), bucket, "bucket")) < 1e-6
    assert slope(reverse_kl(student_at(logits, bucket), bucket)) < 1e-6
    sampled = batch_of(case, name="fkl", support="sampled")
    assert slope(forward_kl(student_at(logits, sampled), sampled, "sampled")) < 2e-3  # draws of weight 0.001
    renormalised = slope(forward_kl(student_at(logits, bucket), bucket, "renormalised"))
    true = slope(forward_kl(student_at(logits, bucket), bucket, "true"))
    assert min(renormalised, true) > 0.05


def test_sampled_support_is_unbiased_over_draws() -> None:
    case = make_case(7, tokens=6, vocab=40, stops=StopHandling("class", (3,), (5,)))
    logits = torch.randn(6, 40, dtype=torch.float64)
    rule = HeadRule(3, 0.05, -1.0)
    ids, none = torch.from_numpy(case.rows.token_ids).long(), np.zeros((6, 0), int)
    values = []
    for seed in range(400):
        rows = rows_of(case.teacher, ids, rule, case.stops.union, none, seed)
        batch = batch_of(replace(case, rows=rows, rule=rule), name="fkl", support="sampled")
        values.append(forward_kl(student_at(logits, batch), batch, "sampled"))
    result, spread = torch.stack(values).mean(dim=0), torch.stack(values).std(dim=0) / 20
    stops, others = [3, 5], [i for i in range(40) if i not in (3, 5)]
    p, q = (
        torch.cat([x[:, others], x[:, stops].logsumexp(1, keepdim=True)], dim=1)
        for x in (case.teacher, logits.log_softmax(1))
    )
    exact = (p.exp() * (p - q)).sum(dim=1)
    assert ((result - exact).abs() <= 4 * spread + 5e-4).all()


def test_published_formulas() -> None:
    case = make_case(8, tokens=30, vocab=50, rule=HeadRule(16, 0.01, -1.0), stops=NO_STOPS)
    logits = torch.randn(30, 50, dtype=torch.float64)
    p, q = case.teacher, logits.log_softmax(dim=1)
    batch = batch_of(case, name="fkl", k=16)
    support = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(16, dim=1).indices, True)
    student = student_at(logits, batch)
    close = {"atol": 1e-6, "rtol": 1e-6}
    assert torch.allclose(forward_kl(student, batch, "true"), verl_topk(p, q, support), **close)
    assert torch.allclose(forward_kl(student, batch, "bucket"), trl_tail(p, q, support), **close)
    ours = forward_kl(student, batch, "renormalised")
    assert torch.allclose(ours, eopd_forward(p, q, support), **close)
    mass = torch.where(support, q.exp(), 0.0).sum(dim=1).log()
    assert torch.allclose(ours + mass, nemo_renorm(p, q, support), **close)


def test_eopd_is_the_published_loss() -> None:
    case = make_case(9, tokens=40, vocab=60, stops=NO_STOPS)
    case = replace(case, context=replace(case.context, mask=torch.ones(40), normaliser=40.0))
    objective = make_objective(ObjectiveSettings(name="eopd", advantage="old"))
    batch = TeacherBatch.build(case.rows, case.rule, case.stops, objective.plan, 60)
    loss, metrics = sparse_head_loss(case.hidden, case.head, batch, objective, case.context, chunk_tokens=11)
    q = case.head.logits(case.hidden).double().log_softmax(dim=1)
    assert case.context.q_old is not None
    ids = torch.from_numpy(case.rows.token_ids).long()
    expected = eopd_loss(case.teacher, q, case.context.q_old, ids, 16, 0.8, 0.2)
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6)
    gate = -(case.teacher.exp() * case.teacher).sum(dim=1) > 0.8
    assert 0 < metrics["gate"].item() == gate.sum().item() < 40
    assert metrics["tokens"].item() == 40
    assert metrics["student_entropy"].item() == pytest.approx(-(q.exp() * q).sum().item(), abs=1e-4)
    top1 = (case.teacher.argmax(dim=1) == q.argmax(dim=1)).sum().item()
    assert metrics["top1_agreement"].item() == top1
    assert 0 < top1 < 40


def test_metrics_add_up_over_micro_batches() -> None:
    case = make_case(10, tokens=20)
    objective = make_objective(ObjectiveSettings(name="eopd"))
    whole = batch_of(case, name="eopd")
    loss, figures = sparse_head_loss(case.hidden, case.head, whole, objective, case.context)
    parts = [
        sparse_head_loss(case.hidden[a:b], case.head, whole.slice(a, b), objective, case.context.slice(a, b))
        for a, b in ((0, 7), (7, 20))
    ]
    assert loss.item() == pytest.approx(sum(part[0].item() for part in parts), abs=1e-6)
    for name, value in figures.items():
        assert value.item() == pytest.approx(sum(part[1][name].item() for part in parts), abs=1e-6), name


def test_needs_follow_the_settings() -> None:
    def needs(**given: Any) -> set[object]:
        return set(make_objective(ObjectiveSettings.model_validate(given)).needs)

    assert needs(name="eopd", k=32) == {EntropyNeed(), SampledNeed(), HeadNeed(32, 0.8), StopsNeed()}
    assert needs(name="eopd", support="sampled") == {
        EntropyNeed(),
        HeadNeed(1),
        SampledNeed(),
        DrawsNeed("beyond_head"),
        StopsNeed(),
    }
    assert needs(name="opd") == {SampledNeed(), StopsNeed()}
    assert ExtraIdsNeed(8) in needs(name="opd", rkl="topk", student_topk=8)
    assert DrawsNeed("full", n=50) in needs(name="rs_kd")
    assert needs(name="tropd") == {HeadNeed(64), SampledNeed(), StopsNeed()}
    assert needs(name="tropd", outlier="clip") == needs(name="tropd", outlier="mask") == {SampledNeed(), StopsNeed()}
    assert needs(name="eopd", rkl="topk") == {EntropyNeed(), HeadNeed(16, 0.8), HeadNeed(1), StopsNeed()}
    assert needs(name="sft") == set()


NEED_OF = {  # which need stands for which of the stored inputs
    "entropy": EntropyNeed,
    "sampled_logprob": SampledNeed,
    "stop_logprobs": StopsNeed,
    "head_logprobs": HeadNeed,
    "draw_ids": DrawsNeed,
    "extra_logprobs": ExtraIdsNeed,
}
EVERY_OBJECTIVE: list[dict[str, Any]] = [
    {"name": "sft"},
    {"name": "opd"},
    {"name": "opd", "student_topk": 3},
    {"name": "opd", "rkl": "topk"},
    {"name": "opd", "rkl": "topk", "student_topk": 3},
    {"name": "opd", "advantage": "old", "ratio": "none"},
    {"name": "lightning_opd"},
    *({"name": "fkl", "support": support} for support in ("bucket", "renormalised", "true", "sampled")),
    {"name": "fkl", "support": "sampled", "draws": "full"},
    {"name": "rkl_topk"},
    {"name": "rkl_topk", "student_topk": 3},
    {"name": "jsd"},
    *({"name": "eopd", "support": support} for support in ("bucket", "renormalised", "true", "sampled")),
    {"name": "eopd", "support": "sampled", "draws": "full", "rkl": "topk"},
    {"name": "eopd", "rkl": "topk"},
    {"name": "eopd", "rkl": "topk", "student_topk": 3},
    {"name": "eopd", "alpha": 0.0},
    *({"name": "tropd", "outlier": outlier} for outlier in ("fkl", "clip", "mask", "jsd")),
    {"name": "reopold"},
    {"name": "vopd"},
    {"name": "vopd", "student_topk": 3},
    {"name": "vopd", "baseline": "renormalised"},
    {"name": "vopd", "baseline": "renormalised", "student_topk": 3},
    {"name": "rs_kd"},
]


def perturbed(rows: TeacherRows, field: str) -> TeacherRows:
    """Rows with another content of one stored input, of the kind that it may have."""
    value = getattr(rows, field)
    if field == "draw_ids":
        return replace(rows, draw_ids=(value + 11) % 101)
    if field == "head_logprobs":  # a head takes its tail with it
        return replace(rows, head_logprobs=value * 1.5 - 0.2, tail_logmass=rows.tail_logmass - 0.4)
    return replace(rows, **{field: value * 0.5 - 0.3 if field != "entropy" else value + 2.0})


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("field", NEED_OF)
@pytest.mark.parametrize("given", EVERY_OBJECTIVE, ids=lambda given: "-".join(map(str, given.values())))
def test_an_objective_reads_what_it_declares_and_nothing_else(given: dict[str, Any], field: str) -> None:
    """An undeclared input may be anything: an imported capture holds zeros, or nothing, in its place."""
    objective = make_objective(ObjectiveSettings.model_validate(given))
    draws = objective.plan.draws if objective.plan.draws != "none" else "beyond_head"
    case = make_case(21, rule=HeadRule(12, 0.02, -1.0, draws=draws, n_draws=50 * (draws == "full")), extra=4)

    def loss(rows: TeacherRows) -> float:
        batch = TeacherBatch.build(rows, case.rule, case.stops, objective.plan, case.vocab)
        return sparse_head_loss(case.hidden, case.head, batch, objective, case.context)[0].item()

    declared = any(isinstance(need, NEED_OF[field]) for need in objective.needs)
    before, after = loss(case.rows), loss(perturbed(case.rows, field))
    assert math.isfinite(before)
    assert (after != before) == declared
    if not declared and field not in ("draw_ids", "head_logprobs"):
        assert loss(replace(case.rows, **{field: np.full_like(getattr(case.rows, field), np.nan)})) == before


def test_stops_are_needed_only_where_models_end_differently() -> None:
    objective = make_objective(ObjectiveSettings(name="jsd"))
    assert objective.needs_with([3]) == (HeadNeed(1),)
    assert objective.needs_with([3, 7]) == (HeadNeed(1), StopsNeed())
    case = make_case(22, stops=StopHandling("class", (3,), (3,)))
    rows = replace(case.rows, stop_ids=np.zeros(0, np.int32), stop_logprobs=np.zeros((37, 0), np.float32))
    batches = [
        TeacherBatch.build(some, case.rule, case.stops, objective.plan, case.vocab) for some in (case.rows, rows)
    ]
    assert torch.equal(batches[0].logprob, batches[1].logprob)


def test_equal_entropies_at_the_quantile_are_taken_by_key() -> None:
    made = np.random.default_rng(3)
    entropy = np.concatenate([np.zeros(600), np.full(300, 0.7), made.random(5000)]).astype(np.float32)
    entropy = made.permutation(entropy)
    for quantile in (0.0, 0.05, 0.15, 0.5, 0.75, 0.9):
        taken = above_quantile(entropy, quantile)
        assert taken.sum() == len(entropy) - 1 - int(quantile * (len(entropy) - 1))
        assert entropy[taken].min() >= entropy[~taken].max() - EQUAL_ENTROPY
        for seed in range(3):  # as other batches round them
            moved = entropy + np.random.default_rng(seed).uniform(-1e-6, 1e-6, len(entropy)).astype(np.float32)
            assert (above_quantile(moved, quantile) != taken).sum() <= 2  # neighbours that are no ties may swap
    half = above_quantile(np.zeros(1000, np.float32), 0.5)
    assert half.sum() == 500
    assert 200 < half[:500].sum() < 300  # no response is preferred
    distinct = made.permutation(np.arange(1, 102, dtype=np.float32))
    assert np.array_equal(above_quantile(distinct, 0.3), distinct > np.quantile(distinct, 0.3))
    assert above_quantile(np.zeros(1, np.float32), 0.5).tolist() == [False]


def test_round_start_fields() -> None:
    def fields(**given: Any) -> set[str]:
        return set(make_objective(ObjectiveSettings.model_validate(given)).per_round)

    assert fields(name="eopd") == {"q_old"}
    assert fields(name="eopd", rkl="topk") == set()
    assert fields(name="opd", advantage="current", ratio="none") == set()
    assert fields(name="reopold") == {"q_old", "student_entropy_round", "entropy_threshold"}
    assert fields(name="tropd") == {"token_key"}


def test_every_objective_of_the_family_can_be_made() -> None:
    assert set(FAMILY) == set(BUILDERS)
    for name in FAMILY:
        made = make_objective(ObjectiveSettings(name=name))
        assert made.name == name
        assert ObjectiveSettings.model_validate(made.settings.model_dump()) == made.settings


def test_own_defaults_and_refusals() -> None:
    assert {ObjectiveSettings(name=name).advantage for name in ("opd", "eopd", "lightning_opd")} == {"current"}
    assert ObjectiveSettings(name="reopold").advantage == "old"
    assert ObjectiveSettings(name="tropd").k == 64
    assert ObjectiveSettings(name="eopd").support == "renormalised"
    assert ObjectiveSettings(name="fkl").support == "bucket"
    with pytest.raises(ValidationError, match="nearest: 'eopd'"):
        ObjectiveSettings(name="eopdd")
    with pytest.raises(ValidationError, match=r"mc_opd.*refused.*teacher-scored samples"):
        ObjectiveSettings(name="mc_opd")
    with pytest.raises(ValidationError, match=r"fkl does not use tau, rkl.*train\.objective=\{name: fkl\}"):
        ObjectiveSettings(name="fkl", tau=0.5, rkl="topk")
    with pytest.raises(ValidationError, match="Extra inputs"):
        ObjectiveSettings.model_validate({"name": "eopd", "taus": 1})


def test_key_holds_only_what_the_objective_reads() -> None:
    assert "tau" not in ObjectiveSettings(name="fkl").semantic()
    assert ObjectiveSettings(name="eopd").semantic()["tau"] == 0.8
    assert ObjectiveSettings(name="sft").semantic() == {"name": "sft"}


def test_an_objective_of_ones_own(tmp_path: Path) -> None:
    given = ObjectiveSettings(name=f"{OWN}:sure_only", k=5, options={"limit": 1.0})
    objective = make_objective(given)
    case = make_case(11)
    batch = TeacherBatch.build(case.rows, case.rule, case.stops, objective.plan, case.vocab)
    loss, metrics = sparse_head_loss(case.hidden, case.head, batch, objective, case.context)
    assert loss.item() > 0
    assert 0 < metrics["gate"].item() < metrics["tokens"].item()
    changed = tmp_path / "changed.py"
    changed.write_text(OWN.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    assert given.semantic()["source"] != ObjectiveSettings(name=f"{changed}:sure_only").semantic()["source"]
    with raises(InputError, file="nowhere.py"):
        make_objective(ObjectiveSettings(name="nowhere.py:loss"))
    with raises(InputError, "'other'", setting="train.objective.name", file=OWN):
        make_objective(ObjectiveSettings(name=f"{OWN}:other"))
    with raises(InputError, "str", setting="train.objective.name", file=OWN):
        make_objective(ObjectiveSettings(name=f"{OWN}:no_objective"))


def test_missing_context_is_named() -> None:
    case = make_case(12)
    objective = make_objective(ObjectiveSettings(name="eopd"))
    batch = batch_of(case, name="eopd")
    with pytest.raises(ValueError, match=r"'eopd' needs context.q_old"):
        sparse_head_loss(case.hidden, case.head, batch, objective, replace(case.context, q_old=None))
    with pytest.raises(ValueError, match="36 hidden states for 37 teacher rows"):
        sparse_head_loss(case.hidden[1:], case.head, batch, objective, case.context)
    with pytest.raises(ValueError, match="reads draws 'full', the cache holds 'beyond_head'"):
        batch_of(case, name="rs_kd")


@pytest.mark.parametrize("name", ["rkl_topk", "vopd"])
def test_no_more_of_the_students_ids_are_used_than_are_asked_for(name: str) -> None:
    """Whatever was stored beyond them for another run."""
    exact, more = (batch_of(make_case(5, extra=stored), name=name, student_topk=2) for stored in (2, 6))
    assert exact.in_extra.sum(dim=1).max() == 2
    for field in fields(TeacherBatch):
        assert np.array_equal(getattr(exact, field.name), getattr(more, field.name)), field.name


def rows_that_say_nothing(rows: TeacherRows) -> TeacherRows:
    """Of the same tokens: empty heads, tail mass 1, no stop."""
    none, nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
    zeros, offsets = np.zeros(rows.tokens, np.float32), np.zeros(rows.tokens + 1, np.int64)
    return replace(
        rows,
        entropy=zeros,
        sampled_logprob=zeros,
        stop_ids=none,
        stop_logprobs=np.zeros((rows.tokens, 0), np.float32),
        head_offsets=offsets,
        head_ids=none,
        head_logprobs=nothing,
        tail_logmass=zeros,
        draw_offsets=offsets,
        draw_ids=none,
        extra_offsets=offsets,
        extra_ids=none,
        extra_logprobs=nothing,
    )


def test_sft_needs_no_teacher() -> None:
    case = make_case(13)
    objective = make_objective(ObjectiveSettings(name="sft"))
    rows = rows_that_say_nothing(case.rows)
    batch = TeacherBatch.build(rows, case.rule, StopHandling("class", (3,), (5,)), objective.plan, case.vocab)
    loss, _ = sparse_head_loss(case.hidden, case.head, batch, objective, case.context)
    q = case.head.logits(case.hidden).log_softmax(dim=1)
    nll = -q.gather(1, torch.from_numpy(case.rows.token_ids).long()[:, None])[:, 0]
    assert loss.item() == pytest.approx(((nll * case.context.mask).sum() / 36).item(), abs=1e-6)


def test_reopold_floors_and_hashed_uniforms() -> None:
    assert advantage_floor(ObjectiveSettings(name="reopold")) == pytest.approx(math.log(0.2) / 0.8)
    assert advantage_floor(ObjectiveSettings(name="reopold", floor_form="logit")) == pytest.approx(math.log(0.25))
    key = torch.arange(20000) * 2**32 + 5
    uniform = hashed_uniform(key, seed=1, epoch=0)
    assert ((uniform >= 0) & (uniform < 1)).all()
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert np.histogram(uniform.numpy(), 10)[0].min() > 1850
    for other in (hashed_uniform(key, 1, 1), hashed_uniform(key, 2, 0)):
        assert abs(np.corrcoef(uniform.numpy(), other.numpy())[0, 1]) < 0.03
