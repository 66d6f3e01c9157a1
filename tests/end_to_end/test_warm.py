"""Warm workers: one process for many tasks, replaced when it dies or fails, and the same artifacts as cold ones."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from eopd.pipeline.launchers.processes import Process
from eopd.pipeline.launchers.warm import WarmWorkers
from tests.end_to_end.world import World, checksums, environment, eopd


@pytest.mark.slow
def test_two_warm_workers_make_what_a_process_a_stage_makes(world: World, undisturbed: str) -> None:
    """``undisturbed`` is what each stage makes alone (test_run); here two processes do everything in turn."""
    config = world.config("warm", launcher={"kind": "local", "workers": 2, "gpus": []})
    told = eopd("run", config).stderr
    assert checksums(world.store("warm")) == checksums(world.store(undisturbed))
    assert "opened anew" not in told


def test_a_worker_does_many_tasks_and_is_replaced_when_it_dies_or_fails(
    world: World, undisturbed: str, tmp_path: Path
) -> None:
    config = world.config("one-by-one")
    log = tmp_path / "worker.log"

    def spawn(stage: str, round_: int, *parts: int) -> Process:
        chosen = ["--parts", ",".join(map(str, parts))] if parts else []
        command = ["-m", "eopd.pipeline.cli", stage, str(config), "--round", str(round_), *chosen]
        with log.open("ab") as output:
            return workers.spawn(command, environment(), output)

    with WarmWorkers() as workers:
        first = spawn("rollout", 0, 0, 1)
        assert first.poll() is None
        beside = spawn("evaluate", 0, 0)
        assert beside.pid != first.pid  # the first was busy
        assert (first.wait(), beside.wait()) == (0, 0)
        again = spawn("rollout", 0, 2)
        assert again.pid == first.pid
        assert again.wait() == 0
        missing = spawn("score", 1)  # there are no rollouts of round 1
        assert missing.wait() == 1
        killed = spawn("train", 0)
        os.kill(killed.pid, signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
        after = spawn("score", 0)
        assert after.pid not in (missing.pid, killed.pid)
        assert after.wait() == 0
        last = after.pid
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)
    made = checksums(world.store("one-by-one"))
    assert len(made) == 7
    assert made.items() <= checksums(world.store(undisturbed)).items()


FORKS = """
import os, time
if not os.fork():
    os.setsid()
    open(os.environ["CHILD"] + ".new", "w").write(str(os.getpid()))
    os.rename(os.environ["CHILD"] + ".new", os.environ["CHILD"])
    time.sleep(60)
    os._exit(0)
"""


def test_a_killed_worker_ends_its_task_though_a_child_of_it_lives_on(tmp_path: Path) -> None:
    """A forked process, of a session of its own, holds the pipe of answers open, so that its end never comes."""
    (tmp_path / "sitecustomize.py").write_text(FORKS)
    child = tmp_path / "child"
    own = {**environment(), "PYTHONPATH": str(tmp_path), "CHILD": str(child)}
    with WarmWorkers() as workers, (tmp_path / "log").open("ab") as output:
        command = ["-m", "eopd.pipeline.cli", "rollout", str(tmp_path / "none.yaml"), "--round", "0"]
        task = workers.spawn(command, own, output)
        until = time.monotonic() + 30
        while not child.exists() and time.monotonic() < until:
            time.sleep(0.02)
        try:
            os.kill(task.pid, signal.SIGKILL)
            until = time.monotonic() + 10
            while task.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            os.kill(int(child.read_text()), 0)
            assert task.poll() == -signal.SIGKILL
        finally:
            os.kill(int(child.read_text()), signal.SIGKILL)
