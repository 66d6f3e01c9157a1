"""Scores that are asked for, and those that stand in for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eopd.pipeline.plan_cli import open_runners
from eopd.pipeline.planning import serving_coverage
from eopd.stages.score.settings import HeadSettings, ScoreSettings
from eopd.storage import fingerprints
from eopd.storage.artifacts import Artifact, Identity
from eopd.storage.files import sha256_file
from eopd.storage.stacked import StackedStores


def asked(k_max: int, **head: Any) -> Identity:
    coverage = ScoreSettings(head=HeadSettings(k_max=k_max, **head)).coverage()
    return Identity("scores", 1, 1, inputs={"rollouts": "r"}, coverage={**coverage, "extra": None})


def make(store: Path, identity: Identity) -> None:
    with Artifact(store, identity).write_part(0):
        pass


def test_complete_scores_that_hold_as_much_stand_in(tmp_path: Path) -> None:
    stores = StackedStores([tmp_path])
    make(tmp_path, asked(64))
    assert serving_coverage(stores, asked(16)).key == asked(64).key
    other = replace(asked(16), inputs={"rollouts": "other"})
    assert serving_coverage(stores, other).key == other.key


@pytest.mark.parametrize("draws", [{"draws": "none"}, {"draws": "full", "n_draws": 8}, {"draws": "beyond_head"}])
def test_scores_of_fewer_entries_do_not_stand_in(tmp_path: Path, draws: dict[str, Any]) -> None:
    """Where the entropy is low a token has the entries of at least min_prob: 0.5 leaves one or two."""
    make(tmp_path, asked(16, min_prob=0.5, **draws))
    wanted = asked(16, min_prob=0.03, **draws)
    assert serving_coverage(StackedStores([tmp_path]), wanted).key == wanted.key
    make(tmp_path, asked(16, min_prob=0.01, **draws))
    assert serving_coverage(StackedStores([tmp_path]), wanted).key == asked(16, min_prob=0.01, **draws).key


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
    assert serving_coverage(stores, asked(16)).key == asked(64).key


def test_what_is_begun_is_finished_as_asked(tmp_path: Path) -> None:
    """Whoever starts tasks says first what it makes; a wider sibling that is there meanwhile changes nothing."""
    stores = StackedStores([tmp_path])
    Artifact(tmp_path, asked(16)).begin()
    make(tmp_path, asked(64))
    assert serving_coverage(stores, asked(16)).key == asked(16).key


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
    runners = open_runners("mine.yaml", None, "sweep.yaml")
    assert [runner.settings.name for runner in runners] == ["x-a", "x-b", "x-c"]
    assert sorted(hashed) == ["config.json", "model.safetensors", "prompts.jsonl", "tokenizer.json"]
    assert not (home / "store").exists()
