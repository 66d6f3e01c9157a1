"""Several teachers, of which a column names one for each prompt: settings, plans and forecasts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from eopd.pipeline.config import ConfigError
from eopd.pipeline.forecast import forecast
from eopd.pipeline.plan import Plan, Shelf, make_plan
from eopd.stages.experiment import Experiment, Facts, TeacherFacts
from eopd.stages.models.prompts import PromptSettings, rows_by_teacher
from eopd.storage.errors import InputError
from eopd.storage.identity import Identity
from tests.pipeline.plan_case import make_facts, make_settings, plan_of, run_of
from tests.raises import raises

COLUMNS = {"columns": {"teacher": "subject"}}
TEACHERS: dict[str, Any] = {
    "teacher": None,
    "teachers": {"math": {"path": "m"}, "code": {"path": "c"}},
    "prompts": COLUMNS,
    "evaluate": None,
}
MATH = frozenset(range(15))


def facts_of(
    math: str = "t-math", code: str = "t-code", rows: frozenset[int] = MATH, stop: int = 5, folder: Path = Path("m")
) -> Facts:
    facts = make_facts(folder=folder)
    one, other = (replace(facts.teacher, fingerprint=name, stop_ids=(stop + n,)) for n, name in enumerate((math, code)))
    others = frozenset(range(25)) - rows
    return replace(facts, teacher=one, teachers={"math": TeacherFacts(one, rows), "code": TeacherFacts(other, others)})


def planned(facts: Facts | None = None, **changes: Any) -> Plan:
    return plan_of(make_settings(**{**TEACHERS, **changes}), facts or facts_of())


def key(plan: Plan, teacher: str, round_: int = 0) -> str:
    return plan.job("score", round_, teacher).output.key


def test_each_teacher_has_scores_of_its_own_and_training_reads_all() -> None:
    plan = planned()
    assert [job.name for job in plan.by_teacher("score", 1)] == ["score 1 (math)", "score 1 (code)"]
    train = plan.job("train", 1)
    scored = {"scores.math": key(plan, "math", 1), "scores.code": key(plan, "code", 1)}
    assert {role: train.inputs[role].identity.key for role in scored} == scored
    assert scored.items() <= train.output.inputs.items()
    assert {job.log_stem for job in plan.by_teacher("score", 1)} == {"score-1.math", "score-1.code"}
    stops = plan.job("score", 0, "math").output.settings["stop_ids"]
    assert stops == plan.job("score", 0, "code").output.settings["stop_ids"] == [2, 5, 6]


def test_scores_are_shared_by_what_does_not_concern_their_teacher() -> None:
    plan = planned()
    other = planned(facts_of(code="another"))
    assert key(other, "math") == key(plan, "math")
    assert key(other, "code") != key(plan, "code")
    assert other.job("train", 0).output.key != plan.job("train", 0).output.key
    renamed = planned(_renamed(facts_of()), teachers={"sums": {"path": "m"}, "code": {"path": "c"}})
    assert key(renamed, "sums") == key(plan, "math")
    again = planned(train={"objective": {"name": "fkl"}})
    assert key(again, "code") == key(plan, "code")
    moved = planned(facts_of(rows=MATH | {20}))
    assert {key(moved, "math"), key(moved, "code")}.isdisjoint({key(plan, "math"), key(plan, "code")})


def _renamed(facts: Facts) -> Facts:
    return replace(facts, teachers={"sums": facts.teachers["math"], "code": facts.teachers["code"]})


class Wider(Shelf):
    """A shelf that holds scores of a larger head beside any that are requested."""

    def serving(self, requested: Identity) -> Sequence[Identity]:
        return [replace(requested, coverage={**(requested.coverage or {}), "wider": True}), requested]


def test_no_teacher_is_served_with_other_heads_than_the_rest() -> None:
    """Scores that hold more may serve a single teacher; of several, all must have one rule for their draws."""
    plan = make_plan(Experiment(make_settings(**TEACHERS), facts_of()), Wider())
    assert {name: key(plan, name) for name in ("math", "code")} == {
        name: key(planned(), name) for name in ("math", "code")
    }
    assert not any("wider" in (job.output.coverage or {}) for job in plan.by_teacher("score", 0))
    single = make_plan(Experiment(make_settings(evaluate=None), make_facts()), Wider())
    assert "wider" in (single.job("score", 0).output.coverage or {})


def test_a_teacher_of_every_prompt_has_the_scores_of_a_single_one() -> None:
    facts = facts_of()
    alone = replace(facts, teachers={"math": TeacherFacts(facts.teacher, frozenset(range(25)))})
    plan = planned(alone, teachers={"math": {"path": "m"}})
    single = plan_of(make_settings(evaluate=None), replace(facts, teachers={}))
    assert key(plan, "math") == single.job("score", 0).output.key


def test_the_forecast_divides_the_tokens(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(1)}, tmp_path / "model.safetensors")
    settings = make_settings(**TEACHERS, store=str(tmp_path / "store"), runs=str(tmp_path / "runs"))
    run = run_of(settings, facts_of(folder=tmp_path))
    tokens = {row.job.name: row.size.tokens for row in forecast([run]).rows}
    assert tokens["score 0 (math)"] == round(tokens["rollout 0"] * 15 / 25)
    assert tokens["score 0 (code)"] == round(tokens["rollout 0"] * 10 / 25)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"teacher": {"path": "t"}}, "teachers"),
        ({"prompts": {"columns": {"teacher": None}}}, "prompts.columns.teacher"),
        ({"teachers": None, "teacher": {"path": "t"}}, "prompts.columns.teacher"),
        ({"teachers": {"a b": {"path": "m"}}}, "teacher.by_prompt.a b.[key]"),
        ({"teachers": {}}, "teacher.by_prompt"),
        ({"teachers": {"math": {"student": "initial"}}}, "teacher.by_prompt.math.student"),
        ({"rollout": {"source": "teacher"}, "train": {"objective": {"name": "fkl"}}}, "rollout.source"),
        (
            {"evaluate": {"benchmarks": [{"name": "b", "path": "b"}], "alignment": {}}},
            "evaluate.alignment",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], setting: str) -> None:
    with raises(ConfigError, setting=setting):
        make_settings(**{**TEACHERS, **changes})


def write(path: Path, teachers: list[Any]) -> PromptSettings:
    lines = [json.dumps({"id": f"p{n}", "prompt": "x", "subject": name}) for n, name in enumerate(teachers)]
    path.write_text("\n".join(lines))
    return PromptSettings(path=str(path), columns={"teacher": "subject", "id": "id"})


def test_the_column_divides_the_prompts(tmp_path: Path) -> None:
    settings = write(tmp_path / "p.jsonl", ["math", "code", "math"])
    assert rows_by_teacher(settings, ("math", "code")) == {"math": {0, 2}, "code": {1}}


@pytest.mark.parametrize(
    ("teachers", "fields"),
    [
        (["math", "cod"], {"match": "'subject'.*math, code", "line": 2, "prompt": "p1"}),
        (["math", None, "code"], {"match": "null", "line": 2, "prompt": "p1"}),
        (["math", 3, "code"], {"match": "teacher 3", "line": 2, "prompt": "p1"}),
        (["math", ["code"]], {"line": 2, "prompt": "p1"}),
        (["math", "math"], {"setting": "teachers.code"}),
    ],
)
def test_prompts_of_unknown_teachers_are_named(tmp_path: Path, teachers: list[Any], fields: dict[str, Any]) -> None:
    with raises(InputError, file="p.jsonl", **fields):
        rows_by_teacher(write(tmp_path / "p.jsonl", teachers), ("math", "code"))
