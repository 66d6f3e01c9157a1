"""Runs on a Ray cluster of two nodes on this machine, one of which dies in mid-stage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from eopd.pipeline.launchers.ray import RayPool
from eopd.pipeline.progress import LineDisplay
from eopd.pipeline.tasks import Task
from tests.end_to_end.conftest import World, checksums, command, environment, eopd
from tests.end_to_end.workers import parent_of, worker_of
from tests.pipeline.plan_case import make_run

ray = pytest.importorskip("ray", reason="needs ray (the extra of that name)")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes; this process is no part of it."""
    from ray.cluster_utils import Cluster

    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


def test_no_node_is_large_enough(world: World, cluster: Any) -> None:
    result = eopd("run", config_of(world, "large", cluster, rollout={"gpus": 2}), check=False)
    assert result.returncode == 1
    assert "rollout asks for 1 CPU, 2 GPU on a node, more than any of the Ray cluster's 1 nodes has" in result.stderr
    assert "(at most 1 CPU, 0 GPU)" in result.stderr
    assert result.stdout == ""


def test_a_log_that_finds_no_space_on_its_node_is_a_full_disk(tmp_path: Path, cluster: Any) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "nr_inodes=12", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    run = make_run(disk, launcher={"kind": "ray", "ray": {"address": cluster.address}})
    pool = RayPool(run.settings, LineDisplay())
    try:
        run.paths.logs.mkdir(parents=True)
        with suppress(OSError):
            for number in range(12):
                (disk / str(number)).touch()
        pool.start(Task(run, run.plan.job("rollout", 0), (0,)))
        ((_, outcome),) = pool.wait(60.0)
        assert outcome.kind == "full", outcome.message
        assert "No space left" in outcome.message
    finally:
        pool.close()
        subprocess.run(["umount", str(disk)], check=True)


def test_two_nodes_train_together(world: World, one_round: str, cluster: Any) -> None:
    """As one process does, but for the order of sums."""
    other = cluster.add_node(num_cpus=1)
    config = config_of(world, "together", cluster, train={"nodes": 2})
    shutil.copytree(world.store(one_round), world.store("together"), ignore=shutil.ignore_patterns("checkpoints"))
    run = subprocess.Popen(command("run", config), env=environment(), stderr=subprocess.PIPE, text=True)
    assert worker_of(world.runs("together") / "config.yaml", run, "train", variable=("WORLD_SIZE", "2"))
    said = run.communicate()[1]
    assert run.returncode == 0, said
    assert "rollout 0: complete already" in said
    assert losses(world, "together") == pytest.approx(losses(world, one_round), rel=1e-5)
    cluster.remove_node(other)


def test_what_a_lost_node_was_at_is_done_elsewhere(world: World, one_round: str, cluster: Any) -> None:
    doomed = cluster.add_node(num_cpus=1)
    raylet = str(doomed.all_processes["raylet"][0].process.pid)
    config = config_of(world, "ray", cluster)
    run = subprocess.Popen(
        command("run", config), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    worker = worker_of(world.runs("ray") / "config.yaml", run, variable=("RAY_RAYLET_PID", raylet))
    for process in (parent_of(worker), worker):
        os.kill(process, signal.SIGKILL)
    cluster.remove_node(doomed, allow_graceful=False)
    shown, said = run.communicate()
    assert run.returncode == 0, said
    assert "lost its worker" in said
    assert "train 0: done" in said
    assert "Traceback" not in said
    assert shown == ""  # Ray prints pages of a dead node's state
    assert checksums(world.store("ray")) == checksums(world.store(one_round))


def config_of(world: World, name: str, cluster: Any, **resources: object) -> Path:
    launcher = {"kind": "ray", "ray": {"address": cluster.address, **resources}}
    return world.config(name, rounds=1, evaluate=None, launcher=launcher)


def losses(world: World, name: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (world.runs(name) / "metrics.jsonl").read_text().splitlines()]
