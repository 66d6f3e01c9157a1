"""How far the policy has moved from the one that sampled: against a dense forward pass, and as a limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eopd.stages.models.lm_head import lm_head_of
from eopd.stages.models.loading import load_model
from eopd.stages.models.packing import Sequence, final_hidden, pack
from eopd.stages.score.run import run as score
from eopd.stages.train.failures import TrainingStopped
from eopd.stages.train.responses import load_responses
from eopd.stages.train.run import response_weights, run
from eopd.stages.train.settings import StalenessSettings, batch_of_step
from eopd.storage.paths import OPTIMIZER, WEIGHTS
from eopd.storage.teacher_cache import JointCache
from tests.raises import raises
from tests.stages.score_case import STOPS, Lines, random_responses, rollouts, score_job
from tests.stages.train_case import KillAfter, Killed, make_world, part_bytes, read_rows, train_job

LR = {"lr": 1e-2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


def logprobs(
    model: torch.nn.Module, sequences: list[Sequence], *, merged: bool = True, temperature: float = 1.0
) -> torch.Tensor:
    """Log-prob of every response token [T], float64; the stop tokens are one outcome, unless not ``merged``."""
    collected = []
    for sequence in sequences:
        (packed,) = pack([sequence], 64)
        with torch.no_grad():
            q = (lm_head_of(model).logits(final_hidden(model, packed)).double() / temperature).log_softmax(dim=1)
        if merged:
            q[:, list(STOPS)] = q[:, list(STOPS)].logsumexp(dim=1, keepdim=True)
        collected.append(q.gather(1, packed.target_ids[:, None])[:, 0])
    return torch.cat(collected)


@pytest.mark.parametrize(("objective", "temperature"), [("eopd", 0.7), ("fkl", 1.0), ("sft", 0.7)])
def test_staleness_is_that_of_a_dense_forward_pass(world: Path, objective: str, temperature: float) -> None:
    name = f"dense-{objective}"
    job = train_job(world, name, objective={"name": objective}, optimizer=LR, temperature=temperature)
    with pytest.raises(Killed):
        run(replace(job, progress=KillAfter(1)))
    state = load_file(job.progress_states.part_folder(1) / "weights.safetensors")
    run(job)
    rows = read_rows(job)
    assert abs(rows[0]["staleness_k1"]) < 1e-6
    assert 0 <= rows[0]["staleness_k3"] < 1e-9

    model = load_model(job.student)
    responses = load_responses(job.rollouts, JointCache(job.scores))
    chosen = [responses.sequences[n] for n in batch_of_step(len(responses), 4, 1, seed=job.seed, round_=0)[1]]
    before = logprobs(model, chosen, temperature=temperature)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[f"model.{name}"])
    moved = logprobs(model, chosen, temperature=temperature) - before
    assert rows[1]["staleness_k1"] == pytest.approx(-moved.mean().item(), rel=1e-3, abs=1e-5)
    assert rows[1]["staleness_k3"] == pytest.approx((moved.exp() - 1 - moved).mean().item(), rel=1e-3, abs=1e-5)
    assert rows[1]["staleness_k3"] > 1e-4


def test_the_gradient_of_a_step_is_that_of_the_mean_over_its_tokens(world: Path) -> None:
    """Its size decides when ``max_grad_norm`` clips; one micro-batch a response, so that shares have to add up."""
    job = train_job(world, "gradient", objective={"name": "sft"}, temperature=0.7, micro_batch_tokens=16)
    run(job)
    responses = load_responses(job.rollouts, JointCache(job.scores))
    chosen = [responses.sequences[n] for n in batch_of_step(len(responses), 4, 0, seed=job.seed, round_=0)[1]]
    model = load_model(job.student)
    losses = []
    for sequence in chosen:
        (packed,) = pack([sequence], 64)
        q = (lm_head_of(model).logits(final_hidden(model, packed)) / 0.7).log_softmax(dim=1)
        losses.append(-q.gather(1, packed.target_ids[:, None])[:, 0])
    loss = torch.cat(losses).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    first = read_rows(job)[0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_a_limit_stops_with_the_numbers_and_a_higher_one_goes_on(world: Path) -> None:
    old = {"name": "eopd", "advantage": "old"}  # moves further with every step here
    free = train_job(world, "free", objective=old, optimizer=LR)
    run(free)
    second, third = (row["staleness_k3"] for row in read_rows(free)[1:3])
    limit = (second + third) / 2
    assert second < third
    job = train_job(world, "limited", objective=old, optimizer=LR, max_staleness=limit)
    expected = rf"{third:.4g} nats".replace("+", r"\+")
    with raises(TrainingStopped, expected, step=2, setting="train.max_staleness") as raised:
        run(job)
    assert raised.value.folder is None
    assert not (job.run_dir / "failures").exists()
    assert sorted(job.progress_states.committed()) == [0, 2]
    run(train_job(world, "limited", objective=old, optimizer=LR, max_staleness=1e3))
    for part in (WEIGHTS, OPTIMIZER):
        assert part_bytes(job.output, part) == part_bytes(free.output, part)
    assert job.settings.semantic() == free.settings.semantic()


def test_weights_by_age_and_by_distance() -> None:
    """Three responses: one 2 nats a token away, one 0.5 away, one that the student likes better than its policy did."""
    offsets = np.asarray([0, 2, 5, 6])
    sampled = np.asarray([-1.0, -1.0, -1.0, -1.0, -1.0, -3.0], np.float32)
    student = np.asarray([-2.0, -4.0, -1.0, -2.0, -1.5, -1.0], np.float32)
    moved, counted = sampled - student, np.ones(6, bool)
    far = response_weights(StalenessSettings(max_kl=0.5), 1, moved, counted, offsets)
    assert far == pytest.approx([0.25, 0.25, 1.0, 1.0, 1.0, 1.0])
    old = response_weights(StalenessSettings(half_life_rounds=2.0), 1, moved, counted, offsets)
    assert old == pytest.approx([2**-0.5] * 6)
    both = response_weights(StalenessSettings(half_life_rounds=1.0, max_kl=1.0), 3, moved, counted, offsets)
    assert both == pytest.approx([0.0625, 0.0625, 0.125, 0.125, 0.125, 0.125])
    assert response_weights(StalenessSettings(), 3, moved, counted, offsets) == pytest.approx([1.0] * 6)
    counted[[0, 3, 5]] = False
    some = response_weights(StalenessSettings(max_kl=0.5), 1, moved, counted, offsets)
    assert some == pytest.approx([1 / 6, 1 / 6, 1.0, 1.0, 1.0, 1.0])


@pytest.fixture(scope="module")
def aged(world: Path) -> dict[str, Any]:
    """Rollouts of an older policy, which carry its log-probs, and their scores; fields of a job that trains on them."""
    rows = random_responses(8, seed=3, most=12)
    noise = np.random.default_rng(0)
    for row in rows:
        row["logprobs"] = (-5.0 + noise.standard_normal(len(row["response_token_ids"]))).tolist()
    source = rollouts(world / "store", [rows], name="aged")
    job = score_job(world / "store", world / "teacher", source, name="aged")
    score(job)
    return {"rollouts": source, "scores": (job.output,), "age": 2}


def test_old_responses_weigh_less_and_say_so(world: Path, aged: dict[str, Any]) -> None:
    objective, still = {"name": "fkl"}, {"lr": 1e-12}  # weights stay: every step is taken at the same point
    plain = train_job(world, "aged", objective=objective, optimizer=still, **aged)
    halved = train_job(
        world, "halved", objective=objective, optimizer=still, staleness={"half_life_rounds": 2.0}, **aged
    )
    for job in (plain, halved):
        run(job)
    for full, half in zip(read_rows(plain), read_rows(halved), strict=True):
        assert full["age"] == half["age"] == 2
        assert half["loss"] == pytest.approx(full["loss"] / 2, rel=1e-9)
        assert half["grad_norm"] == pytest.approx(full["grad_norm"] / 2, rel=1e-5)
        assert half["fkl"] == pytest.approx(full["fkl"], rel=1e-9)
        assert half["weight"] == 0.5
        assert "weight" not in full
    assert plain.settings.semantic()["staleness"] is None
    assert halved.settings.semantic()["staleness"]["half_life_rounds"] == 2.0
    fresh = train_job(world, "fresh", objective=objective, optimizer=still, staleness={"half_life_rounds": 2.0})
    run(fresh)
    assert not {"age", "weight"} & read_rows(fresh)[0].keys()


def test_weights_survive_a_resume(world: Path, aged: dict[str, Any]) -> None:
    settings = {"optimizer": LR, "staleness": {"half_life_rounds": 1.0, "max_kl": 0.01}}
    whole, killed = (train_job(world, name, **settings, **aged) for name in ("weighed", "weighed-killed"))
    run(whole)
    with pytest.raises(Killed):
        run(replace(killed, progress=KillAfter(1)))
    run(killed)
    for part in (WEIGHTS, OPTIMIZER):
        assert part_bytes(killed.output, part) == part_bytes(whole.output, part)
    assert 0.0 < read_rows(whole)[0]["weight"] < 0.25


@pytest.fixture(scope="module")
def stopped(world: Path) -> dict[str, Any]:
    """Rollouts that end with either stop token, and the student's log-probs as a sampler gives them: of one id each."""
    rows = random_responses(8, seed=3, most=12)
    student = load_model(train_job(world, "any").student)
    for number, row in enumerate(rows):
        row["response_token_ids"].append(STOPS[number % 2])
        sequence = Sequence(row["prompt_token_ids"], row["response_token_ids"])
        row["logprobs"] = logprobs(student, [sequence], merged=False).tolist()
    source = rollouts(world / "store", [rows], name="stopped")
    job = score_job(world / "store", world / "teacher", source, name="stopped")
    score(job)
    return {"rollouts": source, "scores": (job.output,)}


def test_a_merged_stop_is_no_step_away_from_the_policy_that_sampled(world: Path, stopped: dict[str, Any]) -> None:
    settings = {"objective": {"name": "opd"}, "staleness": {"max_kl": 1e-4}, "batch_responses": 8, "epochs": 1}
    job = train_job(world, "unmoved", age=1, **settings, **stopped)
    run(job)
    (row,) = read_rows(job)
    assert row["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert abs(row["staleness_k1"]) < 1e-5
    assert 0 <= row["staleness_k3"] < 1e-9
    assert row["weight"] == 1.0


def test_a_merged_stop_is_no_gap_between_sampler_and_trainer(world: Path, stopped: dict[str, Any]) -> None:
    job = train_job(world, "agreeing", max_logprob_gap=1e-4, progress=Lines(), **stopped)
    run(job)
    assert job.output.is_complete()
    assert not any("no log-probs of the sampler" in line for line in job.progress.lines)
    told = train_job(world, "untold", progress=Lines())
    run(told)
    assert any("no log-probs of the sampler" in line for line in told.progress.lines)
