"""What `eopd plan` says of a store: states, who made what, tokens, bytes, time, disk; on real markers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eopd.pipeline.checks import check_store_size
from eopd.pipeline.forecast import Forecast, Keep, Row, forecast
from eopd.pipeline.run import Run
from eopd.pipeline.status import make_console, plan_table
from tests.pipeline.plan_case import commit, make_run, note_job

PARAMETERS = 1000


@pytest.fixture(autouse=True)
def student(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(PARAMETERS)}, tmp_path / "model.safetensors")


def states(overview: Forecast) -> dict[str, str]:
    return {row.job.name: row.state for row in overview.rows}


def row_of(overview: Forecast, name: str) -> Row:
    return next(row for row in overview.rows if row.job.name == name)


def text(overview: Forecast, *, every_job: bool = False) -> str:
    console = make_console(160)
    with console.capture() as captured:
        console.print(plan_table(overview, every_job=every_job))
    return captured.get()


def done_round_0(run: Run) -> None:
    """Round 0 sampled and scored, half of its evaluation; 40 tokens a response."""
    rollout, score = run.plan.job("rollout", 0), run.plan.job("score", 0)
    responses = [8, 8, 4]
    for job in (rollout, score):
        for part, count in enumerate(responses):
            commit(run, job, [part], responses=count, tokens=40 * count)
        note_job(run, job, seconds=80.0)
    commit(run, run.plan.job("evaluate", 0), [0, 2], responses=8, tokens=80)


def test_nothing_is_there(tmp_path: Path) -> None:
    overview = forecast([make_run(tmp_path)])
    assert set(states(overview).values()) == {"missing"}
    assert not (tmp_path / "store").exists()
    rollout = next(row for row in overview.rows if row.stage == "rollout")
    assert (rollout.size.tokens, rollout.size.at_most, rollout.seconds) == (20 * 1024, True, None)
    shown = text(overview)
    assert "not known yet" in shown
    assert "≤ 61.4k" in shown  # three rounds, folded
    assert "--all shows every job" in shown
    assert "A summary is a job of one part" in shown
    assert "--all" not in text(overview, every_job=True)


def test_states_tokens_and_time(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    done_round_0(run)
    overview = forecast([run])
    findings = states(overview)
    assert [findings[name] for name in ("rollout 0", "score 0", "evaluate 0", "train 0")] == [
        "complete",
        "complete",
        "partly",
        "missing",
    ]
    rows = {row.job.name: row for row in overview.rows}
    # measured: 40 tokens a response, 20 responses a round; two epochs of training
    assert rows["rollout 2"].size.tokens == rows["score 1"].size.tokens == 20 * 40
    assert rows["train 0"].size.tokens == 2 * 20 * 40
    assert not rows["rollout 1"].size.at_most
    assert rows["rollout 1"].size.bytes == 3 * 1000
    # 80 s for 800 tokens, of one worker
    assert rows["rollout 0"].seconds == 0
    assert rows["score 1"].seconds == pytest.approx(80.0)
    assert rows["train 0"].seconds is None
    # 11 problems, 8 samples each, 10 tokens a response
    assert rows["evaluate 0"].size.tokens == 11 * 8 * 10
    assert overview.rates["score"].jobs == 1
    # weights, and two moments of each: float32
    assert rows["train 0"].size.bytes == 3 * 4 * PARAMETERS
    total = overview.totals["all"]
    assert (total.jobs, total.done) == (17, 2)
    assert total.missing == total.parts - 3 - 3 - 2


@pytest.mark.parametrize("every_job", [False, True])
def test_each_kind_of_job_of_a_stage_has_its_own_line(tmp_path: Path, every_job: bool) -> None:
    run = make_run(tmp_path, evaluate={"modes": {"cot": {"suffix": "Think first."}, "direct": {"suffix": "Now."}}})
    overview = forecast([run])
    lines = [line.split() for line in text(overview, every_job=every_job).splitlines()]
    for mode in ("cot", "direct"):
        shown = [line[0] for line in lines if line[1:3] == ["evaluate", f"({mode})"]]
        rounds = sorted({row.round for row in overview.rows if row.job.variant == mode and row.stage == "evaluate"})
        assert shown == ([str(round_) for round_ in rounds] if every_job else [f"{rounds[0]}-{rounds[-1]}"])
    assert {job["variant"] for job in overview.to_json()["jobs"]} >= {"", "cot", "direct"}


def test_an_alignment_reads_a_share_of_its_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path, evaluate={"alignment": {"samples": 2, "limit": 6, "responses": ["own"]}})
    done_round_0(run)
    rows = {row.job.name: row for row in forecast([run]).rows}
    assert rows["evaluate 0"].size.tokens == 11 * 8 * 10
    assert rows["align 0"].size.tokens == 6 * 2 * 10


def test_a_training_in_two_legs_took_both(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    done_round_0(run)
    train = run.plan.job("train", 0)
    note_job(run, train, seconds=50.0, parts=0)
    assert "train" not in forecast([run]).rates
    commit(run, train)
    note_job(run, train, seconds=30.0)
    # two epochs of 20 responses of 40 tokens
    assert forecast([run]).rates["train"].seconds_per_token == pytest.approx(80.0 / (2 * 20 * 40))


def test_a_part_done_job_takes_what_is_left_of_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    done_round_0(run)
    commit(run, run.plan.job("score", 1), [0, 1], responses=8, tokens=320)
    row = next(row for row in forecast([run]).rows if row.job.name == "score 1")
    assert (row.state, row.done) == ("partly", 2)
    assert row.seconds == pytest.approx(80.0 / 3)


def test_a_part_that_was_set_aside_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rollout = run.plan.job("rollout", 0)
    commit(run, rollout, [0, 1], responses=8, tokens=320)
    commit(run, rollout, [2], set_aside="it failed 3 times: a bad prompt")
    note_job(run, rollout, 10.0)
    overview = forecast([run])
    assert row_of(overview, "rollout 0").set_aside == {2: "it failed 3 times: a bad prompt"}
    shown = text(overview)
    assert "set aside: 2" in shown
    assert "rollout 0 part 2: it failed 3 times: a bad prompt" in shown
    # done again after a repair: the hint is still there, the marker says otherwise
    artifact = run.artifact(rollout.output)
    artifact.drop_part(2)
    commit(run, rollout, [2], responses=4, tokens=160)
    assert row_of(forecast([run]), "rollout 0").set_aside == {}


def test_many_rounds_are_folded_by_state(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=200, rollout={"prompts_per_round": 4, "rows_per_part": 4})
    for round_ in range(3):
        for stage in ("rollout", "score", "train"):
            job = run.plan.job(stage, round_)
            commit(run, job, responses=8, tokens=80)
            note_job(run, job, 1.0)
    overview = forecast([run])
    folded, every = text(overview), text(overview, every_job=True)
    assert folded.count("\n") < 25
    assert re.search(r"0-2 +rollout +complete +3/3", folded)
    assert re.search(r"3-199 +score +missing +0/197", folded)
    assert every.count("\n") > 800


def test_what_lies_in_a_store_that_is_only_read_takes_no_space(tmp_path: Path) -> None:
    """The first two rounds are the team's, with their checkpoints; the third is to be made here."""
    team = make_run(tmp_path, name="team", store=str(tmp_path / "team"))
    for job in team.plan.jobs:
        if job.round < 2 or (job.stage.command, job.round) == ("evaluate", 2):
            commit(team, job, responses=8, tokens=320)
    mine = make_run(tmp_path, name="mine", read_only_stores=[str(tmp_path / "team")])
    overview, whole = forecast([mine]), forecast([make_run(tmp_path, name="alone")])
    assert states(overview)["train 1"] == "shared"
    assert overview.present_bytes == 0
    own = [row for row in overview.rows if not row.elsewhere]
    assert [row.job.name for row in own] == ["rollout 2", "score 2", "train 2", "evaluate 3", "evaluation_summary 3"]
    weights, moments = 4 * PARAMETERS, 2 * 4 * PARAMETERS
    data = sum(row.size.bytes for row in own if row.stage != "train")
    assert overview.peak_bytes() == data + 2 * (weights + moments)  # the checkpoint, and its last resumable state
    assert overview.peak_bytes() < whole.peak_bytes()
    roomy = make_run(
        tmp_path, name="mine", read_only_stores=[str(tmp_path / "team")], max_store_bytes=overview.peak_bytes()
    )
    check_store_size(forecast([roomy]))


def test_rounds_that_are_not_all_measured_are_folded_too(tmp_path: Path) -> None:
    evaluate = {"every": 25}
    rollout = {"prompts_per_round": 4, "rows_per_part": 4}
    run = make_run(tmp_path, rounds=200, rollout=rollout, evaluate=evaluate)
    for stage in ("rollout", "score", "train"):
        commit(run, run.plan.job(stage, 0), responses=8, tokens=80)
        note_job(run, run.plan.job(stage, 0), 1.0)
    shown = text(forecast([run]))
    assert shown.count("\n") < 20
    assert re.search(r"1-199 +rollout +missing +0/199", shown)
    assert re.search(r"25-200 +evaluate +missing +0/24 .* 8 of evaluations", shown)


def test_the_peak_on_disk_is_that_of_the_last_round(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    done_round_0(run)
    overview = forecast([run])
    data = sum(row.size.bytes for row in overview.rows if row.stage != "train")
    weights, moments = 4 * PARAMETERS, 2 * 4 * PARAMETERS
    state = weights + moments  # a resumable one, beside the last checkpoint
    assert overview.peak_bytes(Keep()) == data + 3 * (weights + moments) + state
    assert overview.peak_bytes() == data + 3 * weights + 2 * moments + state  # as train.keep_optimizer_states is 1
    assert overview.present_bytes == 3000 + 3000 + 7333  # 2 of 3 parts of the evaluation


def test_what_another_run_made_is_shared(tmp_path: Path) -> None:
    first = make_run(tmp_path, name="first")
    done_round_0(first)
    second = make_run(tmp_path, name="second", train={"epochs": 3})
    overview = forecast([second])
    assert states(overview)["score 0"] == "shared"
    assert "shared" in text(overview)
    assert "score" not in overview.rates, "rates come from a run's own jobs"
    assert "score" in forecast([second, first]).rates


def test_the_students_top_k_is_a_job_beside_the_same_rollouts(tmp_path: Path) -> None:
    plain = make_run(tmp_path, name="plain", rounds=1)
    topk = make_run(tmp_path, name="topk", rounds=1, rollout={"student_topk": 4})
    for part, count in enumerate([8, 8, 4]):
        commit(plain, plain.plan.job("rollout", 0), [part], responses=count, tokens=40 * count)
    overview = forecast([plain, topk])
    assert row_of(overview, "rollout 0").runs == ("plain", "topk")
    own = row_of(overview, "student_topk 0")
    assert (own.runs, own.state, own.size.tokens) == (("topk",), "missing", 800)
    assert overview.planned == len(plain.plan.jobs) + len(topk.plan.jobs) > len(overview.rows)
