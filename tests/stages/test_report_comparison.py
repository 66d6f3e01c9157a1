"""Runs on one page: seeds as one line, paired differences, work that is shared. All data are made up."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eopd.stages.evaluate.passk import pass_at_k
from eopd.stages.report.comparison import differences, table
from eopd.stages.report.data import BinnedMean, CostRow, Histogram, ProblemScores, ReportData, RoundData, RunData
from eopd.stages.report.expenses import costs, seconds_by_key
from eopd.stages.report.numbers import to_csv
from eopd.stages.report.page import render
from eopd.stages.report.seeds import grouped, merged
from eopd.storage.artifacts import Artifact, Identity
from tests.stages.made_up_report import made_up_run, made_up_scores


def runs_of(values: list[float], name: str = "a", **changes: object) -> list[RunData]:
    return [
        RunData(
            f"{name}-s{seed}",
            rounds=[RoundData(0, avg_at_k={8: value}, pass_at_k={1: value, 8: value}, rkl=value, tokens=3)],
            seed=seed,
            kin=name,
            **changes,  # type: ignore[arg-type]
        )
        for seed, value in enumerate(values)
    ]


def test_runs_that_differ_in_their_seed_become_one_with_t_intervals() -> None:
    values = [0.30, 0.34, 0.35, 0.31, 0.30]
    found = grouped([*runs_of(values), *runs_of([0.2, 0.3], "b"), RunData("alone", seed=0)])
    assert [run.name for run in found] == ["a (5 seeds)", "b (2 seeds)", "alone"]
    (item,) = found[0].rounds
    half = 2.7764 * np.std(values, ddof=1) / math.sqrt(5)
    assert item.avg_at_k[8] == pytest.approx(0.32)
    assert item.avg_interval[8] == pytest.approx((0.32 - half, 0.32 + half), abs=1e-5)
    assert item.intervals["rkl"] == pytest.approx(item.avg_interval[8])
    assert item.tokens == 3
    assert "Student t over 5 seeds" in found[0].interval
    assert found[0].settings["seed"] == "0, 1, 2, 3, 4"


def test_the_same_seed_twice_is_no_second_seed() -> None:
    one, other = runs_of([0.3, 0.4])
    assert len(grouped([one, replace(other, seed=0)])) == 2
    assert len(grouped([replace(one, kin=""), replace(other, kin="")])) == 2
    assert [run.name for run in grouped(runs_of([0.3]))] == ["a-s0"]


def test_histograms_add_up_and_bins_are_means_over_seeds() -> None:
    first, second = runs_of([0.1, 0.2])
    first = replace(
        first,
        entropy_histogram_teacher=Histogram([0.0, 1.0], [4]),
        fkl_by_entropy_bin=BinnedMean([0.0, 1.0, 2.0], [1.0, None], [30, 0]),
        cost=[CostRow("score", 0, 5.0, key="k", shared=True), CostRow("train", 0, 2.0, key="x")],
    )
    second = replace(
        second,
        entropy_histogram_teacher=Histogram([0.0, 1.0, 20.0], [5, 1]),
        fkl_by_entropy_bin=BinnedMean([0.0, 1.0, 2.0], [2.0, 7.0], [10, 5]),
        cost=[CostRow("score", 0, 5.0, key="k", shared=True), CostRow("train", 0, 3.0, key="y")],
    )
    found = merged([first, second])
    assert found.entropy_histogram_teacher == Histogram([0.0, 1.0, 20.0], [9, 1])
    binned = found.fkl_by_entropy_bin
    assert binned is not None
    assert (binned.means, binned.counts) == ([1.5, 7.0], [40, 5])
    half = 12.706 * 0.5  # Student's t with one degree of freedom, times the standard error of 1 and 2
    low, high = binned.bounds[0] or (0.0, 0.0)
    assert low == pytest.approx(1.5 - half, abs=1e-3)
    assert high == pytest.approx(1.5 + half, abs=1e-3)
    assert binned.bounds[1] is None  # only one seed has tokens there
    assert [row.seconds for row in found.cost] == [5.0, 2.0, 3.0]  # shared work counts once


def scores(correct: list[list[int]], samples: int = 4, **changes: object) -> ProblemScores:
    problems = len(correct[0])
    made = ProblemScores(
        [str(i) for i in range(problems)], [1.0] * problems, samples, list(range(len(correct))), correct
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_differences_are_paired_on_problems_and_on_seeds() -> None:
    base = RunData("base", scores=scores([[0, 1, 2, 4], [1, 1, 2, 4]]))
    other = RunData("other", scores=scores([[1, 2, 2, 4], [2, 2, 3, 4]]))
    avg, passed = differences([base, other])
    assert (avg.name, avg.metric, avg.paired_seeds) == ("other", "Avg@4", True)
    assert avg.value == pytest.approx((2 + 3) / 2 / 16)
    seeds = [2 / 16, 3 / 16]
    half = 12.7062 * np.std(seeds, ddof=1) / math.sqrt(2)
    assert avg.over_seeds is not None
    assert avg.over_seeds.low == pytest.approx(np.mean(seeds) - half, abs=1e-4)
    assert passed.metric == "Pass@4"
    assert passed.value == pytest.approx((1 + 0) / 2 / 4)
    assert avg.over_problems.low >= 0


def test_pass_at_k_is_compared_at_the_smaller_number_of_samples() -> None:
    base = RunData("base", scores=scores([[0, 1, 2, 3]], samples=4))
    other = RunData("other", scores=scores([[1, 1, 1, 1]], samples=2))
    _, passed = differences([base, other])
    assert passed.metric == "Pass@2"
    expected = np.mean([pass_at_k(2, 1, 2)] * 4) - np.mean([pass_at_k(4, c, 2) for c in (0, 1, 2, 3)])
    assert passed.value == pytest.approx(expected)
    assert passed.over_seeds is None


def test_weights_make_benchmarks_equal_and_other_problems_are_not_compared() -> None:
    base = RunData("base", scores=scores([[0, 0, 0]], weights=[1.0, 0.5, 0.5]))
    other = RunData("other", scores=scores([[4, 0, 0]], weights=[1.0, 0.5, 0.5]))
    assert differences([base, other])[0].value == pytest.approx(0.5)
    strange = RunData("strange", scores=scores([[4, 0, 0]], names=["x", "y", "z"]))
    assert differences([base, strange]) == []
    assert table([base, strange, RunData("bare")]).body == ()
    assert differences([RunData("bare"), other]) == []


def test_a_null_difference_is_rarely_called_one() -> None:
    """Two runs of equal ability on the same problems: zero is excluded about one time in twenty."""
    excluded = 0
    for trial in range(60):
        base = RunData("base", scores=made_up_scores(2 * trial + 1, 0.0, 100))
        other = RunData("other", scores=made_up_scores(2 * trial + 2, 0.0, 100))
        excluded += table([base, other]).body[0][-1] == "excluded"
    assert excluded <= 9


def test_the_page_and_the_numbers_have_the_differences() -> None:
    runs = [made_up_run("opd", 1, 0.1), made_up_run("eopd", 2, 0.5)]
    page = render(ReportData("two", "now", runs))
    assert "Differences from opd, on the same problems" in page
    assert "Avg@8" in table(runs).body[0]
    assert "round,3,,uncertain_fkl," in to_csv(ReportData("two", "now", runs))
    assert "Differences from" not in render(ReportData("one", "now", runs[:1]))
    assert "Against the teacher" in page


def test_costs_take_their_time_from_whoever_did_the_work(tmp_path: Path) -> None:
    mine, theirs = (Artifact(tmp_path, Identity("rollouts", 1, 1, {"n": n})) for n in (0, 1))
    for artifact in (mine, theirs):
        with artifact.write_part(0, info={"tokens": 7}) as folder:
            (folder / "data").write_bytes(b"12345")
    log = tmp_path / "jobs.jsonl"
    log.write_text(f'{{"key": "{mine.key}", "seconds": 2.0}}\n{{"key": "{mine.key}", "seconds": 1.5}}\n{{"k')
    jobs = [("rollout", 0, mine, None), ("rollout", 1, theirs, None), ("train", 1, theirs, 90)]
    rows = costs(jobs, seconds_by_key(log), {theirs.key: 4.0}, {mine.key})
    assert [(row.seconds, row.tokens, row.bytes, row.shared) for row in rows] == [
        (3.5, 7, 5, True),
        (4.0, 7, 5, True),
        (4.0, 90, 5, True),
    ]
    assert not costs(jobs[:1], seconds_by_key(log), {}, ())[0].shared
    assert seconds_by_key(tmp_path / "none") == {}
