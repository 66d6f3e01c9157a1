"""Runs on a Ray cluster of two nodes on this machine, one of which dies in mid-stage."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.end_to_end.conftest import World, checksums, command, environment
from tests.end_to_end.workers import parent_of, worker_of

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


def test_what_a_lost_node_was_at_is_done_elsewhere(world: World, one_round: str, cluster: Any) -> None:
    doomed = cluster.add_node(num_cpus=1)
    raylet = str(doomed.all_processes["raylet"][0].process.pid)
    config = world.config("ray", rounds=1, evaluate=None, launcher={"kind": "ray", "ray": {"address": cluster.address}})
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
