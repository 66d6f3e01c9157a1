"""The evaluate stage on a real model: parts, verdicts, summary, and errors before any model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from eopd.stages.evaluate import run as stage
from eopd.stages.evaluate.run import EvaluateJob
from eopd.stages.evaluate.settings import EvaluateSettings, chunks
from eopd.stages.evaluate.summary import Tally, doubts, figures, overall, pass_at_k
from eopd.stages.job import ModelRef, NullProgress
from eopd.stages.models.prompts import VerifierName
from eopd.stages.stage import SummaryJob
from eopd.stages.verifiers.countdown import verify
from eopd.stages.verifiers.math_worker import grade
from eopd.stages.verifiers.mathematics import DIED, TIMED_OUT
from eopd.stages.verifiers.registry import RULES
from eopd.stages.verifiers.verdict import NO_ANSWER, UNREADABLE
from eopd.storage import records as evaluations
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import InputError
from eopd.storage.identity import Identity
from tests.raises import raises

COUNTDOWN = Path(__file__).parents[2] / "examples" / "countdown"
STUDENT = ModelRef(path=str(COUNTDOWN / "student"), dtype="float32", fingerprint="student")
STOPS = (1, 4)


class Lines(NullProgress):
    """Keeps what a person would see."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.finished = 0

    def advance(self, n: int, **figures: float) -> None:
        self.finished = int(figures.get("responses", self.finished))  # an alignment counts tokens alone

    def line(self, text: str) -> None:
        self.seen.append(text)


def test_every_verifier_has_a_version_in_the_key() -> None:
    assert set(RULES) == set(get_args(VerifierName))


def settings_for(**changes: Any) -> EvaluateSettings:
    benchmark = {"name": "countdown", "path": str(COUNTDOWN / "evaluate.jsonl"), "verifier": "countdown", "limit": 12}
    values: dict[str, Any] = {
        "benchmarks": [benchmark],
        "samples": 4,
        "max_new_tokens": 24,
        "template": "plain",
        "rows_per_part": 5,
        "engine": "transformers",
    }
    return EvaluateSettings(**(values | changes))


def job_for(
    folder: Path, settings: EvaluateSettings, parts: Sequence[int] | None = None, planned: int | None = None
) -> EvaluateJob:
    count = planned if planned is not None else len(chunks(settings))
    output = Artifact(folder / "store", Identity("evaluations", 1, count, settings.semantic(), {"policy": "student"}))
    chosen = range(count) if parts is None else parts
    return EvaluateJob(output, chosen, settings, Lines(), folder / "logs", STUDENT, STOPS, seed=7)


def summary_of(job: EvaluateJob) -> SummaryJob:
    """The job that sums up what ``job`` samples."""
    identity = Identity("evaluation_summaries", 1, 1, inputs={"evaluation": job.output.key})
    return SummaryJob(Artifact(job.output.folder.parents[1], identity), job.output, job.settings, Lines())


def evaluate(job: EvaluateJob) -> None:
    """Sample every part and sum up."""
    stage.run(job)
    stage.summarise(summary_of(job))


def results_of(job: EvaluateJob) -> dict[str, Any]:
    folder = summary_of(job).output.part_folder(0)
    values: dict[str, Any] = json.loads((folder / evaluations.RESULTS).read_text())
    return values


def samples_of(job: EvaluateJob) -> list[dict[str, Any]]:
    rows = []
    for part in range(job.output.parts):
        rows += evaluations.SAMPLES.read(job.output.part_folder(part)).to_pylist()
    return rows


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluateJob:
    folder = tmp_path_factory.mktemp("evaluate")
    exact = folder / "exact.jsonl"
    exact.write_text('{"question": "1,2=3:", "gold": "1+2=3"}\n{"question": "2,2=4:", "gold": "none of these"}\n')
    benchmarks = [
        *settings_for().model_dump()["benchmarks"],
        {
            "name": "exact",
            "path": str(exact),
            "verifier": "exact",
            "columns": {"prompt": "question", "answer": "gold", "id": None},
        },
    ]
    job = job_for(folder, settings_for(benchmarks=benchmarks))
    evaluate(job)
    return job


def test_a_benchmark_on_which_nothing_is_right_says_so(evaluated: EvaluateJob, tmp_path: Path) -> None:
    (warning,) = results_of(evaluated)["warnings"]
    assert warning.startswith("benchmark exact: of 8 responses none is right")
    again = summary_of(evaluated)
    again = replace(again, output=Artifact(tmp_path, again.output.identity))
    stage.summarise(again)
    assert isinstance(again.progress, Lines)
    assert f"evaluate: warning: {warning}" in again.progress.seen


def test_a_benchmark_without_one_answer_that_can_be_read_says_so() -> None:
    reason = grade("I do not know", "3")["reason"]

    def tally(correct: int, reasons: list[str | None]) -> Tally:
        problem = {"correct": correct}
        unanswered = sum((reason or "").startswith(NO_ANSWER) for reason in reasons)
        return Tally(problems=[problem], lengths=[1] * len(reasons), unanswered=unanswered, stopped=1)

    assert "no answer could be read in any (50% of them" in doubts("b", tally(0, [reason, reason]))[0]
    assert "none is right" in doubts("b", tally(0, [reason, "answered 4"]))[0]
    assert doubts("b", tally(1, [reason, None])) == []


def test_parts_hold_every_sample_of_every_problem_once(evaluated: EvaluateJob) -> None:
    assert evaluated.output.is_complete()
    assert evaluated.output.parts == 3 + 1
    rows = samples_of(evaluated)
    names = [(row["benchmark"], row["problem_index"], row["sample"]) for row in rows]
    assert names == [("countdown", p, s) for p in range(12) for s in range(4)] + [
        ("exact", p, s) for p in range(2) for s in range(4)
    ]
    assert len({row["seed"] for row in rows}) == len(rows)
    assert isinstance(evaluated.progress, Lines)
    assert evaluated.progress.finished == len(rows)
    for row in rows:
        ids = row["response_token_ids"]
        assert len(row["logprobs"]) == len(ids)
        assert max(row["logprobs"]) <= 0
        assert row["truncated_logprobs"] is None
        assert (row["finish_reason"] == "stop") == (ids[-1] in STOPS)
        assert not set(ids[:-1]) & set(STOPS)
        if row["benchmark"] == "countdown":
            assert row["correct"] == verify(row["response_text"], row["answer"]).correct
            assert (row["form"] is None) == (not row["correct"])


def test_summary_is_what_the_samples_say(evaluated: EvaluateJob) -> None:
    rows = [row for row in samples_of(evaluated) if row["benchmark"] == "countdown"]
    results = results_of(evaluated)
    one = results["benchmarks"]["countdown"]
    correct = [sum(row["correct"] for row in rows if row["problem_index"] == p) for p in range(12)]
    assert one["avg_at_k"] == pytest.approx(sum(correct) / 48)
    assert one["pass_at_k"] == {
        str(k): pytest.approx(np.mean([pass_at_k(4, c, k) for c in correct])) for k in range(1, 5)
    }
    assert one["pass_at_k"]["1"] == pytest.approx(one["avg_at_k"])
    assert one["avg_interval"][0] <= one["avg_at_k"] <= one["avg_interval"][1]
    logprobs = [value for row in rows for value in row["logprobs"]]
    assert one["token_entropy"] == pytest.approx(-np.mean(logprobs), rel=1e-5)
    lengths = [len(row["response_token_ids"]) for row in rows]
    assert one["response_tokens"]["mean"] == pytest.approx(np.mean(lengths))
    assert one["response_tokens"]["total"] == sum(lengths)
    assert one["stop_rate"] == pytest.approx(np.mean([row["finish_reason"] == "stop" for row in rows]))
    assert one["stop_rate"] + one["truncation_rate"] == pytest.approx(1.0)
    other = results["benchmarks"]["exact"]
    assert results["mean"]["avg_at_k"] == pytest.approx((one["avg_at_k"] + other["avg_at_k"]) / 2)
    for name in ("self_bleu", "distinct_4", "truncation_rate", "token_entropy"):
        low, high = one[f"{name}_interval"]
        assert low <= one[name] <= high
        assert results["mean"][name] == pytest.approx((one[name] + other[name]) / 2)
    low, high = one["response_tokens"]["interval"]
    assert low <= one["response_tokens"]["mean"] <= high
    assert results["mean"]["stop_rate"] == pytest.approx((one["stop_rate"] + other["stop_rate"]) / 2)
    assert results["mean"]["ungraded"] == 0
    assert results["verifiers"] == ["countdown 1", "exact 1"]
    assert results["settings"]["samples"] == 4
    assert results["model"]["fingerprint"] == "student"
    summary = summary_of(evaluated).output
    problems = evaluations.PROBLEMS.read(summary.part_folder(0)).to_pylist()
    assert [row["correct"] for row in problems[:12]] == correct
    assert summary.marker(0).inputs == {
        f"part-{part:05d}": evaluated.output.marker(part).checksum for part in range(evaluated.output.parts)
    }


def test_a_complete_evaluation_does_no_work_and_a_second_one_gives_the_same_bytes(
    evaluated: EvaluateJob, tmp_path: Path
) -> None:
    again = replace(evaluated, progress=Lines(), policy=replace(STUDENT, path="/nowhere"))
    stage.run(again)
    elsewhere = replace(evaluated, output=Artifact(tmp_path, evaluated.output.identity), log_dir=tmp_path / "logs")
    evaluate(elsewhere)
    for part in range(evaluated.output.parts):
        assert elsewhere.output.marker(part).checksum == evaluated.output.marker(part).checksum, part
    checksums = [summary_of(job).output.marker(0).checksum for job in (elsewhere, evaluated)]
    assert checksums[0] == checksums[1]


def test_parts_that_are_done_apart_give_the_same_summary(evaluated: EvaluateJob, tmp_path: Path) -> None:
    job = replace(evaluated, output=Artifact(tmp_path, evaluated.output.identity), parts=[2])
    stage.run(job)
    assert job.output.committed() == {2}
    evaluate(replace(job, parts=[3, 0, 1]))
    assert job.output.is_complete()
    assert results_of(job) == results_of(evaluated)


def test_a_summary_leaves_out_what_was_set_aside_and_says_so(evaluated: EvaluateJob, tmp_path: Path) -> None:
    job = replace(evaluated, output=Artifact(tmp_path, evaluated.output.identity), parts=[0, 2, 3])
    stage.run(job)
    job.output.set_aside(1, "failed 3 times")
    stage.summarise(summary_of(job))
    results = results_of(job)
    assert results["left_out"] == [{"benchmark": "countdown", "start": 5, "stop": 10}]
    assert results["benchmarks"]["countdown"]["problems"] == 7
    assert results["benchmarks"]["exact"] == results_of(evaluated)["benchmarks"]["exact"]


def test_top_p_is_applied_and_the_entropy_is_of_what_was_sampled_from(tmp_path: Path) -> None:
    job = job_for(tmp_path, settings_for(top_p=0.5, rows_per_part=12))
    evaluate(job)
    rows = samples_of(job)
    truncated = [value for row in rows for value in row["truncated_logprobs"]]
    full = [value for row in rows for value in row["logprobs"]]
    assert all(a >= b - 1e-5 for a, b in zip(truncated, full, strict=True))
    assert results_of(job)["benchmarks"]["countdown"]["token_entropy"] == pytest.approx(-np.mean(truncated), rel=1e-5)
    assert np.mean(truncated) > np.mean(full) + 0.05


def test_long_prompts_are_refused_or_skipped_and_counted(tmp_path: Path) -> None:
    refusing = job_for(tmp_path, settings_for(max_prompt_tokens=8))
    with raises(InputError, "10 tokens", setting="evaluate.max_prompt_tokens", remedy="too_long: skip"):
        stage.run(replace(refusing, policy=replace(STUDENT, fingerprint="never loaded")))
    skipping = job_for(tmp_path, settings_for(max_prompt_tokens=8, too_long="skip"))
    evaluate(skipping)
    one = results_of(skipping)["benchmarks"]["countdown"]
    assert one["problems"] + len(one["skipped"]) == 12
    none_left = job_for(tmp_path, settings_for(max_prompt_tokens=2, too_long="skip"), parts=[0])
    with raises(InputError, "all 12", setting="evaluate.max_prompt_tokens"):
        stage.run(none_left)
    assert not none_left.output.committed()
    assert 0 < one["problems"] < 12


@pytest.mark.parametrize(
    ("verifier", "answers", "why"),
    [
        ("countdown", ("1,2=3", "3"), "problem 'b': .*'3' does not read numbers=target"),
        ("math", ("3", "$"), r"problem 'b': .*'\$' holds no answer"),
    ],
)
def test_answers_that_the_verifier_cannot_read_are_named_before_sampling(
    tmp_path: Path, verifier: str, answers: tuple[str, str], why: str
) -> None:
    bad = tmp_path / "bad.jsonl"
    rows = [{"id": name, "problem": "x", "answer": answer} for name, answer in zip("ab", answers, strict=True)]
    bad.write_text("\n".join(map(json.dumps, rows)))
    job = job_for(tmp_path, settings_for(benchmarks=[{"name": "bad", "path": str(bad), "verifier": verifier}]))
    with raises(InputError, why, file=bad, prompt="b"):
        stage.run(job)
    assert not job.output.committed()


def test_a_benchmark_that_changed_since_planning_is_refused(tmp_path: Path) -> None:
    job = job_for(tmp_path, settings_for(), planned=9)
    for work in (lambda: stage.run(job), lambda: stage.summarise(summary_of(job))):
        with raises(InputError, "9 parts, .* 3", setting="evaluate.benchmarks"):
            work()


def problem(correct: int, number: int) -> dict[str, Any]:
    return {
        "benchmark": "made up",
        "problem_id": str(number),
        "samples": 4,
        "correct": correct,
        "distinct_correct": min(correct, 1),
        "self_bleu": 0.5,
        "distinct_4": None,
        "response_tokens": 8.0,
        "truncated": 4,
    }


def test_answers_that_nobody_judged_are_counted() -> None:
    reasons = [None, "another number", DIED, f"{TIMED_OUT} (10 s)", UNREADABLE]
    rows = [
        {
            "benchmark": "b",
            "problem_id": "p",
            "correct": False,
            "form": None,
            "reason": reason,
            "response_token_ids": [5, 2],
            "stop_token_id": 2,
            "finish_reason": "stop",
            "logprobs": [-1.0, -0.5],
            "truncated_logprobs": None,
        }
        for reason in reasons
    ]
    tally = Tally()
    tally.add(pa.Table.from_pylist(rows))
    assert (tally.ungraded, tally.problems[0]["samples"]) == (3, 5)


@pytest.mark.parametrize(("boxes", "counted"), [(True, 2), (False, 0)])
def test_right_answers_without_a_box_are_counted(boxes: bool, counted: int) -> None:
    texts = [(r"so \boxed{7}", True), ("so 7", True), (r"6 + 1 = 7, \boxed{", True), ("so 8", False)]
    rows = [
        {
            "benchmark": "b",
            "problem_id": "p",
            "correct": correct,
            "form": "x" if correct else None,
            "reason": None if correct else "answered 8",
            "response_text": text,
            "response_token_ids": [5, 2],
            "finish_reason": "stop",
            "logprobs": [-1.0, -0.5],
            "truncated_logprobs": None,
        }
        for text, correct in texts
    ]
    tally = Tally(boxes=boxes)
    tally.add(pa.Table.from_pylist(rows))
    assert tally.unboxed_correct == counted
    values = figures("b", tally, resamples=100, confidence=0.95, seed=0).values
    assert values.get("unboxed_correct") == (counted if boxes else None)


def tally_of(correct: Sequence[int]) -> Tally:
    problems = [problem(count, number) for number, count in enumerate(correct)]
    return Tally(problems, lengths=[8] * 4 * len(correct), surprise=[(4.0 + n, 32) for n in range(len(correct))])


def test_results_without_spread_claim_no_certainty() -> None:
    """0 of 30 problems: another thirty may hold some that are solved; one problem says nothing of others."""
    none = figures("b", tally_of([0] * 30), resamples=100, confidence=0.95, seed=0)
    assert none.values["avg_interval"] == pytest.approx([0.0, 0.1157], abs=1e-4)
    assert none.values["pass_interval"]["4"] == pytest.approx([0.0, 0.1157], abs=1e-4)
    assert none.values["distinct_correct_interval"] == pytest.approx([0.0, 4 * 0.1157], abs=1e-4)
    assert none.values["truncation_rate_interval"] == pytest.approx([1 - 0.1157, 1.0], abs=1e-4)
    assert none.values["response_tokens"]["interval"] is None
    assert (none.values["distinct_4"], none.values["distinct_4_interval"]) == (None, None)
    entropy = none.values["token_entropy"]
    assert entropy == pytest.approx(sum(4.0 + n for n in range(30)) / (30 * 32))
    assert none.values["token_entropy_interval"][0] < entropy < none.values["token_entropy_interval"][1]
    one = figures("b", tally_of([4]), resamples=100, confidence=0.95, seed=0)
    assert one.values["avg_at_k"] == 1.0
    assert one.values["avg_interval"] is None
    assert one.values["token_entropy_interval"] is None
    both = overall({"none": none, "one": one}, resamples=100, confidence=0.95)
    assert both["avg_at_k"] == 0.5
    assert both["distinct_4"] is None
    assert both["avg_interval"][0] < 0.1


def test_a_benchmark_of_nothing_but_long_prompts_says_so() -> None:
    with raises(InputError, "benchmark b: .* 2 prompts", setting="evaluate.max_prompt_tokens"):
        figures("b", Tally(skipped=["a", "b"]), resamples=100, confidence=0.95, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmarks": []}, "at least 1"),
        ({"samples": 0}, "greater than or equal to 1"),
        ({"temperature": 0.005}, r"temperature\n.*must be 0 \(greedy\) or at least 0\.01"),
        ({"top_p": 0.0}, "greater than 0"),
        ({"suffx": "x"}, "Extra inputs"),
        ({"template_arguments": {"enable_thinking": False}}, "belong to template: chat"),
        ({"benchmarks": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]}, "the name 'a' is given to 2"),
        ({"benchmarks": [{"name": "a", "path": "x", "verifier": "maths"}]}, "'countdown', 'exact' or 'math'"),
        ({"benchmarks": [{"name": "a", "path": "x", "columns": {"answer": None}}]}, "reference answers"),
        ({"benchmarks": [{"name": "a", "path": "x", "columns": {"teacher": "t"}}]}, "only training prompts have"),
    ],
)
def test_settings_refuse_what_makes_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings_for(**changes)


def test_paths_and_speed_are_not_part_of_the_identity() -> None:
    first = settings_for()
    moved = first.model_dump()
    moved["benchmarks"][0]["path"] = "/elsewhere.jsonl"
    moved["verifier_workers"] = 7
    assert EvaluateSettings(**moved).semantic() == first.semantic()
    assert settings_for(samples=5).semantic() != first.semantic()
    assert settings_for(seconds_per_answer=1.0).semantic() != first.semantic()


@pytest.mark.vllm
def test_vllm_evaluates_the_same_model_about_as_well(evaluated: EvaluateJob, tmp_path: Path) -> None:
    job = job_for(tmp_path, settings_for(engine="vllm", samples=16, rows_per_part=64))
    evaluate(job)
    results = results_of(job)
    one, reference = results["benchmarks"]["countdown"], results_of(evaluated)["benchmarks"]["countdown"]
    assert results["engines"][0].startswith("vllm")
    assert one["token_entropy"] == pytest.approx(reference["token_entropy"], rel=0.2)
    assert one["avg_at_k"] == pytest.approx(reference["avg_at_k"], abs=0.2)
    assert one["stop_rate"] > 0.9
