"""Which parts of checkpoints may go and which are called back, over stores of real markers without data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eopd.pipeline.budget import refuse_too_large, refuse_what_the_machine_lacks
from eopd.pipeline.config import ConfigError
from eopd.pipeline.errors import RunError
from eopd.pipeline.neighbours import configs, register
from eopd.pipeline.node import Node
from eopd.pipeline.overview import look
from eopd.pipeline.plan import OPTIMIZER, WEIGHTS, Stage
from eopd.pipeline.pruning import may_go, prune_old, rebuilds, wanted
from eopd.pipeline.runner import Runner
from eopd.storage.pruning import prune
from eopd.storage.stacked import StackedStores
from tests.pipeline.plan_case import commit, make_runner

Named = set[tuple[int, str]]
ALL: tuple[Stage, ...] = ("rollout", "score", "train", "evaluate")


def finished(folder: Path, until: int, train: dict[str, object] | None = None, **changes: object) -> Runner:
    """Every job of the rounds before ``until`` is done."""
    kept = {"keep_checkpoints": 1, "keep_optimizer_states": 1, **(train or {})}
    runner = make_runner(folder, **{"rounds": 4, "train": kept, **changes})
    for job in runner.plan.jobs:
        if job.round < until:
            commit(runner, job)
    return runner


def named(runner: Runner, parts: set[tuple[str, int]]) -> Named:
    rounds = {job.output.key: job.round for job in runner.plan.jobs if job.stage == "train"}
    return {(rounds[key], "weights" if part == WEIGHTS else "optimizer") for key, part in parts}


def remove(runner: Runner, stage: Stage, round_: int) -> None:
    artifact = runner.artifact(runner.plan.job(stage, round_).output)
    for part in artifact.committed():
        artifact.drop_part(part)


def test_what_the_next_round_reads_stays(tmp_path: Path) -> None:
    """Two rounds done: student 2 is the newest, nothing was made of it yet."""
    runner = finished(tmp_path, 2)
    assert named(runner, may_go(runner)) == {(0, "weights"), (0, "optimizer")}
    assert named(runner, wanted(runner)) >= {(1, "weights"), (1, "optimizer")}
    remove(runner, "evaluate", 1)
    assert named(runner, may_go(runner)) == {(0, "optimizer")}
    remove(runner, "train", 1)
    assert may_go(runner) == set()


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
    runner = finished(tmp_path, 3, train)
    assert named(runner, may_go(runner)) == gone


def test_by_default_only_optimiser_states_go(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, rounds=3)
    for job in runner.plan.jobs:
        commit(runner, job)
    assert named(runner, may_go(runner)) == {(0, "optimizer"), (1, "optimizer")}


def test_a_policy_that_samples_late_stays(tmp_path: Path) -> None:
    """With refresh 2, rounds 2 and 3 sample from student 2, the checkpoint of round 1."""
    runner = finished(tmp_path, 3, refresh=2)
    assert named(runner, may_go(runner)) == {(0, "weights"), (0, "optimizer"), (1, "optimizer")}


def test_moments_that_nobody_reads_go(tmp_path: Path) -> None:
    runner = finished(tmp_path, 2, {"optimizer": {"carry_over": False}})
    assert (1, "weights") in named(runner, wanted(runner))
    assert "optimizer" not in {part for _, part in named(runner, wanted(runner))}


def test_only_what_is_read_is_called_back(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    runner = finished(tmp_path, 9)
    for round_ in range(3):
        artifact = runner.artifact(runner.plan.job("train", round_).output)
        for part in (WEIGHTS, OPTIMIZER):
            prune(artifact, part, lambda name: True)
    assert all(runner.is_done(job) for job in runner.plan.jobs)
    assert look([runner]).totals["all"].missing == 0
    assert rebuilds(runner) == set()

    remove(runner, "evaluate", 2)
    again = finished_runner(runner)
    assert named(again, rebuilds(again)) == {(0, "weights"), (0, "optimizer"), (1, "weights")}
    undone = [job.name for job in again.plan.jobs if not again.is_done(job)]
    assert undone == ["train 0", "train 1", "evaluate 2"]
    first, second = (Node(again, again.plan.job("train", round_)) for round_ in range(2))
    assert first.missing() == [WEIGHTS, OPTIMIZER]
    assert [batch.parts for batch in first.batches()] == [(WEIGHTS, OPTIMIZER)]
    assert second.missing() == [WEIGHTS]
    assert second.batches() == []  # its inputs have to be made again first
    assert look([again]).totals["train"].missing == 3
    with pytest.raises(RunError, match=r"evaluate 2 needs .*parts \[0\] were pruned\. Run `eopd train .*--round 1`"):
        again.run(again.plan.job("evaluate", 2))


def finished_runner(runner: Runner) -> Runner:
    """The same run, started again."""
    return Runner(runner.settings, runner.facts, runner.plan, runner.progress)


def test_what_was_fetched_from_a_bucket_is_not_pruned(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    from eopd.storage.remote import open_bucket

    team = finished(tmp_path / "team", 2)
    runner = make_runner(tmp_path, rounds=4, train={"keep_checkpoints": 1, "keep_optimizer_states": 1})
    bucket = open_bucket(f"file://{team.store}")
    vars(runner)["stores"] = StackedStores([runner.store, bucket])
    fetched = [runner.artifact(runner.plan.job("train", 0).output).part_folder(part) for part in (WEIGHTS, OPTIMIZER)]
    assert all(folder.is_relative_to(runner.store) for folder in fetched)
    assert named(runner, may_go(runner)) == {(0, "weights"), (0, "optimizer")}
    assert prune_old(runner) == 0
    assert all((folder / "data").exists() for folder in fetched)


def test_a_store_knows_its_runs(tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    register(runner)
    register(runner)
    assert configs(runner.store) == {}  # a run whose config is gone
    runner.paths.config.parent.mkdir(parents=True)
    runner.paths.config.touch()
    assert configs(runner.store) == {runner.paths.config: Path.cwd()}


def test_a_run_that_outgrows_its_store_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    keep_all = {"keep_optimizer_states": None}
    free = make_runner(tmp_path, rounds=20, train=keep_all)
    refuse_too_large([free])
    peak = look([free]).peak_bound
    refuse_too_large([make_runner(tmp_path, rounds=20, train=keep_all, max_store_bytes=peak)])
    small = make_runner(tmp_path, rounds=20, train=keep_all, max_store_bytes=peak - 1)
    with pytest.raises(ConfigError, match=r"max_store_bytes is .*would hold about .*keep_checkpoints=1.*would save"):
        refuse_too_large([small])
    spared = look([make_runner(tmp_path, rounds=20, train={"keep_checkpoints": 1})]).peak_bound
    assert spared < peak
    refuse_too_large([make_runner(tmp_path, rounds=20, train={"keep_checkpoints": 1}, max_store_bytes=spared)])

    other = make_runner(tmp_path, rounds=1, seed=5)
    commit(other, other.plan.jobs[0])
    with pytest.raises(ConfigError, match=r"4\.0 kB of other artifacts"):
        refuse_too_large([make_runner(tmp_path, rounds=20, train=keep_all, max_store_bytes=peak)])


def test_far_too_little_disk_is_refused_by_the_settings_that_ask_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`samples_per_prompt: 100000` is a typo, of which the disk would be full in a few hours."""
    save_file({"weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("eopd.pipeline.budget._available_memory", lambda: None)
    monkeypatch.setattr("eopd.pipeline.overview.shutil.disk_usage", lambda _: SimpleNamespace(free=10**9))
    refuse_what_the_machine_lacks([make_runner(tmp_path)])
    with pytest.raises(ConfigError, match=r"1\.0 GB are free .*rollout\.samples_per_prompt.*Nothing was started"):
        refuse_what_the_machine_lacks([make_runner(tmp_path, rollout={"samples_per_prompt": 100_000})])
    with pytest.raises(ConfigError, match=r"evaluate\.samples"):
        refuse_what_the_machine_lacks([make_runner(tmp_path, evaluate={"samples": 100_000})])
    monkeypatch.setattr("eopd.pipeline.overview.read_shapes", lambda _: {"weight": (100_000_000,)})
    with pytest.raises(ConfigError, match=r"keep_checkpoints"):
        refuse_what_the_machine_lacks([make_runner(tmp_path)])


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"rollout": {"samples_per_prompt": 1_000_000}}, r"rollout\.samples_per_prompt and rollout\.rows_per_part"),
        ({"evaluate": {"samples": 100_000}}, r"evaluate\.samples and evaluate\.rows_per_part"),
    ],
)
def test_a_part_that_memory_cannot_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], setting: str
) -> None:
    save_file({"weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("eopd.pipeline.budget._available_memory", lambda: 2 * 10**8)
    monkeypatch.setattr("eopd.pipeline.overview.shutil.disk_usage", lambda _: SimpleNamespace(free=10**18))
    refuse_what_the_machine_lacks([make_runner(tmp_path)])
    with pytest.raises(ConfigError, match=setting):
        refuse_what_the_machine_lacks([make_runner(tmp_path, **changes)])
    refuse_what_the_machine_lacks([make_runner(tmp_path, **changes, launcher={"kind": "slurm"})])


def test_runs_of_a_sweep_share_the_limit(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    one, other = ({"name": name, "train": {"epochs": epochs}} for name, epochs in (("a", 1), ("b", 2)))
    peak = look([make_runner(tmp_path, **one), make_runner(tmp_path, **other)]).peak_bound
    both = [make_runner(tmp_path, **changes, max_store_bytes=peak - 1) for changes in (one, other)]
    for alone in both:
        refuse_too_large([alone])
    with pytest.raises(ConfigError, match=r"at the worst moment of these 2 runs: .* Fewer rounds or runs"):
        refuse_too_large(both)
    refuse_too_large([make_runner(tmp_path, **changes, max_store_bytes=peak) for changes in (one, other)])


def test_states_of_a_training_that_was_stopped_are_not_counted_twice(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    runner = make_runner(tmp_path)
    peak = look([runner]).peak_bound
    with runner.states(runner.plan.job("train", 0)).write_part(2) as folder:
        (folder / "state").write_bytes(bytes(3000))
    refuse_too_large([make_runner(tmp_path, max_store_bytes=peak)])


def test_a_part_that_is_there_leaves_nothing_to_do(tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    job = runner.plan.job("rollout", 0)
    commit(runner, job, [0, 1])
    assert runner.is_idle(job, [1])
    assert not runner.is_idle(job, [1, 2])
    evaluation = runner.plan.job("evaluate", 0)
    commit(runner, evaluation, [0, 1, 2])
    assert not runner.is_idle(evaluation, [0]), "whoever made the last part may have died before summing up"
    assert not runner.is_idle(job)
    commit(runner, job, range(2, job.output.parts))
    assert runner.is_idle(job)
