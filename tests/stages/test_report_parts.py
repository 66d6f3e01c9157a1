"""The pieces under the report page: data, words, scales, headline, tables, files. All data are made up."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eopd.stages.report import headline, numbers, palette, plots, raster, tables, words
from eopd.stages.report.curves import by_step, quality
from eopd.stages.report.data import (
    BinnedMean,
    CostRow,
    Estimate,
    Histogram,
    ProblemScores,
    ReportData,
    RolloutView,
    RoundData,
    RunData,
    StepRow,
)
from eopd.stages.report.distributions import share_above
from eopd.stages.report.figure import Axis, Figure, Line, Point, rows, thin
from eopd.stages.report.job import ReportJob
from eopd.stages.report.page import render
from eopd.stages.report.palette import heat
from eopd.stages.report.run import run
from eopd.stages.report.scales import Scale, log_ticks, tick_labels, ticks, value_range
from tests.stages.made_up_report import made_up_report, made_up_run, made_up_scores


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 entries for 1 tokens"):
        RolloutView("p", ["a"], [0.1, 0.2])
    with pytest.raises(ValueError, match="counts has 2 entries for 2 edges"):
        Histogram([0.0, 1.0], [1, 2])
    with pytest.raises(ValueError, match="edges must increase"):
        BinnedMean([0.0, 0.0], [1.0])


def test_step_rows_keep_further_figures() -> None:
    row = StepRow.of({"round": 1, "step": 4, "loss": 0.5, "clip": 2, "what": "text", "flag": True})
    assert row == StepRow(1, 4, loss=0.5, further={"clip": 2.0})


@pytest.mark.parametrize(
    ("text", "value", "form"),
    [
        ("0.221", 0.2214, "rate"),
        ("−0.050", -0.05, "rate"),
        ("4.2 %", 0.0417, "percent"),
        ("51\u202f204", 51_204, "count"),
        ("1.05M", 1_046_000, "count"),
        ("0.0417", 0.04172, "number"),
        ("12.3", 12.345, "number"),
        ("1\u202f234", 1234.0, "count"),
        ("1.23e-06", 1.23e-6, "number"),
        ("0", 0.0, "number"),
        ("not measured", None, "rate"),
        ("not finite", math.nan, "rate"),
    ],
)
def test_numbers_as_people_read_them(text: str, value: float | None, form: words.Form) -> None:
    assert words.number(value, form) == text


def test_other_words() -> None:
    assert words.change(0.2111) == "+0.211"
    assert words.change(-0.2) == "−0.200"
    assert words.change(0.0001) == "0.000"
    assert words.duration(3.21) == "3.2 s"
    assert words.duration(59) == "59 s"
    assert words.duration(125) == "2 min 05 s"
    assert words.duration(7320) == "2 h 02 min"
    assert words.duration(None) == "not measured"
    assert words.size(1_234_000) == "1.23 MB"
    assert words.size(5e15) == "5e+03 TB"
    assert words.interval(0.1, 0.2) == "0.100–0.200"
    assert words.interval(None, 0.2) == ""
    assert words.printable("a\x00b\u202ec\ud800\x7f") == "a␀b⟨U+202E⟩c\ufffd␡"
    assert words.printable("abcdef", 4) == "abc…"


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 6))
def test_ticks_lie_inside_and_are_even(low: float, span: float, count: int) -> None:
    found = ticks(low, low + span, count)
    assert 1 <= len(found) <= count + 2
    assert all(low - 1e-6 * span <= value <= low + span * (1 + 1e-6) for value in found)
    labels = tick_labels(found, "number")
    assert len(labels) == len(found)


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20))
def test_a_value_axis_holds_its_values(values: list[float]) -> None:
    low, high = value_range(values)
    assert low < high
    assert low <= min(values)
    assert max(values) <= high


def test_scales() -> None:
    assert Scale(0, 10, 100, 200)(5) == 150
    assert Scale(1, 100, 0, 2, log=True)(10) == pytest.approx(1)
    assert Scale(0.1, 100, 0, 3, log=True)(0) == 0
    assert value_range([0.2, 0.9], 0, 1)[1] <= 1
    assert value_range([0.95, 0.96], 0, 1)[0] > 0.9
    assert value_range([0.0]) == (0, 1)
    assert value_range([1.0], 0, 1)[1] == 1
    assert log_ticks(1, 8, 2) == [1, 2, 4, 8]
    assert ticks(0, 2, 5, whole=True) == [0, 1, 2]
    assert tick_labels([0.001, 0.1], "percent", log=True) == ["0.1 %", "10 %"]
    assert tick_labels([20_000, 40_000], "count") == ["20k", "40k"]
    assert tick_labels([0, 2e-7], "number")[1] == "2.0e-07"
    assert tick_labels([], "number") == []
    assert [heat(value) for value in (0, 0.05, 0.79, 0.8, 9)] == [0, 1, 3, 4, 6]


def test_thinning_keeps_means_and_ranges() -> None:
    points = [Point(x, None if x < 20 else math.nan if x == 25 else float(x)) for x in range(1000)]
    thinned = thin(points, 100)
    assert len(thinned) == 100
    assert thinned[0].y is None
    assert thinned[1].y is None
    assert thinned[2] == Point(25, pytest.approx((sum(range(20, 30)) - 25) / 9), 20, 29)
    assert thinned[99].y == pytest.approx(994.5)
    assert thin(points, 1000) == tuple(points)


def test_the_table_behind_a_figure() -> None:
    lines = (
        Line("a", (Point(0, None), Point(1, 0.5, 0.4, 0.6)), "c0"),
        Line("b", (Point(1, math.inf),), "c1"),
    )
    figure = Figure("f", "F", "", Axis("round", "count", whole=True), Axis("y", "rate"), lines)
    found = rows(figure)
    assert found.head == ("round", "a", "b")
    assert found.body == (("0", "not measured", "not measured"), ("1", "0.500 (0.400–0.600)", "not finite"))


def gain_of(first: RoundData, last: RoundData, paired: Estimate | None = None) -> headline.RunSummary:
    return headline.summarise([RunData("r", rounds=[first, last], avg_gain=paired)])[0]


@pytest.mark.parametrize(
    ("first", "last", "paired", "sentence", "settled"),
    [
        (0.2, 0.4, None, "Avg@4 rose from 0.200 to 0.400.", "the two intervals do not overlap"),
        (0.4, 0.2, None, "Avg@4 fell from 0.400 to 0.200.", "the two intervals do not overlap"),
        (0.4, 0.42, None, "Avg@4 rose from 0.400 to 0.420.", "the two intervals overlap"),
        (0.4, 0.4001, None, "Avg@4 stayed at 0.400.", "the two intervals overlap"),
        (0.4, 0.42, Estimate(0.02, 0.01, 0.03), "Avg@4 rose from 0.400 to 0.420.", "of the change excludes zero"),
        (0.4, 0.42, Estimate(0.02, -0.01, 0.05), "Avg@4 rose from 0.400 to 0.420.", "of the change includes zero"),
    ],
)
def test_the_headline_says_what_was_gained(
    first: float, last: float, paired: Estimate | None, sentence: str, settled: str
) -> None:
    rounds = [
        RoundData(number, {4: value}, avg_interval={4: (value - 0.05, value + 0.05)})
        for number, value in enumerate((first, last))
    ]
    summary = gain_of(rounds[0], rounds[1], paired)
    assert headline.sentence([summary]) == [sentence]
    assert settled in summary.gains[0].detail


def test_a_gain_of_all_samples_is_not_shown_as_one_at_fewer() -> None:
    """Where another run has 4 samples, Pass@4 is shown of both; the paired change of this run is that of Pass@8."""
    rounds = [RoundData(0, {8: 0.1}, {4: 0.2, 8: 0.3}), RoundData(1, {8: 0.2}, {4: 0.5, 8: 0.9})]
    paired = {"avg_gain": Estimate(0.1, 0.05, 0.15), "pass_gain": Estimate(0.6, 0.5, 0.7)}
    eight = RunData("eight", rounds=rounds, **paired, scores=[made_up_scores(1, 0.1)])
    four = RunData("four", rounds=[RoundData(0, {4: 0.1}, {4: 0.2})])
    avg, gain = headline.summarise([eight, four])[0].gains
    assert (avg.name, avg.paired) == ("Avg@k", paired["avg_gain"])
    assert (gain.name, gain.paired) == ("Pass@4", None)
    assert gain.difference == pytest.approx(0.3)
    assert headline.summarise([eight])[0].gains[1].paired == Estimate(0.6, 0.5, 0.7)


def test_a_gain_on_other_problems_is_said_to_be_such() -> None:
    """A part of the last evaluation was set aside: two problems at first, one of them at last."""
    two, one = ended("run", {0: 0.25}, problems=2), ended("run", {1: 0.5})
    run = replace(two, rounds=[*two.rounds, *one.rounds], scores=[*two.scores, *one.scores])
    assert said_of(run) == "Avg@8 rose from 0.250 to 0.500, on other problems."
    assert "on other problems" in headline.summarise([run])[0].gains[0].detail
    later = replace(ended("later", {0: 0.25, 1: 0.25}), avg_gain=Estimate(0.0, -0.1, 0.1))
    assert said_of(later) == "Avg@8 stayed at 0.250."
    assert said_of(run, later) == (
        "Avg@8 ends highest in run at 0.500 (from 0.250, on other problems), then later at 0.250."
    )
    merged = replace(run, scores=run.scores[:1])  # seeds that were not asked the same at last
    assert said_of(merged) == "Avg@8 rose from 0.250 to 0.500, on other problems."


def test_one_evaluation_is_no_gain() -> None:
    summary = headline.summarise([RunData("r", rounds=[RoundData(3, {8: 0.25})])])[0]
    assert headline.sentence([summary]) == ["Avg@8 is 0.250 after round 3; no other round was evaluated."]
    assert summary.gains[0].last is None


def ended(name: str, shares: dict[int, float], benchmark: str = "one", problems: int = 1) -> RunData:
    """A run with these Avg@8 after these rounds, of problems of one benchmark."""
    names = [f"{benchmark}/{number}" for number in range(problems)]
    scores = [
        ProblemScores(number, names, [benchmark] * problems, 8, [0], [[round(8 * share)] * problems])
        for number, share in shares.items()
    ]
    return RunData(name, rounds=[RoundData(number, {8: share}) for number, share in shares.items()], scores=scores)


def said_of(*runs: RunData) -> str:
    (said,) = headline.sentence(headline.summarise(runs))
    return said


NO_RANKING = (
    "Avg@8: no two runs were evaluated after the same round of training on the same problems, so none is called "
    "highest."
)


def test_ranking_names_runs_that_were_not_evaluated() -> None:
    low, high = ended("low", {1: 0.1}), ended("high", {0: 0.2, 1: 0.5})
    low = replace(low, rounds=[RoundData(1, {8: 0.1}, avg_interval={8: (0.0, 0.2)})])
    high = replace(high, rounds=[high.rounds[0], RoundData(1, {8: 0.5}, avg_interval={8: (0.1, 0.6)})])
    assert said_of(low, high, RunData("none")) == (
        "Avg@8 ends highest in high at 0.500 (from 0.200), then low at 0.100; their intervals overlap; not "
        "evaluated after round 1 on these problems: none."
    )


def test_runs_are_ranked_after_the_last_round_that_all_of_them_have() -> None:
    ahead = ended("ahead", {0: 0.1, 1: 0.2, 4: 0.5})
    behind = ended("behind", {0: 0.2, 1: 0.3})
    behind = replace(behind, rounds=[*behind.rounds, RoundData(2)])
    assert said_of(ahead, behind) == (
        "Avg@8 after round 1, the last that all have, is highest in behind at 0.300, then ahead at 0.200."
    )
    assert said_of(ahead, ended("apart", {2: 0.4})) == NO_RANKING


def test_a_run_that_is_behind_is_named_and_keeps_no_others_from_being_ranked() -> None:
    low, high = ended("low", {0: 0.1, 1: 0.2, 2: 0.3}), ended("high", {0: 0.1, 1: 0.4, 2: 0.6})
    late = ended("late", {0: 0.15})
    assert said_of(late, low, high) == (
        "Avg@8 ends highest in high at 0.600 (from 0.100), then low at 0.300; not evaluated after round 2 on these "
        "problems: late."
    )
    further = ended("further", {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.7})
    assert said_of(further, late, high) == (
        "Avg@8 after round 2, the last that two of them have, is highest in high at 0.600, then further at 0.300; not "
        "evaluated after round 2 on these problems: late."
    )
    assert said_of(low, late) == NO_RANKING
    assert said_of(late, ended("other", {0: 0.1})) == "Avg@8 ends highest in late at 0.150, then other at 0.100."


def test_runs_that_were_evaluated_on_other_problems_are_not_ranked() -> None:
    easy, hard = ended("easy", {0: 0.5, 1: 0.75}, "math500"), ended("hard", {0: 0.1, 1: 0.25}, "aime24")
    assert said_of(easy, hard) == NO_RANKING
    assert said_of(easy, ended("few", {0: 0.6, 1: 0.8}, "math500", problems=2)) == NO_RANKING
    assert said_of(hard, easy, ended("other", {0: 0.5, 1: 0.5}, "math500")) == (
        "Avg@8 ends highest in easy at 0.750 (from 0.500), then other at 0.500; not evaluated after round 1 on these "
        "problems: hard."
    )
    of_another_file = replace(
        easy, name="newer", scores=[replace(one, sources={"math500": "f"}) for one in easy.scores]
    )
    assert said_of(easy, of_another_file) == NO_RANKING


def test_runs_with_other_numbers_of_samples_are_shown_together() -> None:
    """Avg@k is of all samples of each, as its expectation is the same for every k; Pass@k at a k that both have."""
    eight = RunData("eight", rounds=[RoundData(0, {8: 0.2}, {1: 0.2, 4: 0.5, 8: 0.7}, {8: (0.1, 0.3)})])
    four = RunData("four", rounds=[RoundData(0, {4: 0.25}, {1: 0.25, 4: 0.6})])
    avg, passed, _ = quality([eight, four])
    assert (avg.title, avg.note) == ("Avg@k", "mean share of right samples, of 4 and 8 a problem")
    assert [mark.points for mark in avg.marks if isinstance(mark, Line)] == [
        (Point(0, 0.2, 0.1, 0.3),),
        (Point(0, 0.25),),
    ]
    assert passed.title == "Pass@4"
    assert passed.ys() == [0.5, 0.6]
    gains = [gain for summary in headline.summarise([eight, four]) for gain in summary.gains]
    assert [(gain.name, gain.first.value) for gain in gains] == [
        ("Avg@k", 0.2),
        ("Pass@4", 0.5),
        ("Avg@k", 0.25),
        ("Pass@4", 0.6),
    ]
    assert [figure.title for figure in quality([eight])][:2] == ["Avg@8", "Pass@8"]
    assert [figure.title for figure in quality([eight, RunData("none")])][:2] == ["Avg@8", "Pass@8"]
    apart = RunData("apart", rounds=[RoundData(0, {2: 0.1}, {2: 0.1})])
    assert "pass-at-k" not in {figure.name for figure in quality([eight, apart])}


def test_steps_that_begin_again_each_round_follow_one_another() -> None:
    training = [StepRow(round_, step, loss=1.0) for round_ in (1, 2) for step in range(3)]
    drawn, missing = by_step([RunData("r", training=training)])
    assert drawn[0].xs() == [1, 2, 3, 4, 5, 6]
    assert [at for at, _ in drawn[0].rules] == [4]
    assert "gradient norm" in missing


def test_share_above_the_gate() -> None:
    histogram = Histogram([0.0, 0.8, 2.0], [3, 1])
    assert share_above(histogram, 0.8) == 0.25
    assert share_above(histogram, 0.5) is None
    assert share_above(Histogram([0.0, 0.8], [0]), 0.8) is None


def test_costs_add_up_and_mark_shared_work() -> None:
    rows_ = [
        CostRow("score", 1, 2.0, 100, 1000, shared=True),
        CostRow("score", 2, 2.0, 300, 1000),
        CostRow("train", 1, 4.0),
        CostRow("train", 2, None, 50),
    ]
    cost = tables.costs([RunData("r", cost=rows_)])[0]
    score, train = cost.stages
    assert (cost.total, cost.own) == ("8.0 s (+ 1 job of unknown time)", "6.0 s")
    assert (score.seconds, score.tokens, score.speed, score.size) == ("4.0 s", "400", "100", "2 kB")
    assert (score.share, score.shared) == (0.5, "1 of 2 shared")
    assert train.seconds == "4.0 s (+ 1 job of unknown time)"
    assert (train.speed, train.size, train.shared) == ("not measured", "not measured", "")
    assert tables.costs([RunData("r")]) == []
    (summary,) = headline.summarise([RunData("r", cost=rows_)])
    assert dict(summary.facts)["Time in all stages"] == "8.0 s (+ 1 job of unknown time)"


def test_the_time_of_all_runs_counts_shared_work_once() -> None:
    """Both read one scoring; who scored the second round is on no page."""
    shared = [CostRow("score", 0, 60.0, key="a", shared=True), CostRow("score", 1, None, key="b", shared=True)]
    runs = [
        RunData(name, cost=[*shared, CostRow("train", 0, 10.0, key=name), CostRow("train", 1, 5.0)])
        for name in ("x", "y")
    ]
    assert [cost.total for cost in tables.costs(runs)] == ["1 min 15 s (+ 1 job of unknown time)"] * 2
    assert tables.whole_time(runs) == "1 min 30 s (+ 1 job of unknown time)"
    said = "1 min 30 s (+ 1 job of unknown time) for all runs together"
    assert said in render(ReportData("two", "now", runs))
    assert "for all runs together" not in render(ReportData("one", "now", runs[:1]))
    assert tables.whole_time([RunData("r", cost=shared[1:])]) == ""
    unknown = [RunData(name, cost=shared[1:]) for name in ("x", "y")]
    assert "for all runs together" not in render(ReportData("two", "now", unknown))


def test_settings_are_flattened_and_compared() -> None:
    one = {"train": {"lr": 1e-5, "gate": {}}, "ks": [1, 8]}
    assert tables.flatten(one) == {"train.lr": "1e-05", "train.gate": "{}", "ks": "[1, 8]"}
    found = tables.settings([RunData("a", settings=one), RunData("b", settings={"ks": [1, 8]})])
    assert found.differing == (("train.lr", ("1e-05", "not set")), ("train.gate", ("{}", "not set")))


def test_csv_holds_every_number_once() -> None:
    data = made_up_report(1)
    found = list(csv.DictReader(numbers.to_csv(data).splitlines()))
    rounds = [row for row in found if row["section"] == "round" and row["name"] == "avg_at_k" and row["x"] == "8"]
    assert [float(row["value"]) for row in rounds] == [item.avg_at_k[8] for item in data.runs[0].rounds]
    assert float(rounds[0]["low"]) == data.runs[0].rounds[0].avg_interval[8][0]
    assert len([row for row in found if row["section"] == "training" and row["name"] == "loss"]) == 320
    assert len([row for row in found if row["name"] == "clip_fraction"]) == 320
    assert not [row for row in found if row["value"] in ("", "None")]
    assert len([row for row in found if row["name"] == "gate_fraction" and row["section"] == "round"]) == 5
    risky = numbers.to_csv(ReportData("t", "g", [RunData("=1+1", rounds=[RoundData(0, rkl=1.0)])]))
    assert "'=1+1,round" in risky


def test_run_writes_page_numbers_and_figures(tmp_path: Path) -> None:
    job = ReportJob(tmp_path / "report", made_up_report(2), tmp_path / "logs")
    page = run(job)
    assert page == tmp_path / "report" / "index.html"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    figures = tmp_path / "report" / "figures"
    names = {path.stem for path in figures.glob("*.svg")}
    assert names == {path.stem for path in figures.glob("*.png")}
    assert {"avg-at-k", "pass-at-k", "entropy", "gate-fraction", "rkl", "fkl", "step-rkl", "fkl-by-entropy"} <= names
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in figures.glob("*.png"))

    bare = made_up_run()
    run(replace(job, data=ReportData("t", "g", [RunData("only", rounds=bare.rounds[:2])])))
    assert "step-rkl" not in {path.stem for path in figures.iterdir()}
    assert not list((tmp_path / "report").rglob(".*")), "no temporary file stays"
    assert "only" in page.read_text(encoding="utf-8")


def test_what_the_plotting_library_says_goes_to_a_file(tmp_path: Path) -> None:
    unusual = [RunData(name, rounds=[RoundData(0, rkl=1.0)]) for name in ("\U000130b8", "_$\\frac{")]
    run(ReportJob(tmp_path / "report", ReportData("t", "g", unusual), tmp_path / "logs"))
    assert "missing" in (tmp_path / "logs" / "report.log").read_text(encoding="utf-8")


def test_png_is_drawn_with_the_series_colour() -> None:
    image_module = pytest.importorskip("PIL.Image")
    import io

    points = tuple(Point(x, 0.5) for x in range(30))
    figure = Figure("f", "F", "note", Axis("x"), Axis("y", "rate"), (Line("a", points, "c1"),), rules=((3.0, "here"),))
    image = image_module.open(io.BytesIO(raster.png(figure))).convert("RGB")
    colours = {colour for _, colour in image.getcolors(1 << 24)}
    assert (0xBF, 0x53, 0x12) in colours
    assert (0xFB, 0xFA, 0xF7) in colours


def compared(runs: int, points: int = 4) -> Figure:
    """Horizontal lines, with a key of every run."""
    lines = tuple(
        Line(f"run {run}", tuple(Point(x, 0.2 + 0.02 * run) for x in range(points)), palette.tone(run), run)
        for run in range(runs)
    )
    key = tuple((line.label, line.tone, line.run) for line in lines)
    return Figure("f", "F", "note", Axis("x"), Axis("y", "rate"), lines, key=key)


def test_twenty_runs_are_told_apart_by_colour_and_marker() -> None:
    looks = {(palette.tone(run), plots.shape(run, 0, 0, "")) for run in range(40)}
    assert len(looks) == 40
    drawn = plots.standalone(compared(20))
    assert all(f">run {number}</text>" in drawn for number in range(20))
    assert plots.inline(compared(20, points=100), "x").count(" dot") == 20, "a long line has one marker, at its end"
    alone = replace(compared(1, points=100), key=())
    assert plots.inline(alone, "x").count(" dot") == 0


@pytest.mark.parametrize("runs", [2, 20])
def test_the_legend_of_a_png_stands_below_the_axes_whatever_the_number_of_runs(runs: int) -> None:
    image_module = pytest.importorskip("PIL.Image")
    import io

    bare = image_module.open(io.BytesIO(raster.png(replace(compared(runs), key=(), marks=compared(1).marks))))
    image = image_module.open(io.BytesIO(raster.png(compared(runs)))).convert("RGB")
    assert image.width == bare.width
    assert image.height > bare.height
    below = image.crop((0, bare.height, image.width, image.height))
    wanted = {palette.LIGHT[palette.tone(run)] for run in range(runs)}
    found = {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in below.getcolors(1 << 24)}
    assert wanted <= found
