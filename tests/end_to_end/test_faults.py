"""Real processes that are killed, interrupted, run beside each other, or given parts that nothing can be made of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.audit import auditing, begun
from eopd.storage.artifacts import open_artifact
from eopd.storage.claims import claim
from eopd.storage.jsonl import read_lines
from tests.end_to_end.workers import started_with
from tests.end_to_end.world import World, checksums, command, commit_times, environment, eopd

ROOT = Path(__file__).resolve().parents[2]
ALONE: dict[str, Any] = {"rounds": 1, "evaluate": None}


def start(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command(*arguments), env=environment() | variables, stderr=subprocess.PIPE, text=True)


def wait_until(there: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while not there():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.002)


@pytest.mark.slow
def test_kills_of_workers_and_of_the_runner_cost_nothing_that_was_committed(tmp_path: Path) -> None:
    """The benchmark at a small size: it compares the artifacts, and counts what was lost or done twice.

    It forks, so it has a process of its own, in which nothing was computed before.
    """
    words = ["--kills", "6", "--vllm", "0", "--seed", "1", "--keep", str(tmp_path)]
    measured = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", *words], capture_output=True, text=True, check=True, cwd=ROOT
    )
    values = json.loads(measured.stdout.splitlines()[-1])
    assert values["kills"] == 6
    assert values["kills_of_runner"] > 0
    stages = values["engines"]["transformers"]["kills_of_workers_by_stage"]
    assert set(stages) & {"rollout", "score", "train", "evaluate"}, f"no kill fell into the work: {stages}"
    assert values["lost_committed"] == values["redone_committed"] == values["runs_that_needed_a_hand"] == 0
    assert values["artifacts_identical"]
    assert values["parts_begun"] > 40  # the audit heard of the work


@pytest.mark.slow
def test_an_interruption_commits_what_is_in_hand_and_the_next_run_goes_on(world: World, one_round: str) -> None:
    config, store = world.config("interrupted", **ALONE), world.store("interrupted")
    for moment in ("rollouts/*/part-*.json", "progress/*/part-00002.json"):
        process = start("run", config)
        wait_until(lambda moment=moment: list(store.glob(moment)), process)
        before = commit_times(store)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=120)
        assert process.returncode == 130, told
        assert "run the same command to go on" in told
        assert "Traceback" not in told
        kept = {name: at for name, at in commit_times(store).items() if "progress" not in name}
        assert kept.items() >= {name: at for name, at in before.items() if "progress" not in name}.items()
        assert not list(store.glob("checkpoints/*/part-*.json"))
    assert "stopped after step" in told
    assert eopd("run", config).stderr.count("complete already") == 2
    assert checksums(store) == checksums(world.store(one_round))
    jobs = list(read_lines(world.runs("interrupted") / "jobs.jsonl"))
    legs = [job["made"] for job in jobs if job["stage"] == "rollout"]
    assert len(legs) > 1, "the time until the interruption counts too"
    assert min(legs) > 0
    assert [job["made"] for job in jobs if job["stage"] == "train"] == [0, 2]


@pytest.mark.slow
def test_an_interrupted_runner_lets_its_workers_finish(world: World, one_round: str) -> None:
    """As a terminal does it, but to the runner alone: it passes the wish on to a worker in another process."""
    config, store = world.config("passed-on", **ALONE, launcher={"kind": "local"}), world.store("passed-on")
    process = start("run", config)
    wait_until(lambda: list(store.glob("rollouts/*/part-00000.*")), process)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    kept = checksums(store)
    assert kept, "the part in hand was committed"
    assert kept.items() <= checksums(world.store(one_round)).items()
    assert not [path for path in store.glob("rollouts/*/part-*.*") if path.is_dir() and not marked(path)]


def marked(folder: Path) -> bool:
    marker = folder.parent / f"{folder.name.split('.')[0]}.json"
    return marker.exists() and json.loads(marker.read_text())["nonce"] in folder.name


@pytest.mark.slow
def test_two_runs_at_once_do_each_part_once(world: World, one_round: str, tmp_path: Path) -> None:
    config, store, log = world.config("both", **ALONE), world.store("both"), tmp_path / "audit.log"
    processes = [start("run", config, **auditing(log)) for _ in range(2)]
    told = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(told)
    made = [(one.artifact, one.part) for one in begun(log)]
    assert len(made) == len(set(made))
    assert len({one.process for one in begun(log)}) == 2 or "waiting for" in "".join(told)
    assert checksums(store) == checksums(world.store(one_round))


@pytest.mark.slow
def test_who_waits_says_for_whom(world: World, one_round: str) -> None:
    """Here for this one, which claims a part and does nothing; when it lets go, the part is done."""
    config, store = world.config("held", **ALONE), world.store("held")
    eopd("rollout", config, "--parts", "0,2")
    (identity,) = store.glob("rollouts/*/identity.json")
    artifact = open_artifact(store, "rollouts", identity.parent.name)
    with claim(artifact, 1) as ours:
        assert ours
        process = start("run", config)
        assert process.stderr is not None
        expected = f"rollouts: waiting for part 1, held by process {os.getpid()} on "
        assert any(expected in line for line in iter(process.stderr.readline, ""))
        assert not artifact.is_committed(1)
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert checksums(store) == checksums(world.store(one_round))


@pytest.mark.slow
def test_a_second_interruption_stops_at_once(world: World) -> None:
    """Neither the part in hand is awaited nor a worker left behind."""
    config, store = world.config("impatient", **ALONE, launcher={"kind": "local"}), world.store("impatient")
    process = start("run", config, EOPD_OF_TEST="impatient")
    wait_until(lambda: list(store.glob("rollouts/*/*.claim")), process)
    assert len(started_with("EOPD_OF_TEST", "impatient")) >= 2  # the command and its worker
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert not started_with("EOPD_OF_TEST", "impatient")


@pytest.mark.slow
def test_a_poisoned_part_stops_the_run_or_is_set_aside(world: World, one_round: str) -> None:
    """A rollout part whose file was cut short: scoring must refuse it, and can do all others."""
    faults = {"backoff_seconds": 0.01}
    config, store = (
        world.config("poisoned", **ALONE, launcher={"kind": "inline", "faults": faults}),
        world.store("poisoned"),
    )
    eopd("rollout", config)
    (victim,) = store.glob("rollouts/*/part-00001.*/*.parquet")
    victim.write_bytes(victim.read_bytes()[:-10])

    result = eopd("run", config, check=False)
    assert result.returncode == 1
    assert "score 0 part 1" in result.stderr
    assert "given up after 3 failures" in result.stderr
    assert "Traceback" not in result.stderr
    scored = sorted(path.name for path in store.glob("scores/*/*/part-*.json"))
    assert scored == ["part-00000.json", "part-00002.json"]

    result = eopd("run", config, "--set", "launcher.faults.poisoned=set_aside")
    (marker,) = store.glob("scores/*/*/part-00001.json")
    assert "rollouts" in json.loads(marker.read_text())["info"]["set_aside"]
    (training,) = store.glob("checkpoints/*/part-*/training.json")
    summary = json.loads(training.read_text())
    assert (summary["left_out"], summary["responses"]) == ([1], 16)
    told = eopd("store", "verify", "--store", store, check=False)
    assert "part 1 was set aside" in told.stdout
