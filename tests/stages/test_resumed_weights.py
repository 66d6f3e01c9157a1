"""Weights of a resumable state that are not the model's: refused by name, never broadcast or left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from eopd.stages.train.parallel import load_weights
from eopd.storage.errors import InputError
from tests.raises import raises


@pytest.mark.parametrize(
    ("change", "named"),
    [({"weight": None}, "weight"), ({"bias": torch.ones(1)}, "bias"), ({"other": torch.ones(3)}, "other")],
)
def test_a_state_of_another_model_is_refused(change: dict[str, torch.Tensor | None], named: str) -> None:
    model = nn.Linear(2, 3)
    weights = {"weight": torch.ones(3, 2), "bias": torch.ones(3)} | change
    with raises(InputError, f"resumable state of {named}", file="state", remedy="delete the state"):
        load_weights(model, {name: value for name, value in weights.items() if value is not None}, Path("state"))
    assert not model.weight.eq(1).any()


def test_a_state_of_the_trained_weights_is_taken() -> None:
    model = nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    load_weights(model, {"weight": torch.ones(3, 2)}, Path("state"))
    assert model.weight.eq(1).all()
