"""Warm workers: one process for many tasks, replaced when it dies or fails, and the same artifacts as cold ones."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from eopd.pipeline.config import load_config
from eopd.pipeline.launchers.local import WarmWorker
from eopd.pipeline.run import open_run
from eopd.pipeline.tasks import Task
from tests.end_to_end.world import World, checksums, environment, eopd


@pytest.mark.slow
def test_two_warm_workers_make_what_a_process_a_stage_makes(world: World, undisturbed: str) -> None:
    """``undisturbed`` is what each stage makes alone (test_run); here two processes do everything in turn."""
    config = world.config("warm", launcher={"kind": "local", "workers": 2, "gpus": []})
    told = eopd("run", config).stderr
    assert checksums(world.store("warm")) == checksums(world.store(undisturbed))
    assert "opened anew" not in told


def test_a_worker_does_many_tasks_and_exits_after_one_that_failed(world: World, undisturbed: str) -> None:
    config = world.config("one-by-one")
    eopd("rollout", config, "--parts", "0")  # writes the resolved config that workers read
    run = open_run(load_config(str(config)))

    def do(worker: WarmWorker, stage: str, round_: int, *parts: int) -> WarmWorker:
        job = run.plan.job(stage, round_)
        task = Task(run, job, parts or tuple(range(job.output.parts)))
        return worker.give(task.to_json(), engine="")

    first, beside = (WarmWorker(environment(), "") for _ in range(2))
    try:
        do(first, "rollout", 0, 1)
        do(beside, "evaluate", 0, 0)
        assert not first.is_idle
        assert (first.wait(), beside.wait()) == (0, 0)
        assert do(first, "rollout", 0, 2).wait() == 0
        assert do(first, "score", 0).wait() == 0
        assert first.is_alive
        assert do(first, "score", 1).wait() == 1  # there are no rollouts of round 1
        assert not first.is_alive
        do(beside, "train", 0)
        os.kill(beside.process.pid, signal.SIGKILL)
        assert beside.wait() == -signal.SIGKILL
        assert not beside.is_alive
    finally:
        first.close()
        beside.close()
    made = checksums(world.store("one-by-one"))
    assert made.items() <= checksums(world.store(undisturbed)).items()
    assert {Path(name).parts[0] for name in made} >= {"rollouts", "scores", "evaluations"}


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
    worker = WarmWorker(own, "")
    try:
        worker.give("{}", engine="")
        until = time.monotonic() + 30
        while not child.exists() and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(worker.process.pid, signal.SIGKILL)
        until = time.monotonic() + 10
        while worker.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(int(child.read_text()), 0)
        assert worker.poll() in (-signal.SIGKILL, 1)
    finally:
        os.kill(int(child.read_text()), signal.SIGKILL)
        worker.close()
