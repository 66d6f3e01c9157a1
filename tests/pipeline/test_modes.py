"""Modes and routing in a plan: evaluations of their own, keys of all others unmoved, refusals before work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eopd.pipeline.checks import check_calibration
from eopd.pipeline.config import ConfigError
from eopd.pipeline.prompt_check import sources_of
from eopd.stages.route.settings import STANDARD
from eopd.storage.files import canonical_json
from tests.pipeline.plan_case import make_run, make_settings, plan_of
from tests.raises import raises

MODES: dict[str, Any] = {"modes": {"direct": {"suffix": "Answer at once."}, "cot": {"suffix": "Think first."}}}
ROUTED: dict[str, Any] = {**MODES, "temperature": 0.0, "samples": 1, "route": {"calibration": 5}}


def test_each_mode_is_an_evaluation_with_a_summary() -> None:
    plan = plan_of(make_settings(rounds=1, evaluate=MODES))
    names = [job.name for job in plan.jobs if job.round == 0 and job.stage.command == "evaluate"]
    assert names == [
        *("evaluate 0", "evaluate 0 (direct)", "evaluate 0 (cot)"),
        *("evaluation_summary 0", "evaluation_summary 0 (direct)", "evaluation_summary 0 (cot)"),
    ]
    summary = plan.job("evaluation_summary", 1, "cot")
    assert summary.inputs["evaluation"].identity == plan.job("evaluate", 1, "cot").output
    assert plan.job("evaluate", 0, "cot").log_stem == "evaluate-0.cot"
    assert len({job.output.key for job in plan.jobs}) == len(plan.jobs)


def test_modes_and_routing_move_no_other_key() -> None:
    plain = plan_of(make_settings(evaluate={"temperature": 0.0, "samples": 1}))
    routed = plan_of(make_settings(evaluate=ROUTED))
    of_name = {job.name: job.output.key for job in routed.jobs}
    assert {job.name: job.output.key for job in plain.jobs}.items() <= of_name.items()
    stated = plan_of(make_settings(evaluate={"temperature": 0.0, "samples": 1, "suffix": "Think first."}))
    assert stated.job("evaluate", 0).output.key == of_name["evaluate 0 (cot)"]
    explicit = plan_of(make_settings(evaluate={**ROUTED, "modes": {**MODES["modes"], STANDARD: {}}}))
    assert {job.name: job.output.key for job in explicit.jobs} == of_name


@pytest.mark.parametrize(
    ("route", "moved"),
    [({"tokens": 8}, {"entropies", "route"}), ({"calibration": 4}, {"route"}), ({"rule": {"trend": 0.5}}, {"route"})],
)
def test_settings_of_routing_are_in_its_keys(route: dict[str, Any], moved: set[str]) -> None:
    before = plan_of(make_settings(evaluate=ROUTED))
    after = plan_of(make_settings(evaluate={**ROUTED, "route": {"calibration": 5, **route}}))
    pairs = zip(before.jobs, after.jobs, strict=True)
    assert {job.stage.name for job, other in pairs if job.output.key != other.output.key} == moved


def test_routing_reads_every_mode_and_needs_no_gpu() -> None:
    settings = make_settings(rounds=1, evaluate=ROUTED)
    plan = plan_of(settings)
    job = plan.job("route", 1)
    evaluations = {f"evaluation {mode}": "" if mode == STANDARD else mode for mode in ("standard", "direct", "cot")}
    assert job.inputs.keys() == {"entropies", *evaluations}
    for role, variant in evaluations.items():
        assert job.inputs[role].identity == plan.job("evaluate", 1, variant).output
    assert job.stage.gpus(settings) == 0
    assert plan.job("entropies", 1).inputs["evaluation"].by_part
    assert [job.stage.name for job in plan.of_command("route", 0)] == ["entropies", "route"]


def test_the_prompts_of_every_mode_are_tried_before_work() -> None:
    shown = {source.name: source.prompts.suffix for source in sources_of(make_settings(evaluate=MODES))}
    assert {suffix for name, suffix in shown.items() if "evaluate.modes" in name} == {"Answer at once.", "Think first."}


def test_a_calibration_on_half_of_the_problems_is_refused_before_work(tmp_path: Path) -> None:
    run = make_run(tmp_path, evaluate={**ROUTED, "route": {"calibration": 6}})
    with raises(ConfigError, "11 problems", setting="evaluate.route.calibration"):
        check_calibration(run)


def test_modes_are_not_in_the_keyed_settings() -> None:
    assert "direct" not in canonical_json(make_settings(evaluate=ROUTED).semantic())
