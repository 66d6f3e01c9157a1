"""Runs whose rollouts and scores lie in stores that they only read: a team's folder, a bucket."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import s3
from tests.end_to_end.world import World, eopd


def snapshot(store: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(store)): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in store.rglob("*")}


def kinds(store: Path) -> set[str]:
    return {path.name for path in store.iterdir() if path.is_dir()}


@pytest.fixture
def team(world: World, undisturbed: str, tmp_path: Path) -> Iterator[Path]:
    """Rollouts and scores of a finished run, in a folder that nobody may write to."""
    store = tmp_path / "team"
    for kind in ("rollouts", "scores"):
        shutil.copytree(world.store(undisturbed) / kind, store / kind)
    everything = [store, *store.rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield store
    for path in everything:
        path.chmod(0o755)


def test_training_from_a_team_store(world: World, team: Path) -> None:
    before = snapshot(team)
    own = world.folder / "from_team" / "store"
    changes = {"rounds": 1, "evaluate": None, "train": {"objective": {"name": "opd"}}}
    config = world.config("from_team", store=[str(own), str(team)], **changes)
    result = eopd("run", config)
    assert "rollout 0: complete already" in result.stderr
    assert "score 0: complete already" in result.stderr
    assert "train 0: done in" in result.stderr
    assert not kinds(own) & {"rollouts", "scores", ".fetched"}
    assert snapshot(team) == before
    assert (world.runs("from_team") / "report" / "index.html").exists()

    refused = eopd("store", "gc", "--store", team, "--runs", world.runs("from_team").parent, "--yes", check=False)
    assert "only reads" in refused.stderr
    eopd("store", "gc", "--store", own, "--runs", world.runs("from_team").parent, "--yes")
    assert snapshot(team) == before


def test_a_team_store_that_is_not_there_is_named(world: World) -> None:
    config = world.config("no_team", store=[str(world.store("no_team")), "/nowhere/team"])
    result = eopd("plan", config, check=False)
    assert "there is no store at /nowhere/team" in result.stderr
    refused = eopd("plan", config, "--set", "store=s3://team/store", "--set", "read_only_stores=[]", check=False)
    assert "store: [store, s3://team/store]" in refused.stderr


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("obstore", "boto3", "moto")),
    reason="obstore, boto3 or moto[server] is not installed",
)
def test_training_from_a_bucket(world: World, undisturbed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3.server() as endpoint:
        for name, value in s3.environment(endpoint).items():
            monkeypatch.setenv(name, value)
        s3.client(endpoint).create_bucket(Bucket="team")
        scores = sorted(path.parent for path in world.store(undisturbed).glob("scores/*/*/identity.json"))
        for folder in scores:
            key = f"scores/{folder.parent.name}/{folder.name}"
            eopd("store", "copy", key, "s3://team/store", "--store", world.store(undisturbed), "--inputs")
        listed = eopd("store", "ls", "--store", "s3://team/store").stdout
        assert listed.count("complete") == len(scores) * 2 + 1
        (policy,) = (line for line in listed.splitlines() if line.startswith("checkpoints"))  # of the second round
        assert policy.endswith("complete, 1 pruned")  # its optimiser's state: as in the store it was copied from
        assert eopd("store", "verify", "--store", "s3://team/store").stdout == "0 damaged\n"
        key = f"scores/{scores[0].parent.name}"
        assert "tokens gated" in eopd("store", "stats", key, "--store", "s3://team/store").stdout

        own = world.folder / "from_bucket" / "store"
        changes = {"rounds": 1, "evaluate": None, "train": {"objective": {"name": "opd"}}}
        result = eopd("run", world.config("from_bucket", store=[str(own), "s3://team/store"], **changes))
        assert "rollout 0: complete already" in result.stderr
        assert "score 0: complete already" in result.stderr
        assert "train 0: done in" in result.stderr
        assert not kinds(own) & {"rollouts", "scores"}
        assert kinds(own / ".fetched") == {"rollouts"}
        assert (world.runs("from_bucket") / "report" / "index.html").exists()

    shown = eopd("store", "gc", "--store", own).stdout
    assert "0 removals" in shown  # what was fetched within the hour may be in use
