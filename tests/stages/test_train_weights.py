"""Weights of the loss by the position in the response."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from eopd.stages.models.lm_head import lm_head_of
from eopd.stages.models.loading import load_model
from eopd.stages.models.packing import final_hidden, pack
from eopd.stages.score.run import run as score
from eopd.stages.train.loop import position_weights
from eopd.stages.train.responses import load_responses
from eopd.stages.train.run import run
from eopd.stages.train.settings import TrainSettings, WeightSettings, batch_of_step
from eopd.storage.paths import OPTIMIZER, WEIGHTS
from eopd.storage.teacher_cache import JointCache
from tests.pipeline.plan_case import make_settings, plan_of
from tests.stages.score_case import random_responses, rollouts, score_job
from tests.stages.train_case import KillAfter, Killed, make_world, part_bytes, read_rows, train_job

LINEAR = {"kind": "linear", "start": 1.0, "end": 2.0}
HEAD = {"kind": "head", "fraction": 0.3}
STILL = {"lr": 1e-12}  # weights stay: every step is taken at the same point


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (LINEAR, [1.0, 1.25, 1.5, 1.75, 2.0, 1.0, 1.0, 2.0]),
        ({"kind": "linear", "start": 2.0, "end": 0.0}, [2.0, 1.5, 1.0, 0.5, 0.0, 2.0, 2.0, 0.0]),
        (HEAD, [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]),
        ({"kind": "head", "fraction": 0.4}, [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]),
    ],
)
def test_weights_of_responses_with_five_one_and_two_tokens(settings: dict[str, Any], expected: list[float]) -> None:
    weights = position_weights(WeightSettings.model_validate(settings), np.asarray([0, 5, 6, 8]))
    assert weights.tolist() == expected


def test_a_share_that_is_a_whole_number_of_tokens_is_not_rounded_up() -> None:
    for percent in range(1, 100):
        weights = position_weights(WeightSettings(kind="head", fraction=percent / 100), np.asarray([0, 100]))
        assert weights.sum() == percent


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"kind": "linear", "start": 1.0}, "needs end"),
        ({"kind": "linear"}, "needs start and end"),
        ({"kind": "head"}, "needs fraction"),
        ({**HEAD, "start": 1.0}, "does not use start"),
        ({**LINEAR, "fraction": 0.5}, "does not use fraction"),
        ({"kind": "linear", "start": 2.0, "end": 2.0}, "start and end are both 2"),
        ({"kind": "head", "fraction": 1.0}, "fraction"),
        ({"kind": "linear", "start": -1.0, "end": 1.0}, "start"),
        ({"start": 1.0, "end": 2.0}, "kind"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        TrainSettings.model_validate({"weights": settings})


def test_only_weights_that_are_set_enter_the_key() -> None:
    assert "weights" not in TrainSettings().semantic()
    assert TrainSettings.model_validate({"weights": HEAD}).semantic()["weights"] == HEAD
    assert TrainSettings.model_validate({"weights": LINEAR}).semantic()["weights"] == LINEAR
    plain, weighed = plan_of(), plan_of(make_settings(train={"weights": LINEAR}))
    for stage in ("rollout", "score"):
        assert plain.job(stage, 0).key == weighed.job(stage, 0).key
    assert plain.job("train", 0).key != weighed.job("train", 0).key


@pytest.mark.parametrize("settings", [LINEAR, HEAD])
def test_loss_and_gradient_are_those_of_a_dense_forward_pass(world: Path, settings: dict[str, Any]) -> None:
    job = train_job(world, f"dense-{settings['kind']}", objective={"name": "sft"}, optimizer=STILL, weights=settings)
    run(job)
    responses = load_responses(job.rollouts, JointCache(job.scores))
    weights = position_weights(job.settings.weights, responses.offsets)
    chosen = batch_of_step(len(responses), 4, 0, seed=job.seed, round_=0)[1]
    model, total = load_model(job.student), torch.zeros(())
    for number in chosen:
        (packed,) = pack([responses.sequences[number]], 64)
        q = lm_head_of(model).logits(final_hidden(model, packed)).log_softmax(dim=1)
        own = torch.from_numpy(weights[responses.rows_of([number])])
        total = total - (own * q.gather(1, packed.target_ids[:, None])[:, 0]).sum()
    rows = responses.rows_of(chosen)
    loss = total / len(rows)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    first = read_rows(job)[0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert first["weight"] == pytest.approx(weights[rows].mean(), rel=1e-6)


@pytest.mark.parametrize("objective", ["eopd", "fkl"])
def test_packing_does_not_move_a_weight(world: Path, objective: str) -> None:
    shared = {"objective": {"name": objective}, "optimizer": STILL, "weights": LINEAR}
    one = train_job(world, f"one-{objective}", **shared)
    many = train_job(world, f"many-{objective}", **shared, micro_batch_tokens=16, row_tokens=16)
    for job in (one, many):
        run(job)
    for whole, split in zip(read_rows(one), read_rows(many), strict=True):
        for figure in ("loss", "weight", "grad_norm"):
            assert split[figure] == pytest.approx(whole[figure], rel=1e-5)


def test_both_weights_multiply_and_survive_a_resume(world: Path) -> None:
    responses = random_responses(8, seed=3, most=12)
    for response in responses:
        response["logprobs"] = [-5.0] * len(response["response_token_ids"])
    source = rollouts(world / "store", [responses], name="aged")
    scored = score_job(world / "store", world / "teacher", source, name="aged")
    score(scored)
    aged = {"rollouts": source, "scores": (scored.output,), "age": 1, "staleness": {"half_life_rounds": 1.0}}
    whole, killed = (train_job(world, name, weights=LINEAR, **aged) for name in ("whole", "killed"))
    run(whole)
    with pytest.raises(Killed):
        run(replace(killed, progress=KillAfter(1)))
    run(killed)
    for part in (WEIGHTS, OPTIMIZER):
        assert part_bytes(killed.output, part) == part_bytes(whole.output, part)
    lengths = [len(response["response_token_ids"]) for response in responses]
    first = batch_of_step(8, 4, 0, seed=whole.seed, round_=0)[1]
    tokens = sum(lengths[number] for number in first)
    expected = sum(0.5 * (1.5 * lengths[number] if lengths[number] > 1 else 1.0) for number in first) / tokens
    assert read_rows(whole)[0]["weight"] == pytest.approx(expected)


def test_data_is_weighed_as_well(world: Path) -> None:
    """No round-start pass is made of responses that the student did not write."""
    settings = {"objective": {"name": "sft"}, "optimizer": STILL, "source": "data"}
    job = train_job(world, "data", weights=HEAD, **settings)
    run(job)
    assert 0.3 <= read_rows(job)[0]["weight"] < 0.5
