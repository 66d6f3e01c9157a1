"""Keys and losses are those that were committed. `tests/golden/make.py` says when they may change."""

from __future__ import annotations

import pytest

from eopd.stages.train.objectives.settings import FAMILY
from tests.golden.keys import golden_keys
from tests.golden.losses import golden_losses
from tests.golden.make import read


def test_keys_are_the_golden_ones() -> None:
    assert golden_keys() == read("keys")


def test_losses_are_the_golden_ones() -> None:
    losses, golden = golden_losses(), read("losses")
    assert losses.keys() == golden.keys()
    assert {name.split()[0] for name in losses} == set(FAMILY)
    for name, values in golden.items():
        # float32 rows decode alike to a few units in the last place; everything after is float64
        assert losses[name] == pytest.approx(values, rel=1e-6, abs=1e-9), name
