"""SIGKILL at any moment, the same command again: the same artifacts, and nothing committed done twice."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.end_to_end.conftest import World, checksums, commit_times, eopd
from tests.end_to_end.world import start


def seconds_of(*arguments: object) -> float:
    """How long the command takes when nothing disturbs it, on this machine as it is now."""
    began = time.monotonic()
    eopd(*arguments)
    return time.monotonic() - began


def kill_after(seconds: float, folder: Path, *arguments: object) -> bool:
    """Run the command and SIGKILL it after ``seconds``; whether it was still at work."""
    process = start(folder, *arguments)
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return True
    assert process.exitcode == 0
    return False


@pytest.mark.slow
def test_killed_stages_end_with_the_same_artifacts(world: World, undisturbed: str, tmp_path: Path) -> None:
    config, store = world.config("killed"), world.store("killed")
    timed = world.config("timed")
    chance = random.Random(0)
    kills = 0
    for stage, round_ in [("rollout", 0), ("score", 0), ("train", 0), ("evaluate", 1)]:
        usual = seconds_of(stage, timed, "--round", round_)
        for _ in range(2):
            before = commit_times(store)
            kills += kill_after(usual * chance.uniform(0.2, 0.95), tmp_path, stage, config, "--round", round_)
            after = commit_times(store)
            kept = {name: at for name, at in after.items() if name in before and "progress" not in name}
            assert kept == {name: at for name, at in before.items() if "progress" not in name}
        eopd(stage, config, "--round", round_)
    assert kills >= 4
    eopd("run", config)
    assert checksums(store) == checksums(world.store(undisturbed))


@pytest.mark.slow
def test_training_resumes_bit_for_bit(world: World, one_round: str, tmp_path: Path) -> None:
    """Killed as soon as a resumable state is there, several times over: loss curve and weights are the same."""
    config, store = world.config("resumed", rounds=1), world.store("resumed")
    eopd("rollout", config)
    eopd("score", config)
    seen = set()
    for _ in range(3):
        process = start(tmp_path, "train", config)
        while process.is_alive() and not new_states(store, seen):
            time.sleep(0.002)
        process.kill()
        process.join()
        seen |= new_states(store, seen)
    assert len(seen) >= 3
    eopd("train", config)
    ours, theirs = checksums(store), checksums(world.store(one_round))
    trained = [name for name in ours if name.startswith("checkpoints")]
    assert len(trained) == 2
    assert {name: ours[name] for name in trained} == {name: theirs[name] for name in trained}


def new_states(store: Path, seen: set[str]) -> set[str]:
    return {path.name for path in store.glob("progress/*/part-*.json")} - seen
