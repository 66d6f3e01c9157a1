"""Fixtures of the end-to-end tests: a small world, and runs in it that nothing disturbed."""

from __future__ import annotations

import pytest

from tests.end_to_end.world import World, checksums, command, commit_times, environment, eopd, make_world

__all__ = ["World", "checksums", "command", "commit_times", "environment", "eopd"]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def undisturbed(world: World) -> str:
    """Name of a finished run that nothing disturbed."""
    eopd("run", world.config("undisturbed"))
    return "undisturbed"


@pytest.fixture(scope="session")
def one_round(world: World) -> str:
    """Name of a finished run of one round without evaluation: what the tests of faults are compared with."""
    eopd("run", world.config("one-round-alone", rounds=1, evaluate=None))
    return "one-round-alone"
