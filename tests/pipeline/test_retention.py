"""Which parts of checkpoints are pruned and rebuilt, what runs write down, and what gc keeps; real markers, no data."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from eopd.pipeline.checks import check_store_size
from eopd.pipeline.cli.store import app
from eopd.pipeline.config import ConfigError, parse_settings
from eopd.pipeline.errors import RunError
from eopd.pipeline.forecast import forecast
from eopd.pipeline.retention import note, note_of, notes_of_others, prune_old, references
from eopd.pipeline.run import Run, open_run
from eopd.pipeline.scheduler import OpenJob
from eopd.pipeline.worker import execute
from eopd.storage.errors import DamagedPart
from eopd.storage.garbage import prune
from eopd.storage.notes import Note, notes
from eopd.storage.paths import OPTIMIZER, WEIGHTS
from eopd.storage.stacked import StackedStores
from tests.pipeline.plan_case import commit, make_run
from tests.raises import raises
from tests.strangers import unprivileged

Named = set[tuple[int, str]]


def finished(folder: Path, until: int, train: dict[str, object] | None = None, **changes: object) -> Run:
    """Every job of the rounds before ``until`` is done."""
    kept = {"keep_checkpoints": 1, "keep_optimizer_states": 1, **(train or {})}
    run = make_run(folder, **{"rounds": 4, "train": kept, **changes})
    for job in run.plan.jobs:
        if job.round < until:
            commit(run, job)
    return run


def named(run: Run, parts: set[tuple[str, int]]) -> Named:
    rounds = {job.output.key: job.round for job in run.plan.jobs if job.is_prunable}
    return {(rounds[key], "weights" if part == WEIGHTS else "optimizer") for key, part in parts}


def remove(run: Run, stage: str, round_: int) -> None:
    artifact = run.artifact(run.plan.job(stage, round_).output)
    for part in artifact.committed():
        artifact.drop_part(part)


def test_what_the_next_round_reads_stays(tmp_path: Path) -> None:
    """Two rounds done: student 2 is the newest, nothing was made of it yet."""
    run = finished(tmp_path, 2)
    assert named(run, run.unwanted()) == {(0, "weights"), (0, "optimizer")}
    assert named(run, run.needed()) >= {(1, "weights"), (1, "optimizer")}
    remove(run, "evaluate", 1)
    assert named(run, run.unwanted()) == {(0, "optimizer")}
    remove(run, "train", 1)
    assert run.unwanted() == set()


@pytest.mark.parametrize(
    ("train", "gone"),
    [
        ({"keep_checkpoints": None, "keep_optimizer_states": None}, set()),
        ({"keep_checkpoints": None}, {(0, "optimizer"), (1, "optimizer")}),
        ({"keep_checkpoints": 2, "keep_optimizer_states": None}, {(0, "weights")}),
        ({"keep_checkpoints": 9}, {(0, "optimizer"), (1, "optimizer")}),
    ],
)
def test_settings_say_how_many_stay(tmp_path: Path, train: dict[str, object], gone: Named) -> None:
    run = finished(tmp_path, 3, train)
    assert named(run, run.unwanted()) == gone


def test_by_default_only_optimiser_states_go(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=3)
    for job in run.plan.jobs:
        commit(run, job)
    assert named(run, run.unwanted()) == {(0, "optimizer"), (1, "optimizer")}


def test_a_policy_that_samples_late_stays(tmp_path: Path) -> None:
    """With refresh 2, rounds 2 and 3 sample from student 2, the checkpoint of round 1."""
    run = finished(tmp_path, 3, refresh=2)
    assert named(run, run.unwanted()) == {(0, "weights"), (0, "optimizer"), (1, "optimizer")}


def test_moments_that_nobody_reads_go(tmp_path: Path) -> None:
    run = finished(tmp_path, 2, {"optimizer": {"carry_over": False}})
    assert (1, "weights") in named(run, run.needed())
    assert "optimizer" not in {part for _, part in named(run, run.needed())}


def test_only_what_is_read_is_called_back(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    run = finished(tmp_path, 9)
    for round_ in range(3):
        artifact = run.artifact(run.plan.job("train", round_).output)
        for part in (WEIGHTS, OPTIMIZER):
            prune(artifact, part, lambda name: True)
    assert all(run.is_done(job) for job in run.plan.jobs)
    assert forecast([run]).totals["all"].missing == 0
    assert run.rebuilds == set()

    remove(run, "evaluate", 2)
    again = reopened(run)
    assert named(again, again.rebuilds) == {(0, "weights"), (0, "optimizer"), (1, "weights")}
    undone = [job.name for job in again.plan.jobs if not again.is_done(job)]
    assert undone == ["train 0", "train 1", "evaluate 2"]
    first, second = (OpenJob(again, again.plan.job("train", round_)) for round_ in range(2))
    assert again.missing_parts(first.job) == {WEIGHTS, OPTIMIZER}
    assert [batch.parts for batch in first.batches()] == [(WEIGHTS, OPTIMIZER)]
    assert again.missing_parts(second.job) == {WEIGHTS, OPTIMIZER}  # training is done as a whole
    assert second.batches() == []  # its inputs have to be made again first
    assert forecast([again]).totals["train"].missing == 3
    with raises(RunError, r"\[0\] were pruned", remedy="eopd train CONFIG --round 1"):
        execute(again, again.plan.job("evaluate", 2))


def reopened(run: Run) -> Run:
    """The same run, started again."""
    return Run(run.settings, run.facts, run.plan, run.stores, run.progress)


def test_what_was_fetched_from_a_bucket_is_not_pruned(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    from eopd.storage.remote import open_bucket

    team = finished(tmp_path / "team", 2)
    run = make_run(tmp_path, rounds=4, train={"keep_checkpoints": 1, "keep_optimizer_states": 1})
    bucket = open_bucket(f"file://{team.store}")
    vars(run)["stores"] = StackedStores([run.store, bucket])
    fetched = [run.artifact(run.plan.job("train", 0).output).part_folder(part) for part in (WEIGHTS, OPTIMIZER)]
    assert all(folder.is_relative_to(run.store) for folder in fetched)
    assert named(run, run.unwanted()) == {(0, "weights"), (0, "optimizer")}
    assert prune_old(run) == 0
    assert all((folder / "data").exists() for folder in fetched)


def test_a_run_that_outgrows_its_store_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    keep_all = {"keep_optimizer_states": None}
    free = make_run(tmp_path, rounds=20, train=keep_all)
    check_store_size(forecast([free]))
    peak = forecast([free]).peak_bytes(bounds=True)
    check_store_size(forecast([make_run(tmp_path, rounds=20, train=keep_all, max_store_bytes=peak)]))
    small = make_run(tmp_path, rounds=20, train=keep_all, max_store_bytes=peak - 1)
    with raises(ConfigError, setting="max_store_bytes", remedy="keep_checkpoints=1"):
        check_store_size(forecast([small]))
    spared = forecast([make_run(tmp_path, rounds=20, train={"keep_checkpoints": 1})]).peak_bytes(bounds=True)
    assert spared < peak
    check_store_size(forecast([make_run(tmp_path, rounds=20, train={"keep_checkpoints": 1}, max_store_bytes=spared)]))

    other = make_run(tmp_path, rounds=1, seed=5)
    commit(other, other.plan.jobs[0])
    with raises(ConfigError, r"3\.0 kB of other artifacts", setting="max_store_bytes"):
        check_store_size(forecast([make_run(tmp_path, rounds=20, train=keep_all, max_store_bytes=peak)]))


def test_runs_of_a_sweep_share_the_limit(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    one, other = ({"name": name, "train": {"epochs": epochs}} for name, epochs in (("a", 1), ("b", 2)))
    peak = forecast([make_run(tmp_path, **one), make_run(tmp_path, **other)]).peak_bytes(bounds=True)
    both = [make_run(tmp_path, **changes, max_store_bytes=peak - 1) for changes in (one, other)]
    for alone in both:
        check_store_size(forecast([alone]))
    with raises(ConfigError, "2 runs", setting="max_store_bytes", remedy="Fewer rounds or runs"):
        check_store_size(forecast(both))
    check_store_size(forecast([make_run(tmp_path, **changes, max_store_bytes=peak) for changes in (one, other)]))


def test_states_of_a_training_that_was_stopped_are_not_counted_twice(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    run = make_run(tmp_path)
    peak = forecast([run]).peak_bytes(bounds=True)
    with run.scratch(run.plan.job("train", 0)).write_part(2) as folder:
        (folder / "state").write_bytes(bytes(3000))
    check_store_size(forecast([make_run(tmp_path, max_store_bytes=peak)]))


# -- notes and gc ----------------------------------------------------------------------------------------------------


def start(name: str, **changes: Any) -> Run:
    """A run whose first part is committed."""
    model = {"path": "model"}
    raw = {"name": name, "student": model, "teacher": model, "prompts": {"path": "prompts.jsonl"}, **changes}
    settings = parse_settings(raw, "test")
    run = open_run(settings)
    run.paths.folder.mkdir(parents=True)
    run.paths.config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    note(run)
    commit(run, run.plan.job("rollout", 0), [0])
    return run


def first_part(run: Run) -> set[int]:
    return run.artifact(run.plan.job("rollout", 0).output).committed()


def gc(home: Path, *arguments: object) -> str:
    """A day later."""
    for path in (home / "store").rglob("*"):
        os.utime(path, (0, 0))
    result = CliRunner().invoke(app, ["gc", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_note_holds_what_the_run_refers_to(home: Path) -> None:
    run = start("one")
    ((_, written),) = notes(run.store)
    assert written == note_of(run)
    assert isinstance(written, Note)
    assert {job.key for job in run.plan.jobs} <= written.artifacts
    shutil.rmtree(run.paths.folder)
    assert list(notes_of_others(run.store)) == [], "the run's folder is gone"


def test_the_states_of_a_training_that_was_interrupted_stay(home: Path) -> None:
    run = start("one")
    train = run.plan.job("train", 0)
    states = run.scratch(train)
    assert states is not None
    with states.write_part(20):
        pass
    assert gc(home, "--runs", "runs", "--yes") == "freed 0 B\n"
    assert states.committed() == {20}
    commit(run, train)
    note(run)
    gc(home, "--runs", "runs", "--yes")
    assert states.committed() == set(), "killed between the checkpoint and the end of its states"
    assert run.artifact(train.output).is_complete()


def test_from_another_folder_the_same_is_kept(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, gone = start("one"), start("two", seed=1)
    shutil.rmtree(gone.paths.folder)
    monkeypatch.chdir(tmp_path)
    gc(home, "--store", home / "store", "--runs", home / "runs", "--yes")
    left = [path.name for path in (home / "store" / "rollouts").iterdir()]
    assert left == [kept.plan.job("rollout", 0).output.key]


def test_runs_that_left_a_note_are_honoured_wherever_they_are(home: Path) -> None:
    ours, theirs = start("one"), start("two", runs=str(home / "elsewhere"), seed=1)
    text = gc(home, "--runs", "runs", "--yes")
    assert f"kept as well: artifacts of {theirs.paths.config}" in text
    assert first_part(ours) == first_part(theirs) == {0}


def test_a_project_folder_can_be_moved(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start("one")
    monkeypatch.chdir(tmp_path)
    shutil.move(home, tmp_path / "moved")
    assert gc(tmp_path / "moved", "--store", "moved/store", "--runs", "moved/runs", "--yes") == "freed 0 B\n"
    assert list((tmp_path / "moved" / "store" / "rollouts").iterdir())


def test_runs_behind_a_link_are_kept(home: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk" / "all-runs"
    disk.mkdir(parents=True)
    (home / "runs").symlink_to(disk)
    run = start("one")
    assert gc(home, "--runs", "runs", "--yes") == "freed 0 B\n"
    assert first_part(run) == {0}


def test_runs_in_a_closed_home_are_kept(home: Path, open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    shutil.copytree(home, open_folder / "home")
    monkeypatch.chdir(open_folder / "home")
    theirs, _ = start("two", runs=str(open_folder / "theirs" / "runs"), seed=1), start("one")
    (open_folder / "theirs").chmod(0o700)
    with unprivileged():
        assert references(Path("store"), Path("runs"))[theirs.paths.config] == note_of(theirs).artifacts


def test_a_store_that_a_run_only_reads_is_not_collected_for_it(home: Path) -> None:
    start("team", store="team")
    run = start("one", store=["store", "team"])
    shutil.rmtree(home / "runs" / "team")
    with pytest.raises(ValueError, match="only reads"):
        gc(home, "--store", "team", "--runs", "runs", "--yes")
    assert run.store.is_dir()


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"schema": 1}', '{"schema": 99}', "\x00"])
def test_an_unreadable_note_stops_removal_and_pruning(home: Path, text: str) -> None:
    run = start("one")
    (run.store / ".runs" / "0123456789abcdef.json").write_text(text)
    with pytest.raises(DamagedPart, match="0123456789abcdef"):
        gc(home, "--runs", "runs", "--yes")
    assert first_part(run) == {0}


def test_what_another_run_wants_is_not_pruned(tmp_path: Path) -> None:
    """Two runs over one store plan the same first checkpoints; the longer one has not evaluated them yet."""
    short = finished(tmp_path, 3, rounds=2, name="short")
    longer = make_run(tmp_path, rounds=2, name="longer", evaluate={"samples": 3}, train={"keep_checkpoints": 1})
    longer.paths.folder.mkdir(parents=True)
    longer.paths.config.touch()
    assert longer.plan.job("train", 0).output.key == short.plan.job("train", 0).output.key
    note(longer)
    assert named(short, short.unwanted()) == {(0, "weights"), (0, "optimizer")}
    prune_old(short)
    checkpoint = short.artifact(short.plan.job("train", 0).output)
    assert WEIGHTS not in checkpoint.pruned(), "the longer run's evaluation reads the weights"
    shutil.rmtree(longer.paths.folder)
    prune_old(short)
    assert checkpoint.pruned() == {WEIGHTS, OPTIMIZER}
