"""The environment that a process sets up before it imports libraries."""

from __future__ import annotations

import os

import pytest

from eopd.pipeline.worker import SPIN_COUNT, SPINS, WAIT_POLICY, set_environment


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})


@pytest.mark.parametrize(("name", "value"), [(SPIN_COUNT, str(SPINS)), ("TOKENIZERS_PARALLELISM", "false")])
def test_variables_are_set_but_never_replaced(name: str, value: str) -> None:
    set_environment()
    assert os.environ[name] == value
    os.environ[name] = "17"
    set_environment()
    assert os.environ[name] == "17"


def test_a_policy_of_the_user_s_decides_how_threads_wait() -> None:
    os.environ[WAIT_POLICY] = "PASSIVE"
    set_environment()
    assert SPIN_COUNT not in os.environ
