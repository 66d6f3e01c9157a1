"""Runs on one page: paired differences, and seeds as one line. All data are made up."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import numpy as np
import pytest

from eopd.stages.evaluate.summary import pass_at_k
from eopd.stages.report.compare import Difference, compare, grouped, merged
from eopd.stages.report.data import (
    OWN,
    BinnedMeans,
    CostRow,
    Estimate,
    Histogram,
    ProblemScores,
    ReportData,
    RoundData,
    RunData,
    StepRow,
)
from eopd.stages.report.run import to_csv
from tests.stages.made_up_report import problem_scores


def runs_of(values: list[float], name: str = "a", **changes: object) -> list[RunData]:
    return [
        RunData(
            f"{name}-s{seed}",
            rounds=[RoundData(0, {"avg": Estimate(value), "rkl": Estimate(value)}, {8: Estimate(value)}, 3, 8)],
            seed=seed,
            kin=name,
            **changes,  # type: ignore[arg-type]
        )
        for seed, value in enumerate(values)
    ]


def test_runs_that_differ_in_their_seed_become_one_with_t_intervals() -> None:
    values = [0.30, 0.34, 0.35, 0.31, 0.30]
    result = grouped([*runs_of(values), *runs_of([0.2, 0.3], "b"), RunData("alone", seed=0)])
    assert [run.name for run in result] == ["a (5 seeds)", "b (2 seeds)", "alone"]
    (item,) = result[0].rounds
    half = 2.7764 * np.std(values, ddof=1) / math.sqrt(5)
    assert item.value("avg") == pytest.approx(0.32)
    assert item.figures["rkl"].bounds == pytest.approx((0.32 - half, 0.32 + half), abs=1e-5)
    assert item.pass_at[8].bounds == item.figures["avg"].bounds
    assert (item.problems, item.samples) == (3, 8)
    assert result[0].interval == "95 % Student t over 5 seeds"
    assert result[0].settings["seed"] == "0, 1, 2, 3, 4"


def test_the_same_seed_twice_is_no_second_seed() -> None:
    one, other = runs_of([0.3, 0.4])
    assert len(grouped([one, replace(other, seed=0)])) == 2
    assert len(grouped([replace(one, kin=""), replace(other, kin="")])) == 2
    assert [run.name for run in grouped(runs_of([0.3]))] == ["a-s0"]


def test_histograms_add_up_and_the_rest_are_means_over_seeds() -> None:
    first, second = runs_of([0.1, 0.2])
    first = replace(
        first,
        teacher_entropy=Histogram([0.0, 1.0], [4]),
        bins={OWN: {"fkl": BinnedMeans([0.0, 1.0, 2.0], [Estimate(1.0), None])}},
        training=[StepRow(0, 0, {"loss": 1.0, "clip": 1.0}), StepRow(1, 0, {"loss": 9.0})],
        read_with={"the teacher": "t", "the fixed set": "a"},
        cost=[CostRow("score", 0, 5.0, key="k", shared=True), CostRow("train", 0, 2.0, key="x")],
    )
    second = replace(
        second,
        teacher_entropy=Histogram([0.0, 1.0, 20.0], [5, 1]),
        bins={OWN: {"fkl": BinnedMeans([0.0, 1.0, 2.0], [Estimate(2.0), Estimate(7.0)])}},
        training=[StepRow(0, 0, {"loss": 3.0})],
        read_with={"the teacher": "t", "the fixed set": "b"},
        cost=[CostRow("score", 0, 5.0, key="k", shared=True), CostRow("train", 0, 3.0, key="y")],
    )
    settings = merged([first, second])
    assert settings.teacher_entropy == Histogram([0.0, 1.0, 20.0], [9, 1])
    assert settings.training == [StepRow(0, 0, {"loss": 2.0, "clip": 1.0})]  # only the round that both trained
    assert settings.read_with == {"the teacher": "t"}
    low, high = settings.bins[OWN]["fkl"].means
    half = 12.706 * 0.5  # Student's t with one degree of freedom, times the standard error of 1 and 2
    assert low is not None
    assert low.bounds == pytest.approx((1.5 - half, 1.5 + half), abs=1e-3)
    assert high == Estimate(7.0)  # only one seed has tokens there
    alike = [
        replace(run, bins={OWN: {"agreement": BinnedMeans([0.0, 1.0], [Estimate(1.0)])}}) for run in (first, second)
    ]
    assert merged(alike).bins[OWN]["agreement"].means == [Estimate(1.0)]
    assert [row.seconds for row in settings.cost] == [5.0, 2.0, 3.0]  # shared work counts once


def scores(correct: list[list[int]], samples: int = 4, **changes: object) -> ProblemScores:
    problems = len(correct[0])
    names, seeds = [str(i) for i in range(problems)], list(range(len(correct)))
    return replace(ProblemScores(1, names, ["one"] * problems, samples, seeds, correct), **changes)  # type: ignore[arg-type]


def differences(runs: list[RunData]) -> list[Difference]:
    return list(compare(runs).differences)


def test_differences_are_paired_on_problems_and_on_seeds() -> None:
    base = RunData("base", scores=[scores([[0, 1, 2, 4], [1, 1, 2, 4]])])
    other = RunData("other", scores=[scores([[1, 2, 2, 4], [2, 2, 3, 4]])])
    avg, passed = differences([base, other])
    assert (avg.name, avg.metric, avg.pairs, avg.round) == ("other", "Avg@4", (0, 1), 1)
    assert avg.value == pytest.approx((2 + 3) / 2 / 16)
    half = 12.7062 * np.std([2 / 16, 3 / 16], ddof=1) / math.sqrt(2)
    assert avg.over_seeds is not None
    assert avg.over_seeds.low == pytest.approx(2.5 / 16 - half, abs=1e-4)
    assert (passed.metric, passed.value) == ("Pass@4", pytest.approx((1 + 0) / 2 / 4))
    assert avg.over_problems is not None
    assert avg.over_problems.low >= 0
    assert compare([base, other]).notes == ()


def test_pass_at_k_is_compared_at_the_smaller_number_of_samples() -> None:
    base = RunData("base", scores=[scores([[0, 1, 2, 3]], samples=4)])
    other = RunData("other", scores=[scores([[1, 1, 1, 1]], samples=2)])
    avg, passed = differences([base, other])
    assert (avg.metric, passed.metric) == ("Avg@k", "Pass@2")
    row = next(row for row in to_csv(ReportData("two", "now", [base, other])).splitlines() if "avg_at_k" in row)
    assert row.startswith("other,difference_over_problems,1,,avg_at_k,")
    expected = np.mean([pass_at_k(2, 1, 2)] * 4) - np.mean([pass_at_k(4, c, 2) for c in (0, 1, 2, 3)])
    assert passed.value == pytest.approx(expected)
    assert passed.over_seeds is None


def test_benchmarks_count_the_same() -> None:
    base, other = (
        RunData(name, scores=[scores([[correct, 0, 0]], benchmarks=["a", "b", "b"])])
        for name, correct in (("base", 0), ("other", 4))
    )
    assert differences([base, other])[0].value == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"names": ["0", "y", "z"]}, "only 1 of its 3 problems"),
        ({"sources": {"one": "f2"}}, "the files of benchmark one differ"),
        ({"round": 2}, "other after round 2 and base after round 1"),
    ],
)
def test_other_problems_are_not_compared(changes: dict[str, object], text: str) -> None:
    base = RunData("base", scores=[scores([[0, 0, 0]], sources={"one": "f1"})])
    other = RunData("other", scores=[scores([[4, 0, 0]], **{"sources": {"one": "f1"}, **changes})])
    comparison = compare([base, other, RunData("bare")])
    assert comparison.differences == ()
    assert comparison.notes[0].startswith("other is not compared with base")
    assert text in comparison.notes[0]


def test_what_was_sampled_otherwise_is_said_beside_the_difference() -> None:
    def run(name: str, graders: list[str] | None = None, **evaluate: object) -> RunData:
        settings = {"evaluate": {"benchmarks": [name], "engine": name, **evaluate}}
        return RunData(name, settings=settings, scores=[scores([[0, 1, 2]])], graders=graders or ["g 1"])

    base = run("opd", temperature=1.0, suffix="")
    assert compare([base, run("twin", temperature=1.0, suffix="")]).notes == ()
    (note,) = compare([base, run("cold", temperature=0.2, suffix="", system="Be brief.")]).notes
    assert "evaluate.temperature is 1.0 in opd and 0.2 in cold" in note
    assert "evaluate.system is not set in opd and Be brief. in cold" in note
    (note,) = compare([base, run("graded", ["g 2"], temperature=1.0, suffix="")]).notes
    assert "g 1 in opd and g 2 in graded" in note


def evaluated(name: str, seed: int, shares: list[float], kin: str = "") -> RunData:
    """A run that was evaluated after rounds 0, 1, ...: of 40 problems with 4 samples, about a share is right."""
    rng = np.random.default_rng(seed)
    rounds = [RoundData(number, {"avg": Estimate(share)}, samples=4) for number, share in enumerate(shares)]
    result = [
        scores([rng.binomial(4, share, 40).tolist()], round=number, seeds=[seed]) for number, share in enumerate(shares)
    ]
    empty = [RoundData(number) for number in range(len(shares), 5)]
    return RunData(name, rounds=[*rounds, *empty], scores=result, seed=seed, kin=kin)


RISING = [0.1, 0.25, 0.35, 0.45, 0.5]


def test_runs_that_stopped_at_different_rounds_are_compared_at_the_last_that_both_have() -> None:
    """Otherwise a run that was killed after round 1 would look worse than one that went on to round 4."""
    whole, killed, other = evaluated("opd", 0, RISING), evaluated("eopd", 1, RISING[:2]), evaluated("fkl", 2, RISING)
    comparison = compare([whole, killed, other])
    assert {(one.name, one.round) for one in comparison.differences} == {("eopd", 1), ("fkl", 4)}
    value = np.mean(killed.scores[1].correct) / 4 - np.mean(whole.scores[1].correct) / 4
    assert comparison.differences[0].value == pytest.approx(value)
    (note,) = (note for note in comparison.notes if "Last evaluations" in note)
    assert "opd after round 4, eopd after round 1 and fkl after round 4" in note


def test_seeds_that_stopped_at_different_rounds_are_merged_up_to_the_last_that_all_have() -> None:
    runs = [evaluated("eopd-s0", 0, RISING, "eopd"), evaluated("eopd-s1", 1, [0.2, 0.3], "eopd")]
    (result,) = grouped(runs)
    assert [item.value("avg") for item in result.rounds] == [
        pytest.approx(0.15),
        pytest.approx(0.275),
        None,
        None,
        None,
    ]
    assert [item.round for item in result.scores] == [0, 1]
    changes = [(np.mean(run.scores[1].correct) - np.mean(run.scores[0].correct)) / 4 for run in runs]
    assert result.gains["avg"].value == pytest.approx(np.mean(changes))
    assert "seed 0 after 2, 3 and 4; seed 1 after none" in result.notes[1]
    assert len(grouped([runs[0], replace(runs[0], seed=1)])[0].notes) == 1


def test_seeds_are_paired_whatever_their_order_and_those_of_one_run_alone_are_left_out() -> None:
    """Differences of exactly 0.25 in every pair: unpaired, the spread of the seeds would hide them."""
    correct = {seed: [seed, (seed + 1) % 3, 1, 0] for seed in range(3)}
    better = {seed: [count + 1 for count in row] for seed, row in correct.items()}
    base = RunData("base", scores=[scores([correct[0], correct[1], correct[2]])])
    other = RunData("other", scores=[scores([better[2], [4, 4, 4, 4], better[0]], seeds=[2, 7, 0])])
    comparison = compare([base, other])
    avg = comparison.differences[0]
    assert (avg.pairs, avg.value) == ((0, 2), pytest.approx(0.25))
    assert avg.over_seeds is not None
    assert (avg.over_seeds.low, avg.over_seeds.high) == pytest.approx((0.25, 0.25))
    assert comparison.notes == ("other and base are compared on seeds 0 and 2; only one has 1 and 7.",)
    strangers = RunData("strangers", scores=[scores([better[2], better[0]], seeds=[5, 6])])
    unpaired = compare([base, strangers])
    assert unpaired.differences[0].pairs == ()
    assert unpaired.differences[0].over_seeds is not None
    assert "not compared in pairs" in unpaired.notes[0]


def test_few_problems_say_little() -> None:
    one = [RunData("base", scores=[scores([[0]])]), RunData("other", scores=[scores([[4]])])]
    (avg, _) = differences(one)
    assert (avg.value, avg.over_problems, avg.over_seeds, avg.zero) == (1.0, None, None, "not known")
    none = ProblemScores(0, [], [], 0, [0], [[]])
    assert compare([RunData("base", scores=[none]), RunData("other", scores=[none])]).differences == ()


def test_a_null_difference_is_rarely_called_one() -> None:
    """Two runs of equal ability on the same problems: zero is excluded about one time in twenty."""
    excluded = 0
    for trial in range(60):
        pair = [RunData(str(n), scores=[problem_scores(2 * trial + n, 0.0, 100)]) for n in (1, 2)]
        excluded += differences(pair)[0].zero == "excluded"
    assert excluded <= 9


def test_the_numbers_have_the_differences_with_both_intervals() -> None:
    runs = [RunData(name, scores=[problem_scores(n, 0.2 * n, seeds=3)]) for n, name in enumerate(["base", "=b"])]
    rows = {
        (row["section"], row["name"]): row
        for row in csv.DictReader(to_csv(ReportData("two", "now", runs)).splitlines())
        if row["section"].startswith("difference")
    }
    assert len(rows) == 4
    for one in differences(runs):
        for over, interval in (("problems", one.over_problems), ("seeds", one.over_seeds)):
            row = rows[f"difference_over_{over}", f"{one.which}_at_k"]
            assert interval is not None
            assert (row["run"], row["round"], row["x"]) == ("'=b", "5", "8")
            assert [float(row[name]) for name in ("value", "low", "high")] == [one.value, interval.low, interval.high]
