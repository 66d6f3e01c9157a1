"""Runs on one page: seeds as one line, paired differences, work that is shared. All data are made up."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eopd.stages.evaluate.passk import pass_at_k
from eopd.stages.report.comparison import Difference, compare, table
from eopd.stages.report.curves import quality
from eopd.stages.report.data import (
    FORWARD_KL,
    BinnedMean,
    CostRow,
    Histogram,
    ProblemScores,
    ReportData,
    RoundData,
    RunData,
)
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
        by_entropy_bin={FORWARD_KL: BinnedMean([0.0, 1.0, 2.0], [1.0, None], [30, 0])},
        read_with={"the teacher": "t", "the fixed set": "a"},
        cost=[CostRow("score", 0, 5.0, key="k", shared=True), CostRow("train", 0, 2.0, key="x")],
    )
    second = replace(
        second,
        entropy_histogram_teacher=Histogram([0.0, 1.0, 20.0], [5, 1]),
        by_entropy_bin={FORWARD_KL: BinnedMean([0.0, 1.0, 2.0], [2.0, 7.0], [10, 5])},
        read_with={"the teacher": "t", "the fixed set": "b"},
        cost=[CostRow("score", 0, 5.0, key="k", shared=True), CostRow("train", 0, 3.0, key="y")],
    )
    found = merged([first, second])
    assert found.entropy_histogram_teacher == Histogram([0.0, 1.0, 20.0], [9, 1])
    assert found.read_with == {"the teacher": "t"}
    binned = found.by_entropy_bin[FORWARD_KL]
    assert (binned.means, binned.counts) == ([1.5, 7.0], [40, 5])
    half = 12.706 * 0.5  # Student's t with one degree of freedom, times the standard error of 1 and 2
    low, high = binned.bounds[0] or (0.0, 0.0)
    assert low == pytest.approx(1.5 - half, abs=1e-3)
    assert high == pytest.approx(1.5 + half, abs=1e-3)
    assert binned.bounds[1] is None  # only one seed has tokens there
    alike = merged(
        [replace(run, by_entropy_bin={"Top-1 agreement": BinnedMean([0.0, 1.0], [1.0])}) for run in (first, second)]
    )
    assert alike.by_entropy_bin["Top-1 agreement"] == BinnedMean([0.0, 1.0], [1.0], None, [None])
    assert [row.seconds for row in found.cost] == [5.0, 2.0, 3.0]  # shared work counts once


def scores(correct: list[list[int]], samples: int = 4, **changes: object) -> ProblemScores:
    problems = len(correct[0])
    made = ProblemScores(
        1, [str(i) for i in range(problems)], ["one"] * problems, samples, list(range(len(correct))), correct
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def differences(runs: list[RunData]) -> list[Difference]:
    return list(compare(runs).differences)


def test_differences_are_paired_on_problems_and_on_seeds() -> None:
    base = RunData("base", scores=[scores([[0, 1, 2, 4], [1, 1, 2, 4]])])
    other = RunData("other", scores=[scores([[1, 2, 2, 4], [2, 2, 3, 4]])])
    avg, passed = differences([base, other])
    assert (avg.name, avg.metric, avg.pairs, avg.round) == ("other", "Avg@4", (0, 1), 1)
    assert avg.value == pytest.approx((2 + 3) / 2 / 16)
    seeds = [2 / 16, 3 / 16]
    half = 12.7062 * np.std(seeds, ddof=1) / math.sqrt(2)
    assert avg.over_seeds is not None
    assert avg.over_seeds.low == pytest.approx(np.mean(seeds) - half, abs=1e-4)
    assert passed.metric == "Pass@4"
    assert passed.value == pytest.approx((1 + 0) / 2 / 4)
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


def test_benchmarks_count_the_same_and_other_problems_are_not_compared() -> None:
    base = RunData("base", scores=[scores([[0, 0, 0]], benchmarks=["a", "b", "b"])])
    other = RunData("other", scores=[scores([[4, 0, 0]], benchmarks=["a", "b", "b"])])
    assert differences([base, other])[0].value == pytest.approx(0.5)
    strange = RunData("strange", scores=[scores([[4, 0, 0]], names=["0", "y", "z"])])
    found = compare([base, strange, RunData("bare")])
    assert table(found).body == ()
    (note,) = found.notes
    assert note.startswith("strange is not compared: it was not evaluated on the problems of base (2 of its 3")
    assert "strange is not compared" in render(ReportData("two", "now", [base, strange]))
    assert compare([base, strange, other]).differences == tuple(differences([base, other]))
    assert differences([RunData("bare"), other]) == []


def test_problems_of_another_file_are_not_compared_whatever_their_ids() -> None:
    base = RunData("base", scores=[scores([[0, 0, 0]], sources={"one": "f1"})])
    other = RunData("other", scores=[scores([[4, 0, 0]], sources={"one": "f2"})])
    found = compare([base, other])
    assert found.differences == ()
    assert found.notes == (
        "other is not compared: its problems and those of base are of different files (benchmark one), and may differ "
        "under the same ids.",
    )
    assert len(differences([base, replace(other, scores=[scores([[4, 0, 0]], sources={"one": "f1"})])])) == 2


def test_what_was_sampled_otherwise_is_said_beside_the_difference() -> None:
    def run(name: str, **evaluate: object) -> RunData:
        return RunData(name, settings={"evaluate": evaluate}, scores=[scores([[0, 1, 2]])])

    same = {"benchmarks": [{"path": "a"}], "engine": "vllm", "engine_options": {"max_batch": 1}, "every": 1}
    base = run("opd", temperature=1.0, suffix="", **same)
    cold = run("cold", temperature=0.2, suffix="", benchmarks=[{"path": "b"}], engine="auto", every=2)
    found = compare([base, cold, replace(base, name="twin")])
    assert [one.name for one in found.differences] == ["cold", "cold", "twin", "twin"]
    assert found.notes == (
        "Evaluated with other settings, which may be all of a difference: evaluate.temperature is 1.0 in opd and 0.2 "
        "in cold.",
    )
    (note,) = compare([base, run("asked", temperature=1.0, suffix="Think.", system="Be brief.", **same)]).notes
    assert "evaluate.suffix is empty in opd and Think. in asked" in note
    assert "evaluate.system is not set in opd and Be brief. in asked" in note


def evaluated(name: str, seed: int, shares: list[float], kin: str = "") -> RunData:
    """A run that was evaluated after rounds 0, 1, ...: of 40 problems with 4 samples, about a share is right."""
    rng = np.random.default_rng(seed)
    rounds = [RoundData(number, {4: share}, {4: share}) for number, share in enumerate(shares)]
    found = [
        scores([rng.binomial(4, share, 40).tolist()], round=number, seeds=[seed]) for number, share in enumerate(shares)
    ]
    empty = [RoundData(number) for number in range(len(shares), 5)]
    return RunData(name, rounds=[*rounds, *empty], scores=found, seed=seed, kin=kin)


RISING = [0.1, 0.25, 0.35, 0.45, 0.5]


def test_runs_that_stopped_at_different_rounds_are_compared_at_the_last_that_both_have() -> None:
    """Otherwise a run that was killed after round 1 would look worse than one that went on to round 4."""
    whole, killed = evaluated("opd", 0, RISING), evaluated("eopd", 1, RISING[:2])
    found = compare([whole, killed])
    assert {one.round for one in found.differences} == {1}
    value = np.mean(killed.scores[1].correct) / 4 - np.mean(whole.scores[1].correct) / 4
    assert found.differences[0].value == pytest.approx(value)
    assert abs(value) < 0.1
    note = next(note for note in found.notes if "different rounds" in note)
    assert "eopd up to round 1 and opd up to round 4" in note
    page = render(ReportData("two", "now", [whole, killed]))
    assert "Differences from opd, on the same problems" in page
    assert table(found).head[1] == "round"
    assert [row[1] for row in table(found).body] == ["1", "1"]
    assert "Avg@4 after round 1, the last that all have, is highest in opd at 0.250, then eopd at 0.250" in page
    later = replace(whole, name="later", rounds=whole.rounds[2:], scores=whole.scores[2:])
    assert compare([killed, later]).differences == ()
    assert "later was evaluated after round 2, 3 and 4" in compare([killed, later]).notes[0]


def test_a_run_that_is_behind_changes_no_comparison_of_the_others() -> None:
    base, other, late = evaluated("opd", 0, RISING), evaluated("eopd", 1, RISING), evaluated("late", 2, RISING[:1])
    alone, found = compare([base, other]), compare([base, late, other])
    assert not any("different rounds" in note for note in alone.notes)
    assert {one.round for one in alone.differences} == {4}
    assert tuple(one for one in found.differences if one.name == "eopd") == alone.differences
    assert {one.round for one in found.differences if one.name == "late"} == {0}
    (note,) = (note for note in found.notes if "different rounds" in note)
    assert "late up to round 0 and opd up to round 4" in note
    assert "eopd" not in note


def test_seeds_that_stopped_at_different_rounds_are_merged_up_to_the_last_that_all_have() -> None:
    runs = [evaluated("eopd-s0", 0, RISING, "eopd"), evaluated("eopd-s1", 1, [0.2, 0.3], "eopd")]
    (found,) = grouped(runs)
    assert [item.avg_at_k.get(4) for item in found.rounds] == [
        pytest.approx(0.15),
        pytest.approx(0.275),
        None,
        None,
        None,
    ]
    assert [item.round for item in found.scores] == [0, 1]
    changes = [(np.mean(run.scores[1].correct) - np.mean(run.scores[0].correct)) / 4 for run in runs]
    assert found.avg_gain is not None
    assert found.avg_gain.value == pytest.approx(np.mean(changes))
    assert found.notes[1] == (
        "Not every seed was evaluated after round 2, 3 and 4 (seed 0 after 2, 3 and 4; seed 1 after none of these): "
        "means, gains and pairs leave them out."
    )
    assert not any("Not every seed" in note for note in grouped([runs[0], replace(runs[0], seed=1)])[0].notes)


def test_seeds_with_other_intervals_of_evaluation_are_one_whole_line() -> None:
    often = evaluated("eopd-s0", 0, RISING, "eopd")
    rounds = [
        item if number % 2 == 0 else RoundData(number, measured=False) for number, item in enumerate(often.rounds)
    ]
    seldom = replace(often, name="eopd-s1", seed=1, rounds=rounds, scores=often.scores[::2])
    (found,) = grouped([often, seldom])
    (drawn,) = (figure for figure in quality([found]) if figure.name == "avg-at-k")
    (line,) = drawn.marks
    assert [(point.x, point.y) for point in line.points] == [(n, pytest.approx(RISING[n])) for n in (0, 2, 4)]
    assert found.notes[1] == (
        "Not every seed was evaluated after round 1 and 3 (seed 0 after 1 and 3; seed 1 after none of these): "
        "means, gains and pairs leave them out."
    )
    broken = replace(
        often, seed=1, rounds=[replace(item, avg_at_k={}) if item.round == 1 else item for item in often.rounds]
    )
    (drawn,) = (figure for figure in quality(grouped([often, broken])) if figure.name == "avg-at-k")
    assert drawn.marks[0].points[1].y is None, "one that was to be measured and is not leaves a gap"


def test_seeds_are_paired_whatever_their_order_and_those_of_one_run_alone_are_left_out() -> None:
    """Differences of exactly 0.25 in every pair: unpaired, the spread of the seeds would hide them."""
    correct = {seed: [seed, (seed + 1) % 3, 1, 0] for seed in range(3)}
    better = {seed: [count + 1 for count in row] for seed, row in correct.items()}
    base = RunData("base", scores=[scores([correct[0], correct[1], correct[2]])])
    other = RunData("other", scores=[scores([better[2], [4, 4, 4, 4], better[0]], seeds=[2, 7, 0])])
    found = compare([base, other])
    avg = found.differences[0]
    assert avg.pairs == (0, 2)
    assert avg.value == pytest.approx(0.25)
    assert avg.over_seeds is not None
    assert (avg.over_seeds.low, avg.over_seeds.high) == pytest.approx((0.25, 0.25))
    assert found.notes == ("other and base are compared on seeds 0 and 2; only one of them has 1 and 7.",)
    assert "2 pairs" in table(found).body[0][5]
    strangers = RunData("strangers", scores=[scores([better[2], better[0]], seeds=[5, 6])])
    unpaired = compare([base, strangers])
    assert unpaired.differences[0].pairs == ()
    assert unpaired.differences[0].over_seeds is not None
    assert "not compared in pairs" in unpaired.notes[0]
    assert "not in pairs" in table(unpaired).body[0][5]


def test_one_problem_says_nothing_of_others() -> None:
    runs = [RunData("base", scores=[scores([[0]])]), RunData("other", scores=[scores([[4]])])]
    found = compare(runs)
    assert found.differences[0].value == 1.0
    assert found.differences[0].over_problems is None
    assert table(found).body[0][4:] == ("one problem", "one seed", "not known")


def test_the_numbers_have_the_differences_with_both_intervals() -> None:
    runs = [
        RunData("base", scores=[made_up_scores(1, 0.1, seeds=3)]),
        RunData("=b", scores=[made_up_scores(2, 0.5, seeds=3)]),
    ]
    rows = {
        (row["section"], row["name"]): row
        for row in csv.DictReader(to_csv(ReportData("two", "now", runs)).splitlines())
        if row["section"].startswith("difference")
    }
    assert len(rows) == 4
    avg, passed = compare(runs).differences
    for one in (avg, passed):
        for over, interval in (("problems", one.over_problems), ("seeds", one.over_seeds)):
            row = rows[f"difference_over_{over}", f"{one.which}_at_k"]
            assert interval is not None
            assert (row["run"], row["round"], row["x"]) == ("'=b", "5", "8")
            assert [float(row[name]) for name in ("value", "low", "high")] == [one.value, interval.low, interval.high]


def test_a_null_difference_is_rarely_called_one() -> None:
    """Two runs of equal ability on the same problems: zero is excluded about one time in twenty."""
    excluded = 0
    for trial in range(60):
        base = RunData("base", scores=[made_up_scores(2 * trial + 1, 0.0, 100)])
        other = RunData("other", scores=[made_up_scores(2 * trial + 2, 0.0, 100)])
        excluded += table(compare([base, other])).body[0][-1] == "excluded"
    assert excluded <= 9


def test_the_page_and_the_numbers_have_the_differences() -> None:
    runs = [made_up_run("opd", 1, 0.1), made_up_run("eopd", 2, 0.5)]
    page = render(ReportData("two", "now", runs))
    assert "Differences from opd, on the same problems" in page
    assert "Avg@8" in table(compare(runs)).body[0]
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
    assert costs(jobs[:1], seconds_by_key(log), {mine.key: 1.0}, ())[0].seconds == 4.5, "both did parts of it"
    assert seconds_by_key(log, log) == {mine.key: 7.0}
    assert seconds_by_key(tmp_path / "none") == {}
