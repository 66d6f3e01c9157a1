"""`eopd store gc --runs`: what the runs of a store refer to, wherever the command is given."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from typer.testing import CliRunner

from eopd.pipeline.config import parse_settings
from eopd.pipeline.neighbours import register
from eopd.pipeline.planning import plan_run
from eopd.pipeline.runner import Runner
from eopd.pipeline.store_cli import app
from eopd.stages.job import NullProgress
from eopd.storage.artifacts import Artifact


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runs are started: models of one weight, and a prompt."""
    home = tmp_path / "home"
    model = home / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"vocab_size": 10, "eos_token_id": 2}))
    (model / "tokenizer.json").write_text("{}")
    save_file({"weight": np.zeros(1)}, model / "model.safetensors")
    (home / "prompts.jsonl").write_text(json.dumps({"prompt": "1 + 1"}) + "\n")
    monkeypatch.chdir(home)
    return home


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
