"""`train.select`: which responses of a round are trained on, and what follows for steps, the schedule and keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from eopd.stages.models.prompts import PromptSettings, rows_where
from eopd.stages.score.run import run as score
from eopd.stages.train.job import Candidate, Selection, TrainJob
from eopd.stages.train.responses import load_responses
from eopd.stages.train.run import run, schedule_of
from eopd.stages.train.settings import SelectSettings, TrainSettings, learning_rate
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import DamagedPart, InputError
from eopd.storage.identity import Identity
from eopd.storage.paths import TRAINING_FILE, WEIGHTS
from eopd.storage.teacher_cache import JointCache
from eopd.storage.verdict_signal import VERDICTS
from tests.raises import raises
from tests.stages.score_case import Lines, random_responses, rollouts, score_job
from tests.stages.tiny_models import save_teacher
from tests.stages.train_case import read_rows, train_job

RIGHT = (False, True, True, False, True, False, False, True)
"""Verdicts on eight responses: samples 0 to 3 of prompts a and b."""


def candidates(correct: Sequence[bool | None] = RIGHT) -> list[Candidate]:
    return [Candidate("ab"[number // 4], number % 4, number // 4, one) for number, one in enumerate(correct)]


def select(**settings: Any) -> SelectSettings:
    return SelectSettings.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "prompts", "chosen"),
    [
        ({}, None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"verdict": "right"}, None, [1, 2, 4, 7]),
        ({"verdict": "wrong"}, None, [0, 3, 5, 6]),
        ({"per_prompt": "first"}, None, [0, 4]),
        ({"per_prompt": 3}, None, [0, 1, 2, 4, 5, 6]),
        ({"per_prompt": 9}, None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"verdict": "right", "per_prompt": "first"}, None, [1, 4]),
        ({"verdict": "wrong", "per_prompt": 1}, None, [0, 5]),
        ({}, {1}, [4, 5, 6, 7]),
        ({"verdict": "right", "per_prompt": 1}, {1, 5}, [4]),
    ],
)
def test_what_is_selected(settings: dict[str, Any], prompts: set[int] | None, chosen: list[int]) -> None:
    rows = None if prompts is None else frozenset(prompts)
    assert Selection(select(**settings), rows).choose(candidates())[0] == chosen


def test_the_first_is_the_lowest_sample_number_in_whatever_order_responses_are_stored() -> None:
    assert Selection(select(verdict="right", per_prompt="first")).choose(candidates()[::-1])[0] == [3, 6]


def test_responses_without_a_verdict_are_neither_right_nor_wrong() -> None:
    unjudged = candidates((None, None, None, None, *RIGHT[4:]))
    assert Selection(select(verdict="right")).choose(unjudged)[0] == [4, 7]
    chosen, words = Selection(select(verdict="wrong")).choose(unjudged)
    assert chosen == [5, 6]
    assert "4 were not judged" in words


@pytest.mark.parametrize(
    ("settings", "prompts", "counts"),
    [
        ({"verdict": "right"}, {0}, "of 8 responses, 4 are .*, 0 are right"),
        ({"per_prompt": 1}, set(), "of 8 responses, 0 are"),
    ],
)
def test_a_selection_of_nothing_gives_the_counts(settings: dict[str, Any], prompts: set[int], counts: str) -> None:
    with raises(InputError, counts, setting="train.select"):
        Selection(select(**settings), frozenset(prompts)).choose(candidates((False,) * 8))


@pytest.mark.parametrize("per_prompt", [0, -1, "second", True, 1.5])
def test_per_prompt_is_all_first_or_a_number(per_prompt: object) -> None:
    with pytest.raises(ValidationError, match="per_prompt"):
        select(per_prompt=per_prompt)


@pytest.mark.parametrize("values", ["algebra", [], [None], [["algebra"]], 3])
def test_where_has_lists_of_values(values: object) -> None:
    with pytest.raises(ValidationError, match="topic: expected a list"):
        select(where={"topic": values})


def test_keys_follow_what_is_selected() -> None:
    def keyed(**settings: Any) -> dict[str, Any]:
        return TrainSettings.model_validate({"select": settings}).semantic()

    assert "select" not in keyed()
    assert keyed(verdict="any", per_prompt="all", where={}) == TrainSettings().semantic()
    assert keyed(per_prompt="first") == keyed(per_prompt=1) != keyed(per_prompt=2)
    assert keyed(where={"topic": ["a", "b"]}) == keyed(where={"topic": ["b", "a", "b"]})
    assert keyed(where={"level": [1]}) != keyed(where={"level": [True]})


# -- where ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path) -> PromptSettings:
    rows = [
        {"prompt": "p0", "topic": "algebra", "level": 1, "meta": {"hard": True}},
        {"prompt": "p1", "topic": "geometry", "level": 2, "meta": {"hard": False}},
        {"prompt": "p2", "topic": "algebra", "level": 2, "meta": {"hard": True}},
        {"prompt": "p3", "topic": None, "level": 1, "meta": {"hard": True}},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PromptSettings(path=str(path))


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ({"topic": ["algebra"]}, {0, 2}),
        ({"topic": ["algebra", "geometry"]}, {0, 1, 2}),
        ({"topic": ["algebra"], "level": [2]}, {2}),
        ({"level": [1.0]}, {0, 3}),
        ({"meta.hard": [False]}, {1}),
        ({"topic": ["geometry"], "level": [1]}, set()),
    ],
)
def test_rows_where(prompts: PromptSettings, where: dict[str, list[Any]], rows: set[int]) -> None:
    assert rows_where(prompts, where) == rows


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"topik": ["algebra"]}, "'topik'.*level, meta, prompt, topic; the nearest is topic"),
        ({"topic": ["algbra"]}, '"algbra".* "algebra"'),
        ({"level": [True]}, "level: .*true"),
        ({"meta": ["x"]}, "line 1: column 'meta'"),
    ],
)
def test_unknown_columns_and_values_are_named(
    prompts: PromptSettings, where: dict[str, list[Any]], message: str
) -> None:
    with raises(InputError, message, file=prompts.path):
        rows_where(prompts, where)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight scored responses in two parts: samples 0 to 3 of two prompts."""
    folder = tmp_path_factory.mktemp("world")
    save_teacher("qwen3", folder / "teacher", seed=0)
    save_teacher("qwen3", folder / "student", seed=1)
    rows = [
        {**row, "prompt_id": one.prompt_id, "sample": one.sample, "prompt_index": one.prompt_index}
        for row, one in zip(random_responses(8, seed=3, most=12), candidates(), strict=True)
    ]
    source = rollouts(folder / "store", [rows[:5], rows[5:]])
    score(score_job(folder / "store", folder / "teacher", source))
    return folder


def verdicts_of(job: TrainJob, name: str = "v", correct: Sequence[bool] = RIGHT, **changes: Any) -> Artifact:
    """Verdicts on the world's rollouts; ``changes`` are columns of all rows."""
    artifact = Artifact(job.rollouts.folder.parents[1], Identity("verdicts", 1, 2, settings={"name": name}))
    rows = [
        {"prompt_id": one.prompt_id, "sample": one.sample, "correct": one.correct} | changes
        for one in candidates(correct)
    ]
    for part, of_part in enumerate((rows[:5], rows[5:])):
        if not artifact.is_committed(part):
            with artifact.write_part(part, inputs={"rollouts": job.rollouts.marker(part).checksum}) as folder:
                VERDICTS.write(folder, of_part)
    return artifact


def test_responses_are_the_selected_ones_in_the_order_of_the_rollouts(world: Path) -> None:
    job = train_job(world, "loaded")
    cache, everything = JointCache(job.scores), load_responses(job.rollouts, JointCache(job.scores))
    selection = Selection(select(verdict="right"), verdicts=verdicts_of(job))
    selected = load_responses(job.rollouts, cache, selection)
    assert selected.names == ("a/1", "a/2", "b/0", "b/3")
    assert selected.locations == ((0, 1), (0, 2), (0, 4), (1, 2))
    kept = [everything.names.index(name) for name in selected.names]
    assert selected.sequences == tuple(everything.sequences[number] for number in kept)
    assert selected.tokens == sum(len(everything.sequences[number].response_ids) for number in kept)
    assert everything.selection is None


def test_rollouts_without_a_token_to_train_on_are_refused(world: Path) -> None:
    job = train_job(world, "nothing")
    with raises(InputError, setting="train.tokens", artifact=str(job.rollouts)):
        load_responses(job.rollouts, JointCache(job.scores), region=lambda written: np.zeros(len(written), bool))


@pytest.mark.parametrize("changes", [{"prompt_id": "c"}, {"sample": 7}])
def test_verdicts_on_other_responses_are_refused(world: Path, changes: dict[str, Any]) -> None:
    job = train_job(world, "mixed-up")
    selection = Selection(select(verdict="right"), verdicts=verdicts_of(job, str(changes), **changes))
    with pytest.raises(DamagedPart, match="verdicts on other responses"):
        load_responses(job.rollouts, JointCache(job.scores), selection)


def test_training_takes_the_selected_tokens_and_no_others(world: Path) -> None:
    """Four right responses in batches of three: two steps an epoch, the second of one response."""
    job = train_job(world, "right", batch_responses=3, epochs=2, objective={"name": "sft"})
    job = replace(job, selection=Selection(select(verdict="right"), verdicts=verdicts_of(job)), progress=Lines())
    run(job)
    rows = read_rows(job)
    assert len(rows) == 4
    tokens = load_responses(job.rollouts, JointCache(job.scores), job.selection).tokens
    for epoch in (0, 1):
        assert sum(row["tokens"] for row in rows if row["epoch"] == epoch) == tokens
    assert any("of 8 responses, 4 are right (train.select)" in line for line in job.progress.lines)  # type: ignore[attr-defined]
    summary = json.loads((job.output.part_folder(WEIGHTS) / TRAINING_FILE).read_text())
    assert (summary["responses"], summary["selection"]) == (4, "of 8 responses, 4 are right")


def test_fewer_responses_than_a_batch_are_one_step(world: Path) -> None:
    job = train_job(world, "few", batch_responses=32, epochs=1, objective={"name": "sft"})
    run(replace(job, selection=Selection(select(verdict="right", per_prompt=1), verdicts=verdicts_of(job))))
    assert len(read_rows(job)) == 1


def test_nothing_selected_ends_before_a_model_is_loaded(world: Path) -> None:
    job = train_job(world, "nothing")
    verdicts = verdicts_of(job, "all wrong", (False,) * 8)
    job = replace(job, selection=Selection(select(verdict="right"), verdicts=verdicts))
    with raises(InputError, "0 are right", setting="train.select"):
        run(replace(job, student=replace(job.student, path="there is no such folder")))
    assert not job.output.folder.joinpath("identity.json").exists()


@pytest.mark.parametrize("carry_over", [True, False])
def test_every_round_gets_its_share_of_the_schedule(world: Path, carry_over: bool) -> None:
    """Three rounds that select 4, 1 and 10 responses: together they span the schedule, whatever each selects."""
    job = train_job(world, "schedule", batch_responses=1, epochs=1, optimizer={"schedule": "linear", "lr": 1.0})
    optimizer = job.settings.optimizer.model_copy(update={"carry_over": carry_over})
    job = replace(job, settings=job.settings.model_copy(update={"optimizer": optimizer}), selection=Selection())
    rounds = 3 if carry_over else 1
    for round_, responses in enumerate((4, 1, 10)):
        first, total = schedule_of(replace(job, round=round_, schedule_rounds=rounds), responses)
        rates = [learning_rate(optimizer, first + step, total) for step in range(responses + 1)]
        begins = 1 - round_ / 3 if carry_over else 1.0
        ends = 1 - (round_ + 1) / 3 if carry_over else 0.0
        assert rates[0] == pytest.approx(begins)
        assert rates[-1] == pytest.approx(ends, abs=1e-12)
    assert schedule_of(replace(job, selection=None), 10) == (job.first_step, job.total_steps)
