"""Scores that are asked for, and those that stand in for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eopd.pipeline.cli.options import open_runs
from eopd.pipeline.plan import Plan, make_plan
from eopd.pipeline.run import StoreShelf
from eopd.stages.engines.kept import Engines
from eopd.stages.score.settings import HeadSettings, ScoreSettings
from eopd.storage import identity as fingerprints
from eopd.storage.artifacts import Artifact
from eopd.storage.files import sha256_file
from eopd.storage.identity import Identity
from eopd.storage.stacked import StackedStores
from tests.pipeline.plan_case import RAW, commit, make_run


def asked(k_max: int, **head: Any) -> Identity:
    coverage = ScoreSettings(head=HeadSettings(k_max=k_max, **head)).coverage()
    return Identity("scores", 1, 1, inputs={"rollouts": "r"}, coverage={**coverage, "extra": None})


def serving(stores: StackedStores, identity: Identity) -> str:
    return StoreShelf(stores).serving(identity)[0].key


def make(store: Path, identity: Identity) -> None:
    artifact = Artifact(store, identity)
    for part in range(artifact.parts):
        with artifact.write_part(part):
            pass


def test_complete_scores_that_hold_as_much_stand_in(tmp_path: Path) -> None:
    stores = StackedStores([tmp_path])
    make(tmp_path, asked(64))
    assert serving(stores, asked(16)) == asked(64).key
    other = replace(asked(16), inputs={"rollouts": "other"})
    assert serving(stores, other) == other.key


@pytest.mark.parametrize("draws", [{"draws": "none"}, {"draws": "full", "n_draws": 8}, {"draws": "beyond_head"}])
def test_scores_of_fewer_entries_do_not_stand_in(tmp_path: Path, draws: dict[str, Any]) -> None:
    """Where the entropy is low a token has the entries of at least min_prob: 0.5 leaves one or two."""
    make(tmp_path, asked(16, min_prob=0.5, **draws))
    wanted = asked(16, min_prob=0.03, **draws)
    assert serving(StackedStores([tmp_path]), wanted) == wanted.key
    make(tmp_path, asked(16, min_prob=0.01, **draws))
    assert serving(StackedStores([tmp_path]), wanted) == asked(16, min_prob=0.01, **draws).key


@pytest.mark.parametrize("where", ["private", "team"])
@pytest.mark.parametrize("text", ["{", '"schema": 99'])
def test_a_sibling_that_cannot_be_read_is_passed_over(tmp_path: Path, where: str, text: str) -> None:
    """Damaged, or written by a newer eopd."""
    (tmp_path / "team").mkdir()
    make(tmp_path / where, asked(32))
    make(tmp_path / where, asked(64))
    path = tmp_path / where / "scores" / asked(32).key / "identity.json"
    path.write_text(text if text == "{" else path.read_text().replace('"schema": 1', text))
    stores = StackedStores([tmp_path / "private", tmp_path / "team"])
    assert serving(stores, asked(16)) == asked(64).key


def test_what_is_begun_is_finished_as_asked(tmp_path: Path) -> None:
    """Whoever starts tasks says first what it makes; a wider sibling that is there meanwhile changes nothing."""
    stores = StackedStores([tmp_path])
    Artifact(tmp_path, asked(16)).begin()
    make(tmp_path, asked(64))
    assert serving(stores, asked(16)) == asked(16).key


def test_a_training_that_is_begun_keeps_the_scores_it_was_begun_with(tmp_path: Path) -> None:
    """Cheaper ones that another run adds are no reason to train anew."""
    run = make_run(tmp_path, rounds=1)
    sampled = run.plan.job("rollout", 0).output.key

    def add(k_max: int, **head: Any) -> None:
        score = run.plan.job("score", 0).output
        make(run.store, replace(score, coverage={**asked(k_max, **head).coverage, "extra": None}))

    def planned() -> Plan:
        return make_plan(run.experiment, StoreShelf(StackedStores([run.store])))

    add(64)
    plan = planned()
    assert plan.job("score", 0).output.coverage["head"]["k_max"] == 64
    add(32)
    assert planned().job("score", 0).output.coverage["head"]["k_max"] == 32, "nothing is begun: the cheapest"
    Artifact(run.store, plan.job("train", 0).output).begin()
    assert planned() == plan
    assert plan.job("rollout", 0).output.key == sampled


def test_a_sweep_over_a_new_store_hashes_each_file_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(fingerprints, "sha256_file", counting)
    (home / "mine.yaml").write_text(
        "{name: x, student: {path: model}, teacher: {path: model}, prompts: {path: prompts.jsonl}}"
    )
    (home / "sweep.yaml").write_text("sweep: [{name: a, seed: 1}, {name: b, seed: 2}, {name: c, seed: 3}]")
    runs = open_runs("mine.yaml", None, "sweep.yaml")
    assert [run.name for run in runs] == ["x-a", "x-b", "x-c"]
    assert sorted(hashed) == ["config.json", "model.safetensors", "prompts.jsonl", "tokenizer.json"]
    assert not (home / "store").exists()


def test_parts_are_ready_when_their_inputs_are_there(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rollout, score, train = (run.plan.job(stage, 0) for stage in ("rollout", "score", "train"))
    assert run.ready_parts(rollout) == {0, 1, 2}
    assert run.ready_parts(score) == set()
    commit(run, rollout, [0, 2])
    assert run.missing_parts(rollout) == {1}
    assert run.ready_parts(score) == {0, 2}
    commit(run, score, [0, 1, 2])
    assert run.ready_parts(train) == set()
    commit(run, rollout, [1])
    assert run.ready_parts(train) == {0, 1}
    commit(run, train, [1])
    assert run.missing_parts(train) == {0, 1}, "training is done as a whole"


@pytest.mark.parametrize("name", ["rollout", "score", "train", "student_topk"])
def test_every_stage_is_handed_the_temperature_of_the_rollouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The reference for logits is the policy that sampled: a stage that took 1.0 would train towards another one."""
    changes = {"temperature": 0.8, "student_topk": 4}
    run = make_run(tmp_path, rollout={**RAW["rollout"], **changes})
    module = "stages.rollout.student_topk" if name == "student_topk" else f"stages.{name}.run"
    handed: list[Any] = []
    monkeypatch.setattr(f"eopd.{module}.run", handed.append)
    job = run.plan.job(name, 0)
    job.stage.run(run.context(job, [0], Engines()))
    (made,) = handed
    result = {
        "rollout": lambda: made.settings.temperature,
        "score": lambda: made.rollout_temperature,
        "train": lambda: made.temperature,
        "student_topk": lambda: made.settings.temperature,
    }
    assert result[name]() == 0.8
