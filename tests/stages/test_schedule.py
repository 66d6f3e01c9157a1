"""Learning rate and order of training: pure functions, so checked as such."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eopd.stages.train.settings import OptimizerSettings, batch_of_step, learning_rate, steps_per_round


def test_warm_up_then_cosine_to_the_end() -> None:
    settings = OptimizerSettings(lr=1.0, schedule="cosine", warmup_steps=4)
    assert [learning_rate(settings, step, 20) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(settings, 4, 20) == 1.0
    assert learning_rate(settings, 12, 20) == pytest.approx(0.5)
    assert learning_rate(settings, 20, 20) == pytest.approx(0.0)
    assert learning_rate(settings, 30, 20) == pytest.approx(0.0)


def test_linear_and_constant() -> None:
    linear = OptimizerSettings(lr=2.0, schedule="linear", final=0.1)
    assert learning_rate(linear, 5, 10) == pytest.approx(2.0 * 0.55)
    assert learning_rate(linear, 10, 10) == pytest.approx(0.2)
    assert learning_rate(OptimizerSettings(lr=2.0, schedule="constant"), 999, 10) == 2.0


@given(responses=st.integers(1, 200), batch=st.integers(1, 64), seed=st.integers(0, 2**31), round_=st.integers(0, 9))
def test_an_epoch_takes_every_response_once(responses: int, batch: int, seed: int, round_: int) -> None:
    steps = steps_per_round(responses, batch, epochs=2)
    assert steps == 2 * math.ceil(responses / batch)
    for epoch in range(2):
        taken = []
        for step in range(epoch * steps // 2, (epoch + 1) * steps // 2):
            result, numbers = batch_of_step(responses, batch, step, seed=seed, round_=round_)
            assert result == epoch
            assert len(numbers) <= batch
            taken += numbers
        assert sorted(taken) == list(range(responses))


def test_epochs_and_rounds_differ_and_repeat() -> None:
    def order(step: int, round_: int) -> list[int]:
        return batch_of_step(100, 100, step, seed=1, round_=round_)[1]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
