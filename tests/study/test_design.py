"""Settings, seeds, rounds and what a run states."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from eopd.pipeline.config import parse_settings
from eopd.stages.train.objectives.registry import make_objective
from eopd.stages.train.objectives.settings import FAMILY
from eopd.storage.coverage import Coverage
from examples.study import experiments, rates, results, worlds
from examples.study.__main__ import at_toy_size, in_order
from examples.study.design import SMOKE
from examples.study.errors import StudyError
from tests.study.toys import ALL, RATES, TINY


def test_no_two_settings_are_the_same_run() -> None:
    toys = [at_toy_size(one) for one in ALL]
    for chosen, known in ((ALL, rates.tuned(results.RESULTS)), (toys, RATES)):
        tasks = in_order(chosen, known, seeds=[0])
        assert len({task.key for task in tasks}) == len(tasks) == len({task.name for task in tasks})


def test_a_seed_is_finished_before_the_next_begins(tmp_path: Path) -> None:
    tasks = in_order([experiments.MAIN], RATES)
    assert [task.seed for task in tasks] == sorted(task.seed for task in tasks)
    assert len(tasks) == 9 * 5


def test_every_borrowed_setting_exists() -> None:
    for one in ALL:
        for name in one.borrows:
            lender, setting = name.split("/")
            experiments.EXPERIMENTS[lender].setting(setting)
        names = [*one.borrows, *(setting.name for setting in one.settings)]
        assert one.reference in names or len(one.seeds) == 1, one.name


def test_every_setting_is_valid_and_its_cache_holds_what_its_objective_needs(tmp_path: Path) -> None:
    for task in in_order(ALL, RATES, seeds=[0]):
        settings = parse_settings(task.config(tmp_path), source=task.name)
        objective = make_objective(settings.train.objective)
        Coverage(settings.score.head.rule(), vocab_size=64).require(objective.needs, task.name)
        responses = settings.rounds * settings.rollout.prompts_per_round * settings.rollout.samples_per_prompt
        assert responses == task.scale.responses, task.name
        assert settings.rollout.prompts_per_round <= task.scale.train_problems, task.name


def test_a_run_does_not_change_when_a_default_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved() -> dict[str, object]:
        tasks = in_order([experiments.MAIN], RATES, seeds=[0])
        return {task.name: parse_settings(task.config(tmp_path), source=task.name).semantic() for task in tasks}

    before = resolved()
    monkeypatch.setitem(FAMILY, "opd", {**FAMILY["opd"], "advantage": "current", "ratio": "is", "k": 8})
    monkeypatch.setitem(FAMILY, "eopd", {**FAMILY["eopd"], "support": "bucket"})
    assert resolved() == before


def test_every_keyed_setting_of_a_run_is_stated(tmp_path: Path) -> None:
    """A new one is to be stated in ``stated.py``, with the value that keeps the study's runs what they were."""
    for task in in_order(ALL, RATES, seeds=[0]):
        config = task.config(tmp_path)
        resolved = parse_settings(config, source=task.name).semantic()
        objective = resolved["train"]["objective"]
        for made in ("source", "token_key"):  # of a key, not of the settings
            objective.pop(made, None)
        if ":" in objective["name"]:  # reads what EOPD reads
            resolved["train"]["objective"] = {name: objective[name] for name in FAMILY["eopd"]}
        assert not list(_unsaid(resolved, config)), task.name


def _unsaid(resolved: object, said: object, where: str = "") -> Iterator[str]:
    if isinstance(resolved, dict) and isinstance(said, dict):
        for name, value in resolved.items():
            if name in said:
                yield from _unsaid(value, said[name], f"{where}.{name}")
            else:
                yield f"{where}.{name}"
    elif isinstance(resolved, list) and isinstance(said, list):
        for one, other in zip(resolved, said, strict=True):
            yield from _unsaid(one, other, where)


def test_rounds_are_whole() -> None:
    for one in (*ALL, *map(at_toy_size, ALL)):
        for setting in one.settings:
            assert setting.rounds(one.scale) * (setting.refresh or one.scale.iterations) == one.scale.iterations
            assert (setting.rounds(one.scale) == 1) == (setting.refresh == 0), "only those that sample once have one"
    with pytest.raises(AssertionError):
        experiments.STALENESS.setting("old-ppo-every16").rounds(SMOKE)


def test_gsm8k_is_found_where_its_script_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "EXAMPLES", tmp_path / "repository" / "examples")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    work = tmp_path / "work"
    for role in ("student", "teacher"):
        (work / "gsm8k-pair" / role).mkdir(parents=True)
        (work / "gsm8k-pair" / role / "model.safetensors").touch()
    scale = TINY
    with pytest.raises(StudyError, match=r"python -m examples.gsm8k.data"):
        worlds.GSM8K.prepare(work, scale)
    for place in ("shared/data/gsm8k", "here/data/gsm8k", "repository/data/gsm8k"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        for name in ("train", "test"):
            (folder / f"{name}.jsonl").write_text(f"{place}\n")
        worlds.GSM8K.prepare(work, scale)
        problems = worlds.GSM8K.problems(work, scale)
        assert (problems / "train.jsonl").read_text() == f"{place}\n", "before the places that were there already"
        shutil.rmtree(problems)
