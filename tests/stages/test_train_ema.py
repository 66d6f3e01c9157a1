"""The average of the weights: by its recurrence, over a resume, and over rounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from eopd.stages.job import ModelRef
from eopd.stages.train.run import run
from eopd.stages.train.settings import TrainSettings
from eopd.storage.paths import OPTIMIZER, WEIGHTS
from tests.stages.train_case import KillAfter, Killed, make_world, part_bytes, train_job

DECAY = 0.75


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, "qwen2")  # tied embeddings: one parameter under two names
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def averaged(before: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: DECAY * before[name] + (1 - DECAY) * now[name] for name in now}


def assert_close(result: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert result.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(result[name], value, atol=1e-6, rtol=1e-5), name


def test_the_average_follows_its_recurrence_over_resumes_and_rounds(world: Path) -> None:
    whole = train_job(world, "whole", ema=DECAY)
    run(whole)
    killed = train_job(world, "killed", ema=DECAY)
    states = []
    for _ in range(3):
        with pytest.raises(Killed):
            run(replace(killed, progress=KillAfter(1)))
        folder = killed.progress_states.part_folder(len(states) + 1)
        states.append({name: load_file(folder / f"{name}.safetensors") for name in ("weights", "ema")})
    run(killed)
    for part in (WEIGHTS, OPTIMIZER):
        assert part_bytes(killed.output, part) == part_bytes(whole.output, part)

    expected = {f"model.{name}": value for name, value in weights(world / "student").items()}
    for state in states:
        expected = averaged(expected, state["weights"])
        assert_close(state["ema"], expected)
    last = weights(whole.output.part_folder(WEIGHTS))
    expected = averaged({name.removeprefix("model."): value for name, value in expected.items()}, last)
    folder = whole.output.part_folder(OPTIMIZER) / "ema"
    assert_close(weights(folder), expected)
    assert any(not torch.equal(last[name], value) for name, value in weights(folder).items())
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)

    student = ModelRef(str(whole.output.part_folder(WEIGHTS)))
    for carry_over, start in ((True, expected), (False, last)):
        optimizer = {"carry_over": carry_over}
        job = train_job(world, f"next-{carry_over}", ema=DECAY, optimizer=optimizer, student=student)
        with pytest.raises(Killed):
            run(replace(job, round=1, previous=whole.output, progress=KillAfter(1)))
        part = job.progress_states.part_folder(1)
        result, now = (load_file(part / f"{name}.safetensors") for name in ("ema", "weights"))
        assert_close(result, averaged({f"model.{name}": value for name, value in start.items()}, now))


def test_an_average_is_keyed_and_its_decay_is_less_than_1() -> None:
    assert TrainSettings(ema=DECAY).semantic() == {**TrainSettings().semantic(), "ema": DECAY}
    assert TrainSettings().semantic()["ema"] is None
    with pytest.raises(ValueError, match="less than 1"):
        TrainSettings(ema=1.0)
