"""`eopd store gc --runs`: what the runs of a store refer to, wherever the command is given."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from eopd.pipeline.config import parse_settings
from eopd.pipeline.neighbours import register, sharing_checkpoints
from eopd.pipeline.planning import plan_run
from eopd.pipeline.roots import roots
from eopd.pipeline.runner import Runner
from eopd.pipeline.store_cli import app
from eopd.stages.job import NullProgress
from eopd.storage import paths
from eopd.storage.artifacts import Artifact
from tests.strangers import unprivileged


def start(name: str, *, known: bool = True, **changes: Any) -> Runner:
    """A run as it is when its first part is committed."""
    model = {"path": "model"}
    raw = {"name": name, "student": model, "teacher": model, "prompts": {"path": "prompts.jsonl"}, **changes}
    settings = parse_settings(raw, "test")
    runner = Runner(settings, *plan_run(settings), NullProgress())
    runner.paths.folder.mkdir(parents=True)
    runner.paths.config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    if known:
        register(runner)
    commit(runner.artifact(runner.plan.job("rollout", 0).output))
    return runner


def forget_where_it_was_started(home: Path) -> None:
    """As notes were before they said that."""
    for note in (home / "store" / paths.RUNS).iterdir():
        note.write_text(note.read_text().splitlines()[0] + "\n")


def commit(artifact: Artifact, part: int = 0) -> Artifact:
    with artifact.write_part(part) as folder:
        (folder / "data").write_text("x")
    return artifact


def gc(home: Path, *arguments: object) -> str:
    """A day later."""
    for path in (home / "store").rglob("*"):
        os.utime(path, (0, 0))
    result = CliRunner().invoke(app, ["gc", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_the_states_of_a_training_that_was_interrupted_stay(home: Path) -> None:
    runner = start("one")
    states = commit(runner.states(runner.plan.job("train", 0)), 20)
    assert gc(home, "--runs", "runs", "--yes") == "freed 0 B\n"
    assert states.committed() == {20}
    checkpoint = runner.artifact(runner.plan.job("train", 0).output)
    for part in range(checkpoint.parts):
        commit(checkpoint, part)
    gc(home, "--runs", "runs", "--yes")
    assert states.committed() == set(), "killed between the checkpoint and the end of its states"
    assert checkpoint.is_complete()


def test_from_another_folder_the_same_is_kept(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolved config says `store: store`; what it is relative to is where the run was started."""
    kept = start("one", known=False)
    gone = start("two", known=False, seed=1)
    gone.paths.config.unlink()
    monkeypatch.chdir(tmp_path)
    gc(home, "--store", home / "store", "--runs", home / "runs", "--yes")
    left = [path.name for path in (home / "store" / "rollouts").iterdir()]
    assert left == [kept.plan.job("rollout", 0).output.key]


def test_runs_that_the_store_knows_of_are_honoured_wherever_they_are(home: Path) -> None:
    ours, theirs = start("one"), start("two", runs=str(home / "elsewhere"), seed=1)
    text = gc(home, "--runs", "runs", "--yes")
    assert f"kept as well: what {theirs.paths.config} refers to" in text
    for runner in (ours, theirs):
        assert runner.artifact(runner.plan.job("rollout", 0).output).committed() == {0}


@pytest.mark.parametrize("since", ["the note says where", "it does not"])
def test_runs_behind_a_link_are_kept(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, since: str) -> None:
    """`runs` leads to a large disk: what the config's other folders are relative to is not there."""
    disk = tmp_path / "disk" / "all-runs"
    disk.mkdir(parents=True)
    (home / "runs").symlink_to(disk)
    runner = start("one")
    if since == "it does not":
        forget_where_it_was_started(home)
    assert gc(home, "--runs", "runs", "--yes") == "freed 0 B\n"
    monkeypatch.chdir(tmp_path)
    assert gc(home, "--store", home / "store", "--runs", home / "runs", "--yes") == "freed 0 B\n"
    monkeypatch.chdir(home)
    assert runner.artifact(runner.plan.job("rollout", 0).output).committed() == {0}


def test_a_run_is_planned_where_it_was_started_last(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = start("one", runs=str(tmp_path / "runs"))
    shutil.copytree(home, tmp_path / "moved", symlinks=True)
    monkeypatch.chdir(tmp_path / "moved")
    register(runner)
    shutil.rmtree(home)
    monkeypatch.chdir(tmp_path)
    assert gc(tmp_path / "moved", "--store", "moved/store", "--runs", "runs", "--yes") == "freed 0 B\n"


def test_a_run_that_was_started_nobody_knows_where_is_not_to_be_removed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start("one", runs=str(tmp_path / "runs"), store=str(home / "store"))
    forget_where_it_was_started(home)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="in the folder that the run was started in") as refusal:
        gc(home, "--store", home / "store", "--runs", "runs")
    assert "remove" not in str(refusal.value)


def test_runs_in_a_closed_home_are_not_passed_over(
    home: Path, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    shutil.copytree(home, open_folder / "home")
    monkeypatch.chdir(open_folder / "home")
    theirs, ours = start("two", runs=str(open_folder / "theirs" / "runs"), seed=1), start("one")
    (open_folder / "theirs").chmod(0o700)
    with unprivileged():
        with pytest.raises(
            ValueError, match=r"theirs/runs/two/config.yaml refers to cannot be told: .*Permission denied"
        ):
            roots(Path("runs"), Path("store"))
        ((config, why),) = sharing_checkpoints(ours)
    assert config == theirs.paths.config
    assert "Permission denied" in str(why)


def test_a_neighbour_is_planned_where_it_was_started(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = start("two", store=str(home / "store"))
    shutil.copytree(home, tmp_path / "ours", ignore=shutil.ignore_patterns("store", "runs"))
    with (tmp_path / "ours" / "prompts.jsonl").open("a") as prompts:
        prompts.write('{"prompt": "of ours alone"}\n')
    monkeypatch.chdir(tmp_path / "ours")
    ours = start("one", store=str(home / "store"))
    ((config, other),) = sharing_checkpoints(ours)
    assert config.samefile(home / "runs" / "two" / "config.yaml")
    assert not isinstance(other, str)
    job = other.plan.job("train", 0)
    assert job.output.key == theirs.plan.job("train", 0).output.key != ours.plan.job("train", 0).output.key
    assert other.artifact(job.output).folder.is_relative_to(home / "store")
    assert Path.cwd() == tmp_path / "ours"


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("prompts.jsonl", r"what .*runs/one/config.yaml refers to cannot be told: prompts: .*remove .*runs/one"),
        ("runs/one/config.yaml", "no run below runs uses"),
    ],
)
def test_what_cannot_be_told_is_not_removed(home: Path, broken: str, words: str) -> None:
    runner = start("one")
    (home / broken).unlink()
    with pytest.raises(ValueError, match=words):
        gc(home, "--runs", "runs", "--yes")
    assert runner.artifact(runner.plan.job("rollout", 0).output).committed() == {0}


def test_runs_of_other_inputs_are_none_of_this_store(home: Path) -> None:
    runner = start("one")
    (home / "prompts.jsonl").write_text(json.dumps({"prompt": "2 + 2"}) + "\n")
    with pytest.raises(ValueError, match="were its models or prompts changed"):
        gc(home, "--runs", "runs", "--yes")
    assert runner.artifact(runner.plan.job("rollout", 0).output).committed() == {0}
