"""Trackers: what is missing is named, and what is there gets every step once, over rounds and restarts."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eopd.stages.train.metrics import Recorder
from eopd.stages.train.run import run
from eopd.stages.train.settings import TrainSettings
from eopd.storage.errors import InputError
from tests.raises import raises
from tests.stages.score_case import Lines
from tests.stages.train_case import KillAfter, Killed, make_world, read_rows, train_job

# The three calls that wandb and Trackio share, written to a file: neither package is needed to test who calls what.
TRACKER = """
import json, pathlib
LOG = pathlib.Path(__file__).with_suffix(".jsonl")
def _note(**what):
    with LOG.open("a") as file:
        file.write(json.dumps(what) + "\\n")
def init(*, project, config, resume, name, id=None, dir=None):
    _note(call="init", project=project, config=config, resume=resume, name=name, id=id)
def log(figures, *, step):
    _note(call="log", figures=figures, step=step)
def finish():
    _note(call="finish")
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_named_before_training(world: Path, name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    job = train_job(world, f"missing-{name}", trackers=[name])
    with raises(InputError, f"'{name}', .*uv pip install -e", setting="train.trackers"):
        run(job)
    assert not job.progress_states.committed()


def test_unknown_trackers_are_refused_and_none_enters_a_key() -> None:
    with pytest.raises(ValueError, match="trackers"):
        TrainSettings.model_validate({"trackers": ["mlflow"]})
    assert TrainSettings(trackers=("wandb",)).semantic() == TrainSettings().semantic()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_every_step_is_recorded_once_over_rounds_and_restarts(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / f"{name}.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    first = train_job(world, f"{name}-0", trackers=[name], run_dir=tmp_path / "runs" / "mine")
    with pytest.raises(Killed):
        run(replace(first, progress=KillAfter(2)))
    run(first)
    # without carry-over the schedule begins anew, the count of steps does not
    second = replace(train_job(world, f"{name}-1", trackers=[name]), round=1, run_dir=first.run_dir)
    run(second)
    sys.modules.pop(name)

    board = EventAccumulator(str(first.run_dir / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(8))
    calls = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    starts = [call for call in calls if call["call"] == "init"]
    assert len(starts) == 3
    assert len({(call["name"], call["id"]) for call in starts}) == 1
    assert starts[0]["name"].startswith("mine")
    assert (starts[0]["project"], starts[0]["resume"]) == ("eopd", "allow")
    assert starts[0]["config"]["batch_responses"] == 4
    logs = {call["step"]: call["figures"] for call in calls if call["call"] == "log"}
    assert sorted(logs) == list(range(8))
    losses = [row["loss"] for job in (first, second) for row in read_rows(job)]
    assert [logs[step]["train/loss"] for step in range(8)] == losses
    assert [logs[step]["train/round"] for step in range(8)] == [0] * 4 + [1] * 4
    assert {"train/tokens_per_s", "train/loader_wait_fraction"} <= logs[0].keys()
    assert calls[-1]["call"] == "finish"


def test_a_tracker_that_fails_at_the_end_costs_no_training(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text(TRACKER + "    raise ConnectionError('no route to the server')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    lines = Lines()
    job = train_job(world, "unreachable", trackers=["wandb"], run_dir=tmp_path / "runs", progress=lines)
    run(job)
    assert job.output.is_complete()
    assert any("ConnectionError" in line for line in lines.lines)


def test_event_files_of_one_second_are_never_read_in_another_order(tmp_path: Path) -> None:
    """The tenth file of a process is sorted before its ninth: each has a second of its own."""
    for resumed in range(2):
        recorder = Recorder(tmp_path, 0, 0, resumed, (), {})
        recorder.close()
    seconds = [path.name.split(".")[3] for path in (tmp_path / "tensorboard").glob("events*")]
    assert len(set(seconds)) == len(seconds) == 2
