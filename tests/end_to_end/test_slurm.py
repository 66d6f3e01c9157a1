"""Runs through a real Slurm: a controller and two nodes on this machine, from Debian's packages."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import World, checksums, command, environment, eopd
from tests.end_to_end.workers import variables, worker_of

CLUSTER = Path(__file__).resolve().parent.parent.parent / "scripts" / "slurm-on-this-machine.sh"
SLURM = {"kind": "slurm", "slurm": {"parts_per_task": 2, "poll_seconds": 0.5}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """SLURM_CONF names a running cluster of four CPUs."""
    if os.getuid() != 0 or not all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))):
        pytest.skip("needs root and Debian's packages slurm-wlm and munge")
    started = subprocess.run(
        [CLUSTER, "start"], env={**os.environ, "SLURM_CPUS": "2"}, stdout=subprocess.PIPE, text=True, check=True
    )
    folder = started.stdout.strip()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        yield
    subprocess.run([CLUSTER, "stop", folder], check=True)
    assert not Path(folder).exists()


def test_a_run_through_interruptions_of_every_kind(world: World, undisturbed: str, cluster: None) -> None:
    """Cancelled task, killed worker, time limit, whoever follows gone: the artifacts are those of a quiet local run."""
    config = world.config("slurm", launcher=SLURM)
    resolved = world.runs("slurm") / "config.yaml"
    no_evaluation = ("--set", "evaluate=null")
    handed_over = eopd("run", config, *no_evaluation, "--set", "launcher.slurm.wait=false")
    assert "submitted 6 arrays" in handed_over.stderr

    follower = follow(config, *no_evaluation)
    assert follower.stderr is not None
    assert "of an earlier submission are in the queue" in follower.stderr.readline()
    task = variables(worker_of(resolved, follower, "rollout"))
    follower.send_signal(signal.SIGINT)
    assert "scancel" in follower.communicate()[1]
    assert follower.returncode == 130

    follower = follow(config, *no_evaluation)
    slurm("scancel", "--signal=KILL", f"{task['SLURM_ARRAY_JOB_ID']}_{task['SLURM_ARRAY_TASK_ID']}")
    os.kill(worker_of(resolved, follower, "score"), signal.SIGKILL)
    slurm("scancel", "--batch", "--signal=USR1", variables(worker_of(resolved, follower, "train"))["SLURM_JOB_ID"])
    said = follower.communicate()[1]
    assert follower.returncode == 0, said
    theirs = checksums(world.store(undisturbed))
    assert checksums(world.store("slurm")) == {
        name: checksum for name, checksum in theirs.items() if not name.startswith("evaluation")
    }
    assert "train 1: done" in said
    assert "ended with code 137: back into the queue" in logs(world, "score-0")
    assert "the time limit is near: back into the queue" in logs(world, "train-0")
    assert "CANCELLED" in logs(world, "rollout-0")


def test_a_part_that_fails_for_good_is_named_and_set_aside(world: World, cluster: None) -> None:
    """A rollout part whose file was cut short: its scores end up alone in a task, and are given up."""
    faults = {"attempts": 1, "poisoned": "set_aside"}
    slurm = {**SLURM, "slurm": {"parts_per_task": 3, "poll_seconds": 0.5}, "faults": faults}
    config = world.config("unable", rounds=1, evaluate=None, launcher=slurm)
    eopd("rollout", config)
    (victim,) = world.store("unable").glob("rollouts/*/part-00001.*/*.parquet")
    victim.write_bytes(victim.read_bytes()[:-10])
    said = eopd("run", config).stderr
    assert "slurm: score 0, parts 0, 1, 2: task" in said
    assert "slurm: score 0, part 1: task" in said
    assert "score-0.slurm-" in said
    assert "score 0: part 1 set aside" in said
    assert "train 0: done" in said
    (marker,) = world.store("unable").glob("scores/*/*/part-00001.json")
    assert "FAILED" in json.loads(marker.read_text())["info"]["set_aside"]


def follow(config: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("run", config, *arguments), env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def slurm(*arguments: str) -> None:
    subprocess.run(arguments, check=True)


def logs(world: World, array: str) -> str:
    return "".join(path.read_text() for path in world.runs("slurm").glob(f"logs/{array}.slurm-*.log"))
