"""What `eopd plan` says of a store: states, who made what, tokens, bytes, time, disk; on real markers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eopd.pipeline.budget import refuse_too_large
from eopd.pipeline.estimate import KEEP_ALL
from eopd.pipeline.forecast import peak_disk
from eopd.pipeline.overview import Overview, look
from eopd.pipeline.plan import make_plan
from eopd.pipeline.plan_table import make_console, plan_table
from eopd.pipeline.runner import Runner
from eopd.pipeline.survey import Found, read_makers, survey
from tests.pipeline.plan_case import commit, make_facts, make_runner, make_settings, note_job

PARAMETERS = 1000


@pytest.fixture(autouse=True)
def student(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(PARAMETERS)}, tmp_path / "model.safetensors")


def states(overview: Overview) -> dict[str, str]:
    return {row.state.job.name: row.state.state for row in overview.rows}


def text(overview: Overview, *, every_job: bool = False) -> str:
    console = make_console(160)
    with console.capture() as captured:
        console.print(plan_table(overview, every_job=every_job))
    return captured.get()


def done_round_0(runner: Runner) -> None:
    """Round 0 sampled and scored, half of its evaluation; 40 tokens a response."""
    rollout, score = runner.plan.job("rollout", 0), runner.plan.job("score", 0)
    responses = [8, 8, 4]
    for job in (rollout, score):
        for part, count in enumerate(responses):
            commit(runner, job, [part], responses=count, tokens=40 * count)
        note_job(runner, job, seconds=80.0)
    commit(runner, runner.plan.job("evaluate", 0), [0, 2], responses=8, tokens=80)


def test_nothing_is_there(tmp_path: Path) -> None:
    overview = look([make_runner(tmp_path)])
    assert set(states(overview).values()) == {"missing"}
    assert not (tmp_path / "store").exists()
    rollout = overview.rows[1]
    assert (rollout.tokens, rollout.at_most, rollout.seconds) == (20 * 1024, True, None)
    shown = text(overview)
    assert "not known yet" in shown
    assert "≤ 61.4k" in shown  # three rounds, folded
    by_stage = {row.stage: row for row in overview.rows}
    assert by_stage["score"].most_bytes is not None
    assert by_stage["rollout"].most_bytes is None
    assert re.search(r"score +missing .* ≤ [\d.]+ MB", shown)
    assert re.search(r"rollout +missing .* about [\d.]+ kB", shown)
    assert overview.peak_bound > overview.peak_bytes
    assert "is its summary" in shown


def test_states_tokens_and_time(tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    done_round_0(runner)
    overview = look([runner])
    found = states(overview)
    assert [found[name] for name in ("rollout 0", "score 0", "evaluate 0", "train 0")] == [
        "complete",
        "complete",
        "partly",
        "missing",
    ]
    rows = {row.state.job.name: row for row in overview.rows}
    # measured: 40 tokens a response, 20 responses a round; two epochs of training
    assert rows["rollout 2"].tokens == rows["score 1"].tokens == 20 * 40
    assert rows["train 0"].tokens == 2 * 20 * 40
    assert not rows["rollout 1"].at_most
    assert rows["rollout 1"].bytes == 3 * 1000
    # 80 s for 800 tokens, of one worker
    assert rows["rollout 0"].seconds == 0
    assert rows["score 1"].seconds == pytest.approx(80.0)
    assert rows["train 0"].seconds is None
    # 11 problems, 8 samples each, 10 tokens a response
    assert rows["evaluate 0"].tokens == 11 * 8 * 10
    assert overview.rates["score"].source == "this run, 1 job"
    # weights, and two moments of each: float32
    assert rows["train 0"].bytes == 3 * 4 * PARAMETERS
    total = overview.totals["all"]
    assert (total.jobs, total.done) == (13, 2)
    assert total.missing == total.parts - 3 - 3 - 2


def test_an_alignment_reads_a_share_of_its_evaluation(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, evaluate={"alignment": {"samples": 2, "limit": 6, "responses": ["own"]}})
    done_round_0(runner)
    rows = {row.state.job.name: row for row in look([runner]).rows}
    assert rows["evaluate 0"].tokens == 11 * 8 * 10
    assert rows["align 0"].tokens == 6 * 2 * 10


def test_a_training_in_two_legs_took_both(tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    done_round_0(runner)
    train = runner.plan.job("train", 0)
    note_job(runner, train, seconds=50.0, parts=0)
    assert "train" not in look([runner]).rates
    commit(runner, train)
    note_job(runner, train, seconds=30.0)
    # two epochs of 20 responses of 40 tokens
    assert look([runner]).rates["train"].seconds_per_token == pytest.approx(80.0 / (2 * 20 * 40))


def test_a_part_done_job_takes_what_is_left_of_it(tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    done_round_0(runner)
    commit(runner, runner.plan.job("score", 1), [0, 1], responses=8, tokens=320)
    row = next(row for row in look([runner]).rows if row.state.job.name == "score 1")
    assert (row.state.state, row.state.done) == ("partly", 2)
    assert row.seconds == pytest.approx(80.0 / 3)


def test_what_another_run_made_is_called_shared_with_its_name(tmp_path: Path) -> None:
    first = make_runner(tmp_path, name="first")
    done_round_0(first)
    second = make_runner(tmp_path, name="second", train={"epochs": 3})
    overview = look([second])
    rows = {row.state.job.name: row for row in overview.rows}
    assert (rows["score 0"].state.state, rows["score 0"].state.maker) == ("shared", "first")
    assert "shared (by first)" in text(overview)
    # what it takes is known from the run that made it: the same teacher and student
    first.paths.config.write_text(json.dumps(first.settings.model_dump(mode="json")))
    rate = look([second]).rates["score"]
    assert (rate.seconds_per_token, rate.source) == (pytest.approx(0.1), "run first, 1 job")
    # of other models, nothing is known
    other = make_runner(tmp_path, name="third", teacher={"path": "bigger"})
    assert "score" not in look([other]).rates
    assert "rollout" in look([other]).rates


def test_a_part_that_was_set_aside_is_named(tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    rollout = runner.plan.job("rollout", 0)
    commit(runner, rollout, [0, 1], responses=8, tokens=320)
    commit(runner, rollout, [2], set_aside="it failed 3 times: a bad prompt")
    note_job(runner, rollout, 10.0)
    overview = look([runner])
    assert overview.rows[1].state.set_aside == {2: "it failed 3 times: a bad prompt"}
    shown = text(overview)
    assert "set aside: 2" in shown
    assert "rollout 0 part 2: it failed 3 times: a bad prompt" in shown
    # done again after a repair: the hint is still there, the marker says otherwise
    artifact = runner.artifact(rollout.output)
    artifact.drop_part(2)
    commit(runner, rollout, [2], responses=4, tokens=160)
    assert look([runner]).rows[1].state.set_aside == {}


def test_a_survey_is_pure_and_keeps_no_parts() -> None:
    plan = make_plan(make_settings(), make_facts())
    asked: list[str] = []

    def listing(identity: object) -> Found:
        asked.append(identity.key)  # type: ignore[attr-defined]
        return Found(frozenset({0, 1}))

    found = survey({"x": plan}, listing, {})
    assert len(asked) == len(found) == len(plan.jobs)
    assert found[1].done == 2
    assert found[1].missing == 1


def test_a_line_that_names_no_artifact_says_nothing_of_who_made_one(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "jobs.jsonl").write_text('{"key": "k"}\n{"stage": "score"}\n{"key": "l"}\n')
    assert read_makers(tmp_path, ["x"]) == {"k": "x", "l": "x"}


def test_rollouts_with_and_without_a_side_artifact_are_jobs_of_their_own(tmp_path: Path) -> None:
    plain = make_runner(tmp_path, name="plain", rounds=1)
    beside = make_runner(tmp_path, name="beside", rounds=1, rollout={"student_topk": 4})
    rollout = beside.plan.job("rollout", 0)
    assert rollout.side is not None
    for part, count in enumerate([8, 8, 4]):
        commit(plain, plain.plan.job("rollout", 0), [part], responses=count, tokens=40 * count)
    note_job(plain, plain.plan.job("rollout", 0), 1.0)
    with beside.artifact(rollout.side).write_part(0):
        pass
    rows = {row.state.runs: row for row in look([plain, beside]).rows if row.stage == "rollout"}
    found = {runs: (row.state.state, row.state.done) for runs, row in rows.items()}
    assert found == {("plain",): ("complete", 3), ("beside",): ("partly", 1)}
    # 800 tokens; where the responses are counted already, only what is beside them is added
    assert rows["plain",].bytes == 3000
    assert rows["beside",].bytes == 800 * 4 * 4
    assert next(row for row in look([beside]).rows if row.stage == "rollout").bytes == 3000 + 800 * 4 * 4


def test_many_rounds_are_folded_by_state(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, rounds=200, rollout={"prompts_per_round": 4, "rows_per_part": 4})
    for round_ in range(3):
        for stage in ("rollout", "score", "train"):
            job = runner.plan.job(stage, round_)  # type: ignore[arg-type]
            commit(runner, job, responses=8, tokens=80)
            note_job(runner, job, 1.0)
    overview = look([runner])
    folded, every = text(overview), text(overview, every_job=True)
    assert folded.count("\n") < 25
    assert re.search(r"0-2 +rollout +complete +3/3", folded)
    assert re.search(r"3-199 +score +missing +0/197", folded)
    assert every.count("\n") > 800


def test_what_lies_in_a_store_that_is_only_read_takes_no_space(tmp_path: Path) -> None:
    """The first two rounds are the team's, with their checkpoints; the third is to be made here."""
    team = make_runner(tmp_path, name="team", store=str(tmp_path / "team"))
    for job in team.plan.jobs:
        if job.round < 2 or (job.stage, job.round) == ("evaluate", 2):
            commit(team, job, responses=8, tokens=320)
    mine = make_runner(tmp_path, name="mine", read_only_stores=[str(tmp_path / "team")])
    overview, whole = look([mine]), look([make_runner(tmp_path, name="alone")])
    assert states(overview)["train 1"] == "shared"
    assert overview.present_bytes == 0
    own = [row for row in overview.rows if not row.state.elsewhere]
    assert [row.state.job.name for row in own] == ["rollout 2", "score 2", "train 2", "evaluate 3"]
    weights, moments = 4 * PARAMETERS, 2 * 4 * PARAMETERS
    data = sum(row.bytes for row in own if row.stage != "train")
    assert overview.peak_bytes == data + 2 * (weights + moments)  # the checkpoint, and its last resumable state
    assert overview.peak_bytes < whole.peak_bytes
    roomy = make_runner(
        tmp_path, name="mine", read_only_stores=[str(tmp_path / "team")], max_store_bytes=overview.peak_bound
    )
    refuse_too_large([roomy])


def test_rounds_that_are_not_all_measured_are_folded_too(tmp_path: Path) -> None:
    evaluate = {"every": 25}
    rollout = {"prompts_per_round": 4, "rows_per_part": 4}
    runner = make_runner(tmp_path, rounds=200, rollout=rollout, evaluate=evaluate)
    for stage in ("rollout", "score", "train"):
        commit(runner, runner.plan.job(stage, 0), responses=8, tokens=80)  # type: ignore[arg-type]
        note_job(runner, runner.plan.job(stage, 0), 1.0)  # type: ignore[arg-type]
    shown = text(look([runner]))
    assert shown.count("\n") < 20
    assert re.search(r"1-199 +rollout +missing +0/199", shown)
    assert re.search(r"25-200 +evaluate +missing +0/32 .* 8 of evaluations", shown)


def test_the_peak_on_disk_is_that_of_the_last_round(tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    done_round_0(runner)
    overview = look([runner])
    data = sum(row.bytes for row in overview.rows if row.stage != "train")
    weights, moments = 4 * PARAMETERS, 2 * 4 * PARAMETERS
    state = weights + moments  # a resumable one, beside the last checkpoint
    assert overview.peak_with(KEEP_ALL) == data + 3 * (weights + moments) + state
    assert overview.peak_bytes == data + 3 * weights + 2 * moments + state  # as train.keep_optimizer_states is 1
    assert overview.present_bytes == 3000 + 3000 + 880 * 2000 // 160 // 2  # 2 of 4 parts of the evaluation
    assert peak_disk(overview.rows, {}) == 0
