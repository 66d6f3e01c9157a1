"""What the report reads from evaluations of either version, and what it warns of. All figures are made up."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from eopd.stages.report import tables
from eopd.stages.report.data import Estimate, ReportData, RunData
from eopd.stages.report.gather import RoundArtifacts, RunArtifacts, gather
from eopd.stages.report.numbers import to_csv
from eopd.stages.report.page import render
from eopd.stages.report.seeds import merged
from eopd.storage import evaluations
from eopd.storage.artifacts import Artifact, Identity

OLD = {
    "avg_at_k": 0.25,
    "avg_interval": [0.2, 0.3],
    "pass_at_k": {"1": 0.25, "2": 0.5},
    "pass_interval": {"1": [0.2, 0.3], "2": [0.4, 0.6]},
    "distinct_correct": 0.5,
    "distinct_correct_interval": [0.4, 0.6],
}
ONE = {
    **OLD,
    "problems": 2,
    "samples": 2,
    "skipped": [],
    "self_bleu": 0.75,
    "distinct_4": 0.125,
    "token_entropy": 0.5,
    "response_tokens": {"mean": 17.0},
    "stop_rate": 0.75,
    "truncation_rate": 0.25,
    "ungraded": 0,
}
NEW = {
    "self_bleu": 0.75,
    "self_bleu_interval": [0.625, 0.875],
    "distinct_4": 0.125,
    "distinct_4_interval": None,
    "token_entropy": 0.5,
    "token_entropy_interval": [0.4375, 0.5625],
    "response_tokens": {"mean": 17.0, "interval": [16.0, 18.0]},
    "stop_rate": 0.75,
    "truncation_rate": 0.25,
    "truncation_rate_interval": [0.125, 0.375],
}


def evaluation(store: Path, number: int, mean: dict[str, Any], one: dict[str, Any], **more: Any) -> Artifact:
    """An evaluation of two benchmarks with two problems each; the summary alone."""
    files = {"benchmark a": "fa", "benchmark b": "fb", "policy": str(number)}
    artifact = Artifact(store, Identity("evaluations", 2, 1, {"made up": number}, files))
    rows = [
        {
            "benchmark": benchmark,
            "problem_id": str(problem),
            "samples": 2,
            "correct": problem,
            "distinct_correct": problem,
            "self_bleu": 0.75,
            "distinct_4": 0.125,
            "response_tokens": 17.0,
            "truncated": 0,
        }
        for benchmark in ("b", "a")
        for problem in range(2)
    ]
    results = {"mean": mean, "benchmarks": {"b": one, "a": {**one, "ungraded": 0, "skipped": []}}, **more}
    with artifact.write_part(0) as folder:
        evaluations.write_problems(folder, rows)
        (folder / evaluations.RESULTS).write_text(json.dumps(results))
    return artifact


def gathered(tmp_path: Path, *found: Artifact, name: str = "run", seed: int = 0) -> RunData:
    rounds = [RoundArtifacts(number, artifact) for number, artifact in enumerate(found)]
    none = tmp_path / "none"
    return gather(RunArtifacts(name, {}, rounds, tokenizer="", tau=None, metrics=none, jobs=none, seed=seed))


@pytest.mark.parametrize("mean", [OLD, {**OLD, **NEW}], ids=["version 1", "version 2"])
def test_every_figure_of_an_evaluation_is_in_the_table_and_in_the_numbers(tmp_path: Path, mean: dict[str, Any]) -> None:
    run = gathered(tmp_path, evaluation(tmp_path, 0, mean, ONE))
    data = ReportData("one", "now", [run])
    rows = {row["name"]: row for row in csv.DictReader(to_csv(data).splitlines()) if row["section"] == "round"}
    wanted = {
        "self_bleu": 0.75,
        "distinct_4": 0.125,
        "token_entropy": 0.5,
        "stop_rate": 0.75,
        "truncation_rate": 0.25,
        "response_length": 17.0,
        "distinct_correct": 0.5,
        "ungraded": 0,
        "left_out": 0,
    }
    assert {name: float(rows[name]["value"]) for name in wanted} == wanted
    assert rows["distinct_correct"]["low"] == "0.4"
    assert rows["self_bleu"]["low"] == ("0.625" if mean is not OLD else "")
    assert rows["distinct_4"]["low"] == ""
    assert rows["response_length"]["high"] == ("18.0" if mean is not OLD else "")
    page = render(data)
    table = page.split("Every evaluation</summary>")[1].split("</table>")[0]
    for cell in ("0.250 (0.200–0.300) at 2", "0.750", "0.125", "17.0", "75.0 %", "25.0 %"):
        assert cell in table
    assert run.warnings == []
    assert 'class="notes warnings"' not in page


AIME = {
    **ONE,
    "avg_at_k": 0.125,
    "avg_interval": [0.0625, 0.1875],
    "pass_at_k": {"1": 0.125, "2": 0.375},
    "pass_interval": {"1": [0.0625, 0.1875], "2": [0.3125, 0.4375]},
    "distinct_correct": 0.25,
    "distinct_correct_interval": [0.0, 0.5],
    "response_tokens": {"mean": 33.0, "interval": [31.0, 35.0], "median": 30.0, "p95": 50.0, "max": 60, "total": 132},
    "ungraded": 1,
    "skipped": ["x"],
}


def of_two(tmp_path: Path, number: int = 0) -> Artifact:
    left_out = [{"benchmark": "b", "start": 4, "stop": 9}]
    benchmarks = {"a": {**ONE, "avg_at_k": 0.375, "avg_interval": [0.25, 0.5]}, "b": AIME}
    return evaluation(tmp_path, number, {**OLD, **NEW}, ONE, left_out=left_out, benchmarks=benchmarks)


def test_figures_of_each_benchmark_are_in_the_table_and_in_the_numbers(tmp_path: Path) -> None:
    data = ReportData("one", "now", [gathered(tmp_path, of_two(tmp_path))])
    rows = list(csv.DictReader(to_csv(data).splitlines()))
    found = {(row["name"], row["x"]): row for row in rows if row["section"] == "benchmark" and row["benchmark"] == "b"}
    wanted = {
        ("avg_at_k", "2"): (0.125, 0.0625, 0.1875),
        ("pass_at_k", "1"): (0.125, 0.0625, 0.1875),
        ("pass_at_k", "2"): (0.375, 0.3125, 0.4375),
        ("distinct_correct", ""): (0.25, 0.0, 0.5),
        ("response_length", ""): (33.0, 31.0, 35.0),
        ("ungraded", ""): (1, None, None),
        ("left_out", ""): (6, None, None),
    }
    said = {
        key: tuple(float(found[key][name]) if found[key][name] else None for name in ("value", "low", "high"))
        for key in wanted
    }
    assert said == wanted
    assert {row["round"] for row in found.values()} == {"0"}
    means = [row for row in rows if row["name"] == "avg_at_k" and row["section"] == "round"]
    assert [(row["value"], row["benchmark"]) for row in means] == [("0.25", "")]
    table = render(data).split("Every evaluation</summary>")[1].split("</table>")[0]
    lines = [re.sub("<[^>]*>", "|", line) for line in table.split("<tr>")]
    assert "|benchmark|" in lines[1]
    assert [line.split("|")[5] for line in lines[2:]] == ["mean", "a", "b"]
    assert "0.125 (0.062–0.188) at 2" in lines[4]


def test_the_only_benchmark_needs_no_row_of_its_own(tmp_path: Path) -> None:
    def of(benchmark: str, number: int) -> RunData:
        made = evaluation(tmp_path, number, OLD, ONE, benchmarks={benchmark: ONE})
        return gathered(tmp_path, made, name=f"run{number}")

    alone = ReportData("one", "now", [of("b", 0)])
    assert "benchmark" not in {row["section"] for row in csv.DictReader(to_csv(alone).splitlines())}
    assert tables.evaluations(alone.runs).head[:3] == ("run", "round", "Avg@k")
    both = tables.evaluations([of("b", 0), of("a", 1)])
    assert both.head[:3] == ("run", "round", "benchmark")
    assert [row[:3] for row in both.body] == [("run0", "0", "b"), ("run1", "0", "a")]


def test_figures_of_a_benchmark_are_means_over_the_seeds(tmp_path: Path) -> None:
    one = gathered(tmp_path, of_two(tmp_path))
    better = {**AIME, "avg_at_k": 0.375}
    other = gathered(
        tmp_path, evaluation(tmp_path, 1, OLD, ONE, benchmarks={"b": better, "a": ONE}), seed=1, name="other"
    )
    found = merged([one, other]).rounds[0].benchmarks
    assert sorted(found) == ["a", "b"]
    assert found["b"].avg_at_k == {2: 0.25}
    low, high = found["b"].avg_interval[2]
    assert low < 0.25 < high
    assert found["b"].pass_at_k == {1: 0.125, 2: 0.375}


def test_figures_without_an_interval_are_shown_without_one(tmp_path: Path) -> None:
    mean = {**OLD, **NEW, "avg_interval": None, "pass_interval": {"1": None, "2": None}}
    run = gathered(tmp_path, evaluation(tmp_path, 0, mean, ONE, settings={"confidence": 0.9}))
    assert run.interval == "90 % bootstrap over problems"
    (item,) = run.rounds
    assert item.avg_at_k == {2: 0.25}
    assert item.avg_interval == {}
    assert item.pass_interval == {}


def test_the_interval_of_a_change_has_the_confidence_of_the_run(tmp_path: Path) -> None:
    def changed(confidence: float) -> Estimate:
        store = tmp_path / str(confidence)
        found = [evaluation(store, number, OLD, ONE, settings={"confidence": confidence}) for number in (0, 1)]
        gain = gathered(store, *found).avg_gain
        assert gain is not None
        return gain

    wide, narrow = changed(0.95), changed(0.5)
    assert wide.low is not None
    assert narrow.low is not None
    assert wide.value == narrow.value
    assert wide.low < narrow.low


def test_plain_verifiers_that_were_named_with_eopd_are_not_taken_for_others(tmp_path: Path) -> None:
    old = evaluation(tmp_path, 0, OLD, ONE, verifiers=["countdown (eopd 0.1.0)"])
    new = evaluation(tmp_path, 1, OLD, ONE, verifiers=["countdown 1"])
    run = gathered(tmp_path, old, new)
    assert (run.graders, run.warnings) == (["countdown 1"], [])
    later = evaluation(tmp_path, 2, OLD, ONE, verifiers=["countdown 2"])
    assert "(countdown 1; countdown 2)" in gathered(tmp_path, old, later).warnings[0]


def test_scores_are_by_problem_whatever_the_order_of_the_benchmarks(tmp_path: Path) -> None:
    run = gathered(tmp_path, evaluation(tmp_path, 0, OLD, ONE), evaluation(tmp_path, 1, OLD, ONE))
    assert [found.round for found in run.scores] == [0, 1]
    assert run.scores[0].names == ["a/0", "a/1", "b/0", "b/1"]
    assert run.scores[0].benchmarks == ["a", "a", "b", "b"]
    assert run.scores[0].correct == [[0, 1, 0, 1]]
    assert run.scores[0].sources == {"a": "fa", "b": "fb"}


def test_a_run_with_answers_that_were_not_graded_or_problems_left_out_does_not_look_clean(tmp_path: Path) -> None:
    clean = evaluation(tmp_path, 0, OLD, ONE, verifiers=["math-verify 0.8.0"])
    spoilt = evaluation(
        tmp_path,
        1,
        OLD,
        {**ONE, "ungraded": 3, "skipped": ["x"]},
        verifiers=["math-verify 0.9.0"],
        left_out=[{"benchmark": "b", "start": 4, "stop": 9}],
    )
    run = gathered(tmp_path, clean, spoilt)
    assert [(item.ungraded, item.left_out) for item in run.rounds] == [(0, 0), (3, 6)]
    assert run.warnings == [
        "The grader gave up on answers, which count as wrong: 3 of 8 (37.5 %) in round 1.",
        "Problems are missing, set aside after failures; figures are of the others: 5 in round 1.",
        "Problems with too long prompts are left out: 1 in round 1.",
        "Rounds were graded by different verifiers (math-verify 0.8.0; math-verify 0.9.0): changes may be due to that "
        "alone.",
    ]
    page = render(ReportData("one", "now", [run]))
    assert 'class="notes warnings"' in page
    assert all(warning in page for warning in run.warnings)
    assert "graded by math-verify 0.8.0 and math-verify 0.9.0" in page
    both = merged([run, gathered(tmp_path, clean, clean, seed=1)])
    assert both.warnings[0].startswith("Seed 0: The grader gave up")
    assert [item.ungraded for item in both.rounds] == [0, 3]
    other = gathered(tmp_path, clean, clean, name="other")
    assert "Graded by different verifiers" in render(ReportData("two", "now", [run, other]))
