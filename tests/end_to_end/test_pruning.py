"""Four rounds that keep only what the next one needs: killed while pruning, resumed, and asked for what is gone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eopd.pipeline.config import load_config
from eopd.pipeline.retention import prune_old
from eopd.pipeline.run import open_run
from eopd.pipeline.tasks import Task
from eopd.storage import garbage
from eopd.storage.verification import verify
from tests.end_to_end.conftest import World, checksums, environment, eopd

SMALL = {
    "rounds": 4,
    "rollout": {"prompts_per_round": 6, "samples_per_prompt": 1, "max_new_tokens": 6},
    "evaluate": {"samples": 1, "max_new_tokens": 4},
}
NEWEST = {"keep_checkpoints": 1, "keep_optimizer_states": 1}

DIES_WHILE_PRUNING = """
import os, signal, sys
import eopd.storage.garbage as pruning
from eopd.pipeline.cli.main import main
pruning.left_over = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
sys.argv = ["eopd", "run", sys.argv[1]]
main()
"""


def sums(store: Path) -> dict[str, str]:
    """Checksum of every part as it was committed, by its artifact's manifest."""
    result = {}
    for path in sorted(store.rglob("manifest.json")):
        for part, checksum in json.loads(path.read_text())["part_checksums"].items():
            result[f"{path.parent.relative_to(store)}/{part}"] = checksum
    return result


def weights(store: Path) -> int:
    return len(list(store.glob("checkpoints/*/part-00000.*/model.safetensors")))


def moments(store: Path) -> int:
    return len(list(store.glob("checkpoints/*/part-00001.*/optimizer.safetensors")))


def planned(config: Path) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = json.loads(eopd("plan", config, "--json").stdout)["jobs"]
    return jobs


def undone(config: Path) -> list[tuple[str, int]]:
    return [(job["stage"], job["round"]) for job in planned(config) if job["done"] < job["parts"]]


@pytest.mark.slow
def test_a_pruned_run_equals_an_unpruned_one(world: World) -> None:
    eopd("run", world.config("unpruned", **SMALL, train={"keep_optimizer_states": None}))
    whole, config, store = world.store("unpruned"), world.config("pruned", **SMALL, train=NEWEST), world.store("pruned")
    assert (weights(whole), moments(whole)) == (4, 4)

    killed = subprocess.run(
        [sys.executable, "-c", DIES_WHILE_PRUNING, str(config)], env=environment(), capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert 0 < len(list(store.glob("checkpoints/*/part-*.pruned"))) < 4
    assert verify(store) == []
    assert [removal.reason for removal in garbage.plan(store, None, grace=-1.0)] != []

    eopd("run", config)
    assert (weights(store), moments(store)) == (1, 1)
    assert sums(store) == sums(whole)
    assert verify(store) == []
    assert garbage.plan(store, None, grace=-1.0) == []
    rows = json.loads((world.runs("pruned") / "summary.json").read_text())["rounds"]
    assert rows == json.loads((world.runs("unpruned") / "summary.json").read_text())["rounds"]
    listed = eopd("store", "ls", "--store", store).stdout
    assert listed.count("complete, 2 pruned") == 3

    # an evaluation of the second student is asked for again: what it takes is made again, and pruned again
    assert not undone(config)
    (lost,) = [job["artifact"] for job in planned(config) if (job["stage"], job["round"]) == ("evaluate", 2)]
    before = sums(store)
    shutil.rmtree(store / lost)
    refused = eopd("evaluate", config, "--round", 2, check=False)
    assert refused.returncode == 1
    assert "parts [0] were pruned. Run `eopd train CONFIG --round 1` first" in refused.stderr
    assert undone(config) == [("train", 0), ("train", 1), ("evaluate", 2)]
    eopd("run", config)
    assert sums(store) == before
    assert (weights(store), moments(store)) == (1, 1)


@pytest.mark.slow
def test_what_another_run_keeps_stays(world: World, tmp_path: Path) -> None:
    """Two runs over one store: the one that wants all of a checkpoint has it kept while it exists."""
    store = str(tmp_path / "store")
    keeping = world.config("keeping", **SMALL | {"rounds": 2}, store=store, train={"keep_optimizer_states": None})
    eopd("run", keeping)
    settings = load_config(str(world.config("sparing", **SMALL | {"rounds": 2}, store=store, train=NEWEST)))
    sparing = open_run(settings)
    assert prune_old(sparing) == 0
    assert (weights(Path(store)), moments(Path(store))) == (2, 2)
    shutil.rmtree(world.runs("keeping"))
    assert prune_old(sparing) > 0
    assert (weights(Path(store)), moments(Path(store))) == (1, 1)


def test_a_stage_that_would_outgrow_its_store_is_refused_as_the_run_is(world: World) -> None:
    """By its own command; what is done already is said to be, and the workers of a run do not ask again."""
    config, store = world.config("outgrown", **SMALL), world.store("outgrown")
    little = ("--set", "max_store_bytes=1000")
    whole = eopd("run", config, *little, check=False)
    for stage, *options in (("rollout", "--parts", "1"), ("score",), ("train",)):
        refused = eopd(stage, config, *options, *little, check=False)
        assert (refused.returncode, refused.stderr) == (whole.returncode, whole.stderr)
    assert whole.returncode == 1
    assert "max_store_bytes is 1.0 kB, and" in whole.stderr
    assert not checksums(store)
    assert not world.runs("outgrown").exists()

    eopd("rollout", config, "--parts", "1", "--set", "max_store_bytes=1000000000")
    before = checksums(store)
    assert "complete already" in eopd("rollout", config, "--parts", "1", *little).stderr
    assert "max_store_bytes is" in eopd("rollout", config, *little, check=False).stderr
    assert checksums(store) == before
    run = open_run(load_config(str(config), little[1:]))
    task = Task(run, run.plan.job("rollout", 0), (0,)).to_json()
    worker = [sys.executable, "-m", "eopd.pipeline.worker", task]
    subprocess.run(worker, env=environment(), check=True, capture_output=True)
    assert len(checksums(store)) == 2
