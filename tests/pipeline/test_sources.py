"""Plans of runs whose responses the student does not write alone: what is made, shared and refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from eopd.pipeline.config import ConfigError
from eopd.pipeline.plan import Plan
from tests.pipeline.plan_case import make_facts, make_settings, plan_of
from tests.raises import raises


def planned(*, student: str = "s0", teacher: str = "t0", **changes: Any) -> Plan:
    return plan_of(make_settings(evaluate=None, **changes), make_facts(student, teacher))


def stages(plan: Plan) -> list[str]:
    return [job.name for job in plan.jobs]


def key(plan: Plan, stage: str, round_: int = 0) -> str:
    return plan.job(stage, round_).output.key


PREFIX: dict[str, Any] = {"rollout": {"source": "prefix"}, "train": {"objective": {"name": "opd"}}}
TEACHER: dict[str, Any] = {"rollout": {"source": "teacher"}, "train": {"objective": {"name": "fkl"}}}
DATA: dict[str, Any] = {
    "rollout": {"source": "data", "samples_per_prompt": 1},
    "train": {"objective": {"name": "sft"}},
    "prompts": {"columns": {"response": "solution"}},
}


def test_prefixes_are_of_a_guide_and_the_last_round_is_on_policy() -> None:
    plan = planned(**PREFIX)
    assert [name for name in stages(plan) if "guide" in name or "rollout" in name] == [
        "guide 0",
        "rollout 0",
        "guide 1",
        "rollout 1",
        "rollout 2",
    ]
    assert plan.job("guide", 0).inputs == {}  # all guides can be sampled at once
    assert plan.job("rollout", 0).inputs["guide"].by_part
    assert plan.job("rollout", 2).inputs.keys() == {"policy"}  # no guide: the student writes all of it
    assert "prefix" not in plan.job("rollout", 2).output.settings


def test_one_guide_serves_every_schedule_objective_and_student() -> None:
    guide = key(planned(**PREFIX), "guide")
    shorter = {**PREFIX, "rollout": {"source": "prefix", "prefix": {"start": 100, "length": "uniform"}}}
    assert key(planned(**shorter), "guide") == guide
    assert key(planned(**{**PREFIX, "train": {"objective": {"name": "tropd"}}}), "guide") == guide
    assert key(planned(student="s1", **PREFIX), "guide") == guide
    assert key(planned(**TEACHER), "rollout") == guide  # its own responses alone are the same
    assert key(planned(teacher="t1", **PREFIX), "guide") != guide
    hotter = {**PREFIX, "rollout": {"source": "prefix", "guide": {"temperature": 0.5}}}
    assert key(planned(**hotter), "guide") != guide
    plan, other = planned(**PREFIX), planned(**shorter)
    assert key(plan, "rollout") != key(other, "rollout")


def test_the_teacher_s_responses_and_data_are_the_same_for_every_student() -> None:
    for changes in (TEACHER, DATA):
        one, two = planned(student="s0", **changes), planned(student="s1", **changes)
        assert key(one, "rollout") == key(two, "rollout")
        assert key(one, "train") != key(two, "train")
        assert key(one, "rollout", 0) != key(one, "rollout", 1)


def test_data_is_scored_only_for_who_reads_scores() -> None:
    assert not any("score" in name for name in stages(planned(**DATA)))
    assert "scores" not in planned(**DATA).job("train", 0).inputs
    scored = planned(**{**DATA, "train": {"objective": {"name": "jsd"}}})
    assert "score 0" in stages(scored)
    assert key(scored, "rollout") == key(planned(**DATA), "rollout")
    assert "score 0" in stages(planned(train={"objective": {"name": "sft"}}))  # the report shows the student's rollouts


def test_the_weight_of_prefixes_is_in_the_key_where_there_are_any() -> None:
    def trained(**objective: Any) -> str:
        return key(planned(**{**PREFIX, "train": {"objective": objective}}), "train")

    assert trained(name="opd") == trained(name="opd", prefix_beta=0.001)
    assert trained(name="opd") != trained(name="opd", prefix_beta=0.01)
    assert key(planned(train={"objective": {"name": "opd"}}), "rollout") != key(planned(**PREFIX), "rollout")


JUDGED: dict[str, Any] = {"prompts": {"verifier": "exact", "columns": {"answer": "answer"}}}


def until_right(most: int = 3, **rollout: Any) -> dict[str, Any]:
    select = {"objective": {"name": "sft"}, "select": {"verdict": "right"}}
    return {**JUDGED, "rollout": {**rollout, "attempts": {"until": "right", "most": most}}, "train": select}


def test_rollouts_that_carry_verdicts_need_no_judge() -> None:
    plan = planned(**until_right())
    assert not any("judge" in name for name in stages(plan))
    assert "verdicts" not in plan.job("train", 0).inputs
    judged = planned(**{**until_right(), "rollout": {}})
    assert "judge 0" in stages(judged)
    keys = {
        key(one, "rollout")
        for one in (
            judged,
            plan,
            planned(**until_right(4)),
            planned(**until_right(), judge={"seconds_per_answer": 3.0}),
            planned(**{**until_right(), "prompts": {**JUDGED["prompts"], "verifier": "math"}}),
        )
    }
    assert len(keys) == 5
    assert key(planned(**{**until_right(), "rollout": {"attempts": None}}), "rollout") == key(judged, "rollout")


def test_a_guide_does_not_depend_on_attempts_and_the_teacher_s_responses_do() -> None:
    prefix, teacher = ({**until_right(source=source)} for source in ("prefix", "teacher"))
    once = {**prefix, "rollout": {"source": "prefix"}}
    assert key(planned(**prefix), "guide") == key(planned(**once), "guide")
    assert key(planned(**prefix), "rollout") != key(planned(**once), "rollout")
    assert key(planned(**teacher), "rollout") != key(planned(**prefix), "guide")


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({**until_right(), "prompts": {"verifier": "exact"}}, "prompts.columns.answer"),
        ({**until_right(), "prompts": {"columns": {"answer": "a"}}}, "prompts.verifier"),
        (until_right(top_k=1), "rollout.attempts.most"),
        (until_right(min_p=1.0), "rollout.attempts.most"),
        (until_right(0), "rollout.attempts.most"),
        ({**DATA, "rollout": {**DATA["rollout"], "attempts": {"most": 2}}}, "rollout.attempts"),
    ],
)
def test_attempts_that_could_not_differ_or_be_judged_are_refused(changes: dict[str, Any], setting: str) -> None:
    with raises(ConfigError, setting=setting):
        make_settings(**changes)


def mixed(share: float = 0.5, **rollout: Any) -> dict[str, Any]:
    settings = {"student_share": share, "expert": {"suffix": "{{solution}}"}, **rollout.pop("mixed", {})}
    return {
        "prompts": {"columns": {"solution": "worked"}},
        "rollout": {"source": "mixed", "mixed": settings, **rollout},
        "train": {"objective": {"name": "sft"}},
    }


def test_mixed_responses_are_of_the_policy_its_coins_and_the_expert_prompt() -> None:
    plan = planned(**mixed())
    assert not any("score" in name for name in stages(plan))
    assert plan.job("rollout", 1).inputs.keys() == {"policy"}
    keys = [
        key(planned(**changes), "rollout")
        for changes in (
            mixed(),
            mixed(0.25),
            mixed(mixed={"temperature": 0.0}),
            mixed(mixed={"expert": {"suffix": "{{ solution }}"}}),
            {**mixed(), "prompts": {"columns": {"solution": "other"}}},
            {"train": mixed()["train"]},
        )
    ]
    assert len(set(keys)) == len(keys)
    assert key(planned(student="s1", **mixed()), "rollout") != keys[0]
    fkl = {**mixed(), "train": {"objective": {"name": "fkl"}}}
    assert "score 0" in stages(planned(**fkl))
    assert key(planned(**fkl), "rollout") == keys[0]


def test_the_first_student_samples_throughout() -> None:
    plan = planned(**mixed(), refresh=0)
    assert all(plan.job("rollout", round_).inputs == {} for round_ in range(3))
    assert plan.job("train", 1).inputs.keys() == {"rollouts", "policy"}


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        (mixed(1.5), "rollout.mixed.student_share"),
        (mixed(engine="vllm"), "rollout.engine"),
        (mixed(mixed={"temperature": 0.001}), "rollout.mixed.temperature"),
        (mixed(mixed={"temperature": 0.0}, top_p=0.9), "rollout.mixed.temperature"),
        (mixed(mixed={"expert": {}}), "rollout.mixed.expert"),
        (mixed(mixed={"expert": {"suffix": "{{response}}"}}), "rollout.mixed.expert.suffix"),
        (mixed(mixed={"expert": {"system": "{{solutoin}}"}}), "rollout.mixed.expert.system"),
        ({**mixed(), "prompts": {}}, "prompts.columns.solution"),
        ({**mixed(mixed={"expert": {"system": "x"}}), "prompts": {"template": "plain"}}, "rollout.mixed.expert.system"),
        ({**mixed(), "rollout": {"mixed": {"student_share": 0.1}}}, "rollout.mixed"),
        ({**mixed(), "train": {"objective": {"name": "opd"}}}, "train.objective.name"),
        *(
            (
                {
                    **mixed(share, mixed={"temperature": 0.0}, attempts={"most": 10}),
                    "prompts": {"verifier": "exact", "columns": {"solution": "worked", "answer": "a"}},
                },
                "rollout.attempts.most",
            )
            for share in (0.0, 1.0)
        ),
    ],
)
def test_mixtures_that_could_not_work_are_refused(changes: dict[str, Any], setting: str) -> None:
    with raises(ConfigError, setting=setting):
        make_settings(**changes)


def revise(**changes: Any) -> dict[str, Any]:
    rollout = {"source": "revise", "revise": {"phrases": {"wrong": "No."}, **changes.pop("revise", {})}}
    train = {"objective": {"name": "sft"}, "select": {"verdict": "right"}, **changes.pop("train", {})}
    return {**JUDGED, "rollout": {**rollout, **changes.pop("rollout", {})}, "train": train, **changes}


def test_both_phases_of_revision_share_their_rollouts() -> None:
    one, two = (planned(**revise(train={"tokens": tokens})) for tokens in ("all", "after_text"))
    assert not any("judge" in name or "score" in name for name in stages(one))
    assert key(one, "rollout") == key(two, "rollout")
    keys = {key(one, "train"), key(two, "train"), key(planned(**revise()), "train")}
    assert len(keys) == 3
    assert key(planned(**revise(train={"tokens": "own"})), "train") == key(planned(**revise()), "train")
    others = (
        revise(revise={"phrases": {"wrong": "Wrong."}}),
        revise(revise={"first_tokens": 100}),
        revise(revise={"when": "always", "phrases": {"wrong": "No.", "right": "Yes."}}),
        {**revise(), "rollout": {}},
    )
    assert len({key(planned(**changes), "rollout") for changes in (revise(), *others)}) == 5
    on_policy = planned(**revise(train={"objective": {"name": "opd"}}))
    assert "score 0" in stages(on_policy)


@pytest.mark.parametrize("tokens", ["all", "own"])
def test_tokens_enter_keys_where_they_differ_from_those_of_the_source(tokens: str) -> None:
    def trained(**changes: Any) -> str:
        return key(planned(**changes), "train")

    def with_tokens(changes: dict[str, Any], objective: str) -> dict[str, Any]:
        return {**changes, "train": {"objective": {"name": objective}, "tokens": tokens}}

    student = {"train": {"objective": {"name": "opd"}}}
    assert trained(**with_tokens(student, "opd")) == trained(**student)
    prefix = {**PREFIX, "train": {"objective": {"name": "fkl"}}}
    assert (trained(**with_tokens(prefix, "fkl")) == trained(**prefix)) == (tokens == "own")
    assert (trained(**with_tokens(mixed(), "sft")) == trained(**mixed())) == (tokens == "all")


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        (revise(revise={"phrases": {}}), "rollout.revise.phrases.wrong"),
        (revise(revise={"when": "always"}), "rollout.revise.phrases.right"),
        (revise(revise={"phrases": {"wrong": "No.", "right": "Yes."}}), "rollout.revise.phrases.right"),
        (revise(revise={"first_tokens": 2000}), "rollout.revise.first_tokens"),
        ({**revise(), "rollout": {"revise": {"first_tokens": 3}}}, "rollout.revise"),
        (revise(prompts={"columns": {"answer": "a"}}), "prompts.verifier"),
        (revise(prompts={"verifier": "exact"}), "prompts.columns.answer"),
        (revise(train={"tokens": "all", "objective": {"name": "opd"}}), "train.tokens"),
        ({**PREFIX, "train": {"tokens": "all", "objective": {"name": "tropd"}}}, "train.tokens"),
        ({"train": {"tokens": "after_text"}}, "train.tokens"),
        ({**DATA, "train": {"objective": {"name": "sft"}, "tokens": "own"}}, "train.tokens"),
        (
            {**PREFIX, "train": {"tokens": "all", "objective": {"name": "fkl", "prefix_beta": 0.5}}},
            "train.objective.prefix_beta",
        ),
    ],
)
def test_revisions_and_tokens_that_could_not_work_are_refused(changes: dict[str, Any], setting: str) -> None:
    with raises(ConfigError, setting=setting):
        make_settings(**changes)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"rollout": {"source": "nobody"}}, "rollout.source"),
        ({**DATA, "prompts": {}}, "prompts.columns.response"),
        ({**DATA, "rollout": {"source": "data"}}, "rollout.samples_per_prompt"),
        ({**DATA, "train": {"objective": {"name": "opd"}}}, "train.objective.name"),
        ({**TEACHER, "train": {"objective": {"name": "eopd"}}}, "train.objective.name"),
        ({**TEACHER, "train": {"objective": {"name": "reopold"}}}, "train.objective.name"),
        ({**TEACHER, "rollout": {"source": "teacher", "student_topk": 4}}, "rollout.student_topk"),
        ({**TEACHER, "train": {**TEACHER["train"], "max_staleness": 0.1}}, "train.max_staleness"),
        ({**DATA, "train": {**DATA["train"], "staleness": {"max_kl": 0.1}}}, "train.staleness"),
        ({"rollout": {"guide": {"samples": 2}}}, "rollout.guide"),
        ({"rollout": {"prefix": {"end": 2}}}, "rollout.prefix"),
        ({"train": {"objective": {"name": "tropd", "prefix_beta": 0.5}}}, "train.objective.prefix_beta"),
        ({**PREFIX, "rounds": 1}, "rollout.prefix.over"),
        ({**PREFIX, "rollout": {"source": "prefix", "prefix": {"start": 2000}}}, "rollout.prefix.start"),
        ({**PREFIX, "rollout": {"source": "prefix", "prefix": {"start": 5, "end": 5}}}, "rollout.prefix.start"),
        (
            {**TEACHER, "score": {"teacher_prompt": {"kind": "same", "opening": "{{response}}"}}},
            "score.teacher_prompt",
        ),
    ],
)
def test_what_could_not_work_is_refused(changes: dict[str, Any], setting: str) -> None:
    with raises(ConfigError, setting=setting):
        make_settings(**changes)


@pytest.mark.parametrize("objective", [{"name": "opd", "rkl": "topk"}, {"name": "eopd", "rkl": "topk"}, "rs_kd"])
def test_divergences_take_responses_of_anybody(objective: object) -> None:
    assert make_settings(**{**TEACHER, "train": {"objective": objective}}).rollout.source == "teacher"


CAPTURE: dict[str, Any] = {**DATA, "teacher": {"path": None, "capture": "kd.parquet"}, "evaluate": None}


def test_a_capture_is_scored_without_a_teacher() -> None:
    settings = make_settings(**{**CAPTURE, "train": {"objective": {"name": "fkl"}}})
    facts = make_facts()
    plan = plan_of(settings, replace(facts, teacher=replace(facts.student, fingerprint="capture")))
    job = plan.job("score", 0)
    assert job.inputs.keys() == {"rollouts"}
    assert job.stage.gpus(settings) == 0
    assert "teacher" not in job.output.inputs
    assert "scores" in plan.job("train", 0).inputs
    other = plan_of(settings, replace(facts, teacher=replace(facts.student, fingerprint="another")))
    assert other.job("score", 0).output.key != job.output.key
    assert other.job("rollout", 0).output.key == plan.job("rollout", 0).output.key


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"rollout": {"source": "student"}}, "rollout.source"),
        ({"teacher": {"path": "t", "capture": "kd.parquet"}}, "teacher"),
        ({"teacher": {"path": None, "capture": {}}}, "teacher.capture.path"),
        ({"teacher": {"path": None, "capture": "kd.parquet", "dtype": "float32"}}, "teacher.dtype"),
        ({"score": {"head": {"k_max": 8}}}, "score.head"),
        ({"score": {"teacher_prompt": {"kind": "template"}}}, "score.teacher_prompt"),
        ({"evaluate": {"benchmarks": [{"name": "b", "path": "b.jsonl"}], "alignment": {}}}, "evaluate.alignment"),
    ],
)
def test_what_a_capture_does_not_hold_is_refused(changes: dict[str, Any], setting: str) -> None:
    with raises(ConfigError, setting=setting):
        make_settings(**{**CAPTURE, **changes})
