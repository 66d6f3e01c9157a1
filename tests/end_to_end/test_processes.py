"""Two processes train as one does: DDP and FSDP2 over gloo on the CPU. Processes end with those that started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eopd.storage.artifacts import open_artifact
from eopd.storage.claims import holder
from tests.end_to_end.conftest import World, command, environment, eopd
from tests.end_to_end.workers import is_alive, parent_of

PATIENCE_SECONDS = 120
"""A process that does not end at all fails the test; how long one takes is not measured."""


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_give_the_single_process_loss_curve(world: World, undisturbed: str, sharding: str) -> None:
    name = f"two-{sharding}"
    config = world.config(name, rounds=1, train={"processes": 2, "sharding": sharding, "epochs": 3})
    single = world.config("single", rounds=1, train={"epochs": 3})
    curves = []
    for run, path in (("single", single), (name, config)):
        eopd("run", path)
        rows = [json.loads(line) for line in (world.runs(run) / "metrics.jsonl").read_text().splitlines()]
        jobs = [json.loads(line) for line in (world.runs(run) / "jobs.jsonl").read_text().splitlines()]
        assert [job["stage"] for job in jobs].count("train") == 1  # noted once, whoever trained it together
        curves.append([(row["loss"], row["grad_norm"], row["tokens"]) for row in rows])
    assert len(curves[0]) == len(curves[1]) == 12
    for ours, theirs in zip(*curves, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ranks_end_with_a_killed_agent_or_command_and_let_go_of_their_claim(
    world: World, one_round: str, tmp_path: Path
) -> None:
    """The agent puts each of them into a session of its own, which nobody else would end."""
    store = world.store("killed-agent")
    changes = {"rounds": 1, "evaluate": None, "store": [str(store), str(world.store(one_round))]}
    training = {"processes": 2, "epochs": 8, "checkpoint_every_steps": 1}
    config = world.config("killed-agent", train=training, **changes)
    variables = environment() | {"TMPDIR": str(tmp_path)}
    for victim in ("agent", "command"):
        before = last_state(store)
        with subprocess.Popen(command("train", config), env=variables, stderr=subprocess.PIPE, text=True) as process:
            wait_until(lambda process=process, before=before: last_state(store) > before or process.poll() is not None)
            (agent,) = children_of(process.pid)
            ranks = children_of(agent)
            assert len(ranks) == 2
            os.kill(agent if victim == "agent" else process.pid, signal.SIGKILL)
            told = process.communicate()[1]
        wait_until(lambda agent=agent, ranks=ranks: not any(map(is_alive, [agent, *ranks])))
        assert process.returncode == (1 if victim == "agent" else -signal.SIGKILL)
        assert victim == "command" or "SIGKILL" in told
    assert not list(tmp_path.glob("torchelastic_*"))
    (identity,) = store.glob("checkpoints/*/identity.json")
    checkpoint = open_artifact(store, "checkpoints", identity.parent.name)
    assert not checkpoint.is_complete()
    assert holder(checkpoint, 0) is None
    assert "resumed after step" in eopd("train", config).stderr
    assert checkpoint.is_complete()


def last_state(store: Path) -> int:
    return max((int(path.stem.partition("-")[2]) for path in store.glob("progress/*/part-*.json")), default=-1)


def children_of(parent: int) -> list[int]:
    collected = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if parent_of(int(folder.name)) == parent and b"eopd.pipeline.worker" in (folder / "cmdline").read_bytes():
                collected.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return collected


def wait_until(there: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not there():
        assert time.monotonic() < until
        time.sleep(0.05)


SPAWNING = """
import multiprocessing, os, time
import eopd.pipeline.{module}
def work():
    print(os.getpid(), flush=True)
    time.sleep(600)
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=work)
    child.start()
    child.join()
"""


@pytest.mark.parametrize("module", ["cli.main", "worker"])
def test_a_process_that_a_library_spawns_ends_with_us(tmp_path: Path, module: str) -> None:
    """As vLLM spawns its engine: Python imports our program in it anew."""
    script = tmp_path / "program.py"
    script.write_text(SPAWNING.format(module=module))
    program = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment())
    assert program.stdout is not None
    child = int(program.stdout.readline())
    program.kill()
    program.wait()
    try:
        wait_until(lambda: not is_alive(child))
    finally:
        program.stdout.close()
        if is_alive(child):
            os.kill(child, signal.SIGKILL)
