"""The plan: keys follow meaning, jobs come in order, and nothing is read or written."""

from __future__ import annotations

from dataclasses import replace

import pytest

from eopd.pipeline.config import ConfigError, RunSettings
from eopd.pipeline.errors import RunError
from eopd.pipeline.plan import Plan
from eopd.stages.experiment import Experiment
from eopd.stages.rollout.stage import drawn_rows
from eopd.stages.verifiers.registry import RULES
from tests.pipeline.plan_case import make_facts as facts
from tests.pipeline.plan_case import make_settings as settings
from tests.pipeline.plan_case import plan_of
from tests.raises import raises


def keys(plan: Plan, stage: str) -> list[str]:
    return [job.output.key for job in plan.jobs if job.stage.name == stage]


BASE = plan_of(settings(), facts())


def drawn(plan_settings: RunSettings, round_: int, prompts: int = 25) -> list[list[int]]:
    return drawn_rows(Experiment(plan_settings, facts(prompts=prompts)), round_)


def test_jobs_come_after_what_they_read() -> None:
    done: set[str] = set()
    for job in BASE.jobs:
        assert all(input_.identity.key in done for input_ in job.inputs.values()), job.name
        done.add(job.output.key)
    assert [job.name for job in BASE.jobs[:7]] == [
        "evaluate 0",
        "evaluation_summary 0",
        "rollout 0",
        "score 0",
        "train 0",
        "evaluate 1",
        "evaluation_summary 1",
    ]
    assert len(BASE.jobs) == 3 * 5 + 2


def test_parts() -> None:
    assert [len(part) for part in drawn(settings(), 0)] == [4, 4, 2]
    assert BASE.job("score", 0).output.parts == 3
    assert BASE.job("evaluate", 0).output.parts == 3
    assert BASE.job("evaluation_summary", 0).output.parts == 1
    assert Experiment(settings(), facts()).most_steps(0) == 2 * 3


def test_no_prompt_twice_in_an_epoch() -> None:
    rows = [i for round_ in range(3) for part in drawn(settings(), round_) for i in part]
    assert sorted(rows[:25]) == list(range(25))
    assert all(0 <= i < 25 for i in rows)


def test_a_small_source_bounds_a_round() -> None:
    assert sorted(i for part in drawn(settings(), 1, prompts=6) for i in part) == list(range(6))


@pytest.mark.parametrize(
    ("changes", "other_facts", "changed"),
    [
        ({"seed": 1}, {}, {"rollout", "score", "train", "evaluate"}),
        ({"name": "y", "store": "z", "launcher": {"kind": "inline"}}, {}, set()),
        ({"rollout": {"temperature": 0.7}}, {}, {"rollout", "score", "train"}),
        ({"rollout": {"engine": "transformers"}, "score": {"batch_tokens": 99}}, {}, set()),
        ({"score": {"head": {"k_max": 64}}}, {}, {"score", "train"}),
        ({"score": {"teacher_prompt": "template"}}, {}, {"score", "train"}),
        ({"train": {"objective": {"tau": 0.4}}}, {}, {"train"}),
        ({"train": {"micro_batch_tokens": 99, "device": "cpu"}}, {}, set()),
        ({"train": {"optimizer": {"schedule": "constant"}}, "rounds": 3}, {}, {"train"}),
        ({"evaluate": {"samples": 4}}, {}, {"evaluate"}),
        ({}, {"teacher": "t1"}, {"score", "train"}),
        ({}, {"student": "s1"}, {"rollout", "score", "train", "evaluate"}),
    ],
)
def test_first_round_keys_follow_meaning(
    changes: dict[str, object], other_facts: dict[str, str], changed: set[str]
) -> None:
    other = plan_of(settings(**changes), facts(**other_facts))
    stages = ("rollout", "score", "train", "evaluate")
    result = {stage for stage in stages if keys(BASE, stage)[0] != keys(other, stage)[0]}
    assert result == changed


VERIFIED = {"path": "p.jsonl", "verifier": "countdown", "columns": {"answer": "answer"}}


def test_verdicts_are_planned_only_if_they_are_read() -> None:
    plain = plan_of(settings(prompts=VERIFIED), facts())
    first = plan_of(settings(prompts=VERIFIED, train={"select": {"per_prompt": "first"}}), facts())
    right = plan_of(settings(prompts=VERIFIED, train={"select": {"verdict": "right"}}), facts())
    assert keys(plain, "judge") == keys(first, "judge") == []
    assert len(keys(right, "judge")) == 3
    assert keys(right, "rollout")[0] == keys(plain, "rollout")[0]
    assert keys(right, "score")[0] == keys(plain, "score")[0]
    assert len({keys(plan, "train")[0] for plan in (plain, first, right)}) == 3
    judge, train = right.job("judge", 0), right.job("train", 0)
    assert judge.inputs["rollouts"].by_part
    assert judge.output.parts == right.job("rollout", 0).output.parts
    assert train.inputs["verdicts"].identity == judge.output
    assert "verdicts" not in first.job("train", 0).inputs
    with pytest.raises(RunError, match=r"no judge job.*train\.select\.verdict"):
        plain.of_command("judge", 0)


def test_a_selection_of_everything_moves_no_key() -> None:
    other = plan_of(settings(train={"select": {"verdict": "any", "per_prompt": "all", "where": {}}}), facts())
    assert [job.key for job in other.jobs] == [job.key for job in BASE.jobs]


def test_verdicts_are_shared_by_experiments_that_train_differently() -> None:
    def judged(**changes: object) -> Plan:
        train = {"select": {"verdict": "right"}, **changes.pop("train", {})}  # type: ignore[dict-item]
        return plan_of(settings(prompts=VERIFIED, train=train, **changes), facts())

    key = keys(judged(), "judge")[0]
    assert keys(judged(train={"select": {"verdict": "wrong"}}), "judge")[0] == key
    assert keys(judged(train={"objective": {"name": "sft"}}), "judge")[0] == key
    assert keys(judged(judge={"verifier_workers": 7}), "judge")[0] == key
    assert keys(judged(judge={"seconds_per_answer": 3}), "judge")[0] != key
    assert keys(judged(rollout={"temperature": 0.7}), "judge")[0] != key


def test_the_rules_of_the_verifier_are_in_the_key_of_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(prompts=VERIFIED, train={"select": {"verdict": "right"}})
    key = keys(plan_of(chosen, facts()), "judge")[0]
    monkeypatch.setitem(RULES, "math", 1000)
    assert keys(plan_of(chosen, facts()), "judge")[0] == key
    monkeypatch.setitem(RULES, "countdown", 1000)
    assert keys(plan_of(chosen, facts()), "judge")[0] != key


def test_the_schedule_of_a_selection_spans_rounds() -> None:
    """How many steps a round takes follows from what it selects, which the other inputs of the key decide."""
    selects: dict[str, object] = {"select": {"per_prompt": 1}}
    short, long = (plan_of(settings(train=selects, rounds=n), facts()) for n in (2, 5))
    assert keys(short, "train")[0] != keys(long, "train")[0]
    anew = {**selects, "optimizer": {"carry_over": False}}
    short, long = (plan_of(settings(train=anew, rounds=n), facts()) for n in (2, 5))
    assert keys(short, "train") == keys(long, "train")[:2]


def test_the_most_that_a_selection_leaves() -> None:
    """Of 25 prompts a round draws 10, with two responses each and batches of 8, twice over."""
    half = replace(facts(), selected_prompts=frozenset(range(0, 25, 2)))
    drawn_of_half = [sum(row % 2 == 0 for part in drawn(settings(), round_) for row in part) for round_ in range(3)]
    everything = Experiment(settings(), facts())
    assert [everything.most_responses(round_) for round_ in range(3)] == [20, 20, 20]
    where = Experiment(settings(train={"select": {"where": {"a": [1]}}}), half)
    assert [where.most_responses(round_) for round_ in range(3)] == [2 * count for count in drawn_of_half]
    first = Experiment(settings(train={"select": {"per_prompt": "first"}}), facts())
    assert (first.most_responses(0), first.most_steps(0), first.most_epochs(0)) == (10, 2 * 2, 1.0)


@pytest.mark.parametrize(
    ("prompts", "setting"),
    [
        ({"columns": {"answer": "answer"}}, "prompts.verifier"),
        ({"verifier": "exact"}, "prompts.columns.answer"),
    ],
)
def test_verdicts_need_a_verifier_and_answers(prompts: dict[str, object], setting: str) -> None:
    with raises(ConfigError, setting=setting):
        settings(prompts=prompts, train={"select": {"verdict": "right"}})


def test_a_later_round_depends_on_training() -> None:
    other = plan_of(settings(train={"objective": {"tau": 0.4}}), facts())
    assert keys(BASE, "rollout")[0] == keys(other, "rollout")[0]
    assert keys(BASE, "rollout")[1] != keys(other, "rollout")[1]


def test_a_coverage_is_a_sibling_of_the_same_identity() -> None:
    wide = plan_of(settings(score={"head": {"k_max": 64}}), facts())
    ours, theirs = BASE.job("score", 0).output, wide.job("score", 0).output
    assert ours.base_key == theirs.base_key
    assert ours.key != theirs.key


def test_more_rounds_of_a_constant_rate_begin_with_the_same_ones() -> None:
    constant = {"optimizer": {"schedule": "constant"}}
    short, long = (plan_of(settings(train=constant, rounds=n), facts()) for n in (2, 5))
    assert keys(short, "train") == keys(long, "train")[:2]


@pytest.mark.parametrize(
    ("schedule", "sampled"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"lag": 1}, [0, 0, 1, 2, 3, 4]),
        ({"refresh": 2}, [0, 0, 2, 2, 4, 4]),
        ({"refresh": 3, "lag": 2}, [0, 0, 0, 1, 1, 1]),
        ({"refresh": 6}, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_which_policy_samples(schedule: dict[str, object], sampled: list[int]) -> None:
    plan = plan_of(settings(rounds=6, **schedule), facts())
    for round_, policy in enumerate(sampled):
        rollout = plan.job("rollout", round_)
        expected = "s0" if policy == 0 else plan.job("train", policy - 1).output.key
        assert rollout.output.inputs["policy"] == expected
        read = [input_.identity for input_ in rollout.inputs.values()]
        assert read == ([] if policy == 0 else [plan.job("train", policy - 1).output])
        # training itself always goes on from the newest student
        newest = "s0" if round_ == 0 else plan.job("train", round_ - 1).output.key
        assert plan.job("train", round_).output.inputs["student"] == newest


def test_a_late_policy_leaves_rollouts_free_of_the_training_before() -> None:
    plan = plan_of(settings(rounds=3, lag=1), facts())
    (policy,) = plan.job("rollout", 2).inputs.values()
    assert policy.identity == plan.job("train", 0).output


def test_rollouts_of_one_policy_in_several_rounds_are_different_ones() -> None:
    plan = plan_of(settings(rounds=3, refresh=3), facts())
    assert len(set(keys(plan, "rollout"))) == 3


@pytest.mark.parametrize(("prompts", "per_round", "rounds"), [(25, 10, 8), (7, 3, 21), (6, 6, 4), (100, 33, 10)])
def test_epochs_over_the_prompts(prompts: int, per_round: int, rounds: int) -> None:
    """Across every epoch's end: each epoch holds every prompt once, in an order of its own."""
    planned = settings(rounds=rounds, rollout={"prompts_per_round": per_round, "rows_per_part": 4})
    deck = [i for r in range(rounds) for part in drawn(planned, r, prompts) for i in part]
    assert len(deck) == rounds * per_round
    epochs = [tuple(deck[start : start + prompts]) for start in range(0, len(deck), prompts)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch)
    whole = [epoch for epoch in epochs if len(epoch) == prompts]
    assert len(set(whole)) == len(whole) > 1


def test_swapped_stops_are_those_of_a_checkpoint_alone() -> None:
    """The same union, told apart by which id is whose main one: that matters to training under ``remap`` only."""
    plain = facts()
    student, teacher = plain.student, plain.teacher
    swapped = replace(plain, teacher=replace(teacher, stop_ids=(2, 5)))
    other = replace(plain, teacher=replace(teacher, stop_ids=(5, 2)), student=replace(student, stop_ids=(2,)))
    for stops, changed in (("class", []), ("remap", ["train"])):
        run = settings(rounds=1, train={"objective": {"stops": stops}})
        one, two = plan_of(run, swapped), plan_of(run, other)
        stages = ("rollout", "score", "train")
        assert [stage for stage in stages if keys(one, stage) != keys(two, stage)] == changed


def test_an_unknown_round_is_refused() -> None:
    with pytest.raises(RunError, match=r"no train job of round 7; its rounds are \[0, 1, 2\]"):
        BASE.job("train", 7)


@pytest.mark.parametrize(
    ("every", "rounds", "measured"),
    [(1, 3, [0, 1, 2, 3]), (2, 6, [0, 2, 4, 6]), (2, 5, [0, 2, 4, 5]), (25, 60, [0, 25, 50, 60]), (100, 3, [0, 3])],
)
def test_students_are_measured_now_and_then_the_first_and_the_last_always(
    every: int, rounds: int, measured: list[int]
) -> None:
    asked = {"alignment": {"responses": ["own", "first"]}}
    seldom, always = (
        plan_of(settings(rounds=rounds, evaluate={**asked, "every": number}), facts()) for number in (every, 1)
    )
    for stage in ("evaluate", "align"):
        rounds_of = [job.round for job in seldom.jobs if job.stage.name == stage]
        assert rounds_of == measured
        for round_ in measured:
            assert seldom.job(stage, round_).output.key == always.job(stage, round_).output.key
    assert keys(seldom, "train") == keys(always, "train")


def test_alignment_comes_beside_evaluations_and_changes_none_of_their_keys() -> None:
    asked = settings(evaluate={"alignment": {"responses": ["own", "first"]}})
    plan = plan_of(asked, facts())
    assert [job.output.key for job in plan.jobs if job.stage.command != "align"] == [
        job.output.key for job in BASE.jobs
    ]
    last = plan.job("align", 3)
    assert {role: input_.identity for role, input_ in last.inputs.items()} == {
        "own": plan.job("evaluate", 3).output,
        "first": plan.job("evaluate", 0).output,
        "policy": plan.job("train", 2).output,
    }
    assert last.output.parts == 2 * 3
    assert plan.job("alignment_summary", 3).inputs["alignments"].identity == last.output
    assert len(set(keys(plan, "align"))) == 4
    done: set[str] = set()
    for job in plan.jobs:
        assert all(input_.identity.key in done for input_ in job.inputs.values()), job.name
        done.add(job.output.key)
    other = plan_of(asked, facts(teacher="t1"))
    assert other.job("evaluate", 0).output.key == plan.job("evaluate", 0).output.key
    assert other.job("align", 0).output.key != plan.job("align", 0).output.key
    context = plan_of(
        settings(evaluate={"alignment": {"responses": ["own", "first"]}}, score={"teacher_prompt": "template"}), facts()
    )
    assert context.job("align", 0).output.key != plan.job("align", 0).output.key
