"""Attribution in a plan: a job for each query set, what its keys depend on, refusals before work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eopd.pipeline.checks import check_stages, require_stages
from eopd.pipeline.config import ConfigError, parse_settings
from eopd.pipeline.doctor_inputs import check_inputs
from eopd.pipeline.prompt_check import sources_of
from eopd.stages.experiment import BenchmarkFacts, Facts
from eopd.storage.errors import InputError
from tests.pipeline.plan_case import RAW, make_facts, make_run, make_settings, plan_of
from tests.raises import raises

QUERIES = {"a": {"benchmark": "b"}, "c": {"benchmark": "b", "samples": "wrong"}}
ATTRIBUTE: dict[str, Any] = {"documents": {"path": "d.jsonl", "bins": ["topic"]}, "queries": QUERIES}
FROM_ROLLOUTS: dict[str, Any] = {"rollouts": {"round": 0, "bins": ["topic"]}, "queries": QUERIES}


def facts(documents: str = "documents", **changes: Any) -> Facts:
    return replace(make_facts(**changes), documents=BenchmarkFacts("documents", 40, documents))


def keys(attribute: dict[str, Any] | None, given: Facts | None = None, **changes: Any) -> dict[str, str]:
    settings = (
        make_settings(rounds=1, **changes)
        if attribute is None
        else make_settings(rounds=1, attribute=attribute, **changes)
    )
    return {job.name: job.output.key for job in plan_of(settings, given or facts()).jobs}


ALL = {"attribute 1 (a)", "attribute 1 (c)", "attribution_summary 1"}


def test_each_query_set_is_an_artifact_and_no_other_key_moves() -> None:
    plain, with_it = keys(None), keys(ATTRIBUTE)
    assert with_it.keys() - plain.keys() == ALL
    assert plain.items() <= with_it.items()
    assert len(set(with_it.values())) == len(with_it)


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        ({"queries": {**QUERIES, "c": {"benchmark": "b", "samples": "any"}}}, ALL - {"attribute 1 (a)"}),
        ({"projection_dim": 8}, ALL),
        ({"downweight": 10}, ALL),
        ({"statistics": 10}, ALL),
        ({"documents": {**ATTRIBUTE["documents"], "limit": 3}}, ALL),
        ({"documents": {**ATTRIBUTE["documents"], "columns": {"text": "body"}}}, ALL),
        ({"documents": {**ATTRIBUTE["documents"], "bins": ["topic", "format"]}}, {"attribution_summary 1"}),
        ({"contrasts": [["a", "c"]]}, {"attribution_summary 1"}),
        ({"permutations": 100}, {"attribution_summary 1"}),
        ({"documents": {**ATTRIBUTE["documents"], "path": "moved.jsonl"}}, set()),
        ({"token_batch": 64, "cpu_threads": 1, "min_documents": 2}, set()),
    ],
)  # fmt: skip
def test_keys_change_with_what_the_scores_depend_on(change: dict[str, Any], moved: set[str]) -> None:
    before, after = keys(ATTRIBUTE), keys(ATTRIBUTE | change)
    assert {name for name in before if before[name] != after[name]} == moved


def test_keys_change_with_documents_samples_and_student() -> None:
    before = keys(ATTRIBUTE)
    for after in (
        keys(ATTRIBUTE, facts("other documents")),
        keys(ATTRIBUTE, facts(student="s1")),
        keys(ATTRIBUTE, evaluate={"samples": 3}),
        keys(ATTRIBUTE, seed=1),
    ):
        assert {name for name in ALL if before[name] == after[name]} == set()
    prompted = ATTRIBUTE | {"documents": {**ATTRIBUTE["documents"], "columns": {"prompt": "question"}}}
    one, other = keys(prompted), keys(prompted, prompts={"suffix": "!"}, evaluate={"suffix": "", "template": "chat"})
    assert one["attribute 1 (a)"] != other["attribute 1 (a)"]


def test_rollouts_are_documents_of_later_students() -> None:
    plan = plan_of(make_settings(rounds=2, attribute={**FROM_ROLLOUTS, "rounds": [0, "last"]}))
    for round_ in (0, 2):
        job = plan.job("attribute", round_, "a")
        assert job.inputs["rollouts"].identity == plan.job("rollout", 0).output
        assert job.inputs["evaluation"].identity == plan.job("evaluate", round_).output
    assert plan.job("attribution_summary", 2).stage.gpus(make_settings()) == 0
    assert [job.name for job in plan.of_command("attribute", 2)] == [
        "attribute 2 (a)",
        "attribute 2 (c)",
        "attribution_summary 2",
    ]


@pytest.mark.parametrize(
    ("attribute", "setting"),
    [
        ({"queries": QUERIES}, "attribute.documents"),
        ({**ATTRIBUTE, **FROM_ROLLOUTS}, "attribute.documents"),
        ({**ATTRIBUTE, "queries": {"a": {"benchmark": "math"}}}, "attribute.queries.a.benchmark"),
        ({**ATTRIBUTE, "contrasts": [["a", "z"]]}, "attribute.contrasts"),
        ({**ATTRIBUTE, "contrasts": [["a", "a"]]}, "attribute.contrasts"),
        ({**ATTRIBUTE, "rounds": [4]}, "attribute.rounds"),
        ({**ATTRIBUTE, "rounds": [1]}, "attribute.rounds"),
        ({**ATTRIBUTE, "documents": {"path": "d.jsonl", "bins": []}}, "attribute.documents.bins"),
        ({**FROM_ROLLOUTS, "rollouts": {"round": 2, "bins": ["topic"]}, "rounds": [0]}, "attribute.rollouts.round"),
        ({**FROM_ROLLOUTS, "rollouts": {"round": 3, "bins": ["topic"]}}, "attribute.rollouts.round"),
        ({**ATTRIBUTE, "projection_dim": 0}, "attribute.projection_dim"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(attribute: dict[str, Any], setting: str) -> None:
    with raises(ConfigError, setting=setting):
        make_settings(attribute=attribute, evaluate={"every": 2})


def test_attribution_without_evaluation_is_refused() -> None:
    with raises(ConfigError, setting="evaluate"):
        parse_settings({**RAW, "evaluate": None, "attribute": ATTRIBUTE}, "test")


def write(path: Path, topics: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": "x", "topic": topic}) + "\n" for topic in topics))
    return str(path)


def test_documents_are_looked_at_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = write(tmp_path / "d.jsonl", ["a"] * 30 + ["b"] * 3)
    asked = {**ATTRIBUTE, "documents": {"path": path, "bins": ["topic"]}}
    run = make_run(tmp_path, replace(facts(), student=make_facts(folder=tmp_path).student), attribute=asked)
    (warning,) = check_stages(run)
    assert "student 3 was trained on these documents" in warning
    contrasted = make_run(tmp_path, run.facts, attribute={**asked, "contrasts": [["a", "c"]]})
    with raises(ConfigError, "bin b has 3 documents", setting="attribute.contrasts"):
        check_stages(contrasted)
    monkeypatch.setattr("eopd.stages.attribute.settings.bergson_version", lambda: "")
    with raises(InputError, setting="attribute", remedy="[attribution]"):
        require_stages(run, run.plan.of_command("attribute", 3))
    monkeypatch.setattr("eopd.stages.attribute.settings.bergson_version", lambda: "2.6.0")
    with raises(InputError, "2.6.0", setting="attribute"):
        require_stages(run, run.plan.of_command("attribute", 3))
    monkeypatch.setattr("eopd.stages.attribute.settings.bergson_version", lambda: "2.5.1")
    require_stages(run, run.plan.of_command("attribute", 3))


def test_a_student_that_was_trained_on_the_documents_needs_no_warning(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = write(tmp_path / "d.jsonl", ["a", "b"])
    given = replace(facts("prompts"), student=make_facts(folder=tmp_path).student)
    asked = {**ATTRIBUTE, "documents": {"path": path, "bins": ["topic"]}, "rounds": [0, "last"]}
    data = {"columns": {"prompt": "text", "response": "text"}}
    train = {"objective": {"name": "sft"}}
    rollout = {"source": "data", "samples_per_prompt": 1}
    run = make_run(tmp_path, given, attribute=asked, prompts=data, rollout=rollout, train=train)
    assert [line.split(" was ")[0][-9:] for line in check_stages(run)] == ["student 0"]


def test_the_doctor_looks_for_bergson_and_bins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "d.jsonl", ["a", "a", "b"])
    settings = make_settings(attribute={**ATTRIBUTE, "documents": {"path": path, "bins": ["topic"]}})
    monkeypatch.setattr("eopd.stages.attribute.settings.bergson_version", lambda: "")
    findings = {finding.name: finding for finding in check_inputs(settings)}
    assert findings["attribute"].state == "broken"
    assert "[attribution]" in findings["attribute"].remedy
    assert (findings["attribute.bins"].state, findings["attribute.bins"].text) == ("ok", "3 rows in 2 bins by topic")
    assert findings["attribute.documents"].state == "ok"
    assert "attribute.documents" in {source.name for source in sources_of(settings)}


def test_commands_have_resources_of_their_own() -> None:
    launcher = make_settings(launcher={"ray": {"judge": {"cpus": 2.0}}, "slurm": {"route": {"time": "1"}}}).launcher
    assert [launcher.ray.group(name) for name in ("judge", "route", "attribute", "other")] == [
        "judge",
        "route",
        "attribute",
        "resources",
    ]
    assert launcher.ray.of("judge").cpus == 2.0
    assert (launcher.slurm.of("route").time, launcher.slurm.of("attribute").time) == ("1", None)
