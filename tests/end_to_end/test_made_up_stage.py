"""A stage that another package brings is planned, run, killed, resumed, shown and collected like eopd's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from eopd.pipeline.logs import find_logs
from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.claims import holder
from eopd.storage.records import read_rollouts
from tests.end_to_end import token_counts
from tests.end_to_end.conftest import World, command, commit_times, environment
from tests.end_to_end.test_processes import wait_until

MODULE = Path(token_counts.__file__).read_text()


def install(folder: Path, module: str = MODULE) -> None:
    """Lay out what `pip install --target` leaves of a package with one stage."""
    metadata = folder / "token_counts-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: token-counts\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[eopd.stages]\ntoken_counts = token_counts:TokenCounts\n")
    (folder / "token_counts.py").write_text(module)


def eopd(*arguments: object) -> str:
    """What the command prints, in a process that sees the package."""
    result = subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout + result.stderr


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the package; while this file exists, only part 0 of its artifacts can be made."""
    install(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv(token_counts.HOLD, str(tmp_path / "hold"))
    return tmp_path / "hold"


def counts_of(runs: Path, name: str, store: Path) -> Artifact:
    """The artifact of the made-up stage that a run refers to."""
    artifacts = json.loads((runs / name / "references.json").read_text())["artifacts"]
    (key,) = (key for kind, key in artifacts if kind == "token_counts")
    return open_artifact(store, "token_counts", key)


@pytest.mark.timeout(400)
def test_a_stage_of_another_package(world: World, one_round: str, hold: Path, tmp_path: Path) -> None:
    store, runs = tmp_path / "store", tmp_path / "runs"
    changes = {"rounds": 1, "evaluate": None, "runs": str(runs), "store": [str(store), str(world.store(one_round))]}
    config = world.config("counted", **changes, launcher={"kind": "local", "workers": 2})
    assert "Count the tokens that training reads" in eopd("--help")

    planned = json.loads(eopd("plan", config, "--json"))["jobs"]
    (row,) = (row for row in planned if row["stage"] == "token_counts")
    assert (row["state"], row["parts"], row["done"]) == ("missing", 3, 0)

    hold.touch()
    with subprocess.Popen(command("run", config), env=environment(), stderr=subprocess.DEVNULL) as run:
        wait_until(lambda: list(store.glob("token_counts/*/part-00000.json")) or run.poll() is not None)
        run.kill()
    counts = counts_of(runs, "counted", store)
    wait_until(lambda: not any(holder(counts, part) for part in range(3)))  # its workers end with it
    before = commit_times(store)
    assert counts.committed() == {0}
    status = eopd("status", config, "--once").splitlines()
    assert any("token_counts" in line and "1/3 parts" in line for line in status)

    hold.unlink()
    resumed = eopd("run", config, "--set", "launcher.kind=inline")
    assert "token_counts 0: done in" in resumed
    after = commit_times(store)
    assert before.items() <= after.items()
    assert counts.is_complete()
    assert find_logs(runs / "counted" / "logs", "token_counts", 0)
    jobs = [json.loads(line) for line in (runs / "counted" / "jobs.jsonl").read_text().splitlines()]
    assert [job["made"] for job in jobs if job["stage"] == "token_counts"][-1] == 2
    rollouts = open_artifact(world.store(one_round), "rollouts", counts.identity.inputs["rollouts"])
    for part in range(3):
        ids = read_rollouts(rollouts.part_folder(part), ["response_token_ids"]).to_pydict()["response_token_ids"]
        assert json.loads((counts.part_folder(part) / "counts.json").read_text()) == [2 * len(each) for each in ids]

    other = world.config("alone", **changes, train={"epochs": 3})
    eopd("token_counts", other, "--parts", "1/2")
    alone = counts_of(runs, "alone", store)
    assert alone.committed() == {0, 2}
    listed = eopd("store", "ls", "token_counts", "--store", store).splitlines()
    assert {line.split()[0]: line.split("  ")[-1] for line in listed[:-1]} == {
        str(counts): "complete",
        str(alone): "2 of 3 parts",
    }
    assert eopd("store", "verify", "--store", store) == "0 damaged\n"

    for path in store.rglob("*"):
        os.utime(path, (0, 0))  # garbage collection keeps what was changed within the hour
    collect = ("store", "gc", "--store", store, "--runs", runs, "--yes")
    eopd(*collect)
    assert counts.is_complete()
    shutil.rmtree(runs / "counted")
    eopd(*collect)
    assert not counts.folder.exists()
    assert alone.committed() == {0, 2}


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        ("import nothing_of_this_name", "nothing_of_this_name"),
        ("TokenCounts = dict", "subclass"),
        (MODULE.replace('name = kind = command = "token_counts"', 'name = kind = command = "score"'), "another stage"),
        (MODULE.replace('"token_counts"', '"Token Counts"', 1), "name 'Token Counts'"),
    ],
)
def test_a_package_whose_stage_is_wrong_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, problem: str
) -> None:
    install(tmp_path, module)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    result = subprocess.run(command("plan", "quickstart"), env=environment(), capture_output=True, text=True)
    assert result.returncode != 0
    assert "token_counts" in result.stderr
    assert problem in result.stderr
    assert len(result.stderr.splitlines()) == 1
