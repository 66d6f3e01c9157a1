"""The report page as a document: what it says, what it lacks, hostile text, degenerate data. All data are made up."""

from __future__ import annotations

import csv
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eopd.stages.report import charts, rollouts
from eopd.stages.report.data import (
    FIRST,
    OWN,
    BinnedMeans,
    CostRow,
    Estimate,
    Histogram,
    ReportData,
    RolloutView,
    RoundData,
    RunData,
    StepRow,
)
from eopd.stages.report.page import flatten, render
from eopd.stages.report.run import ReportJob, make_report, to_csv
from tests.stages.made_up_report import made_up_report, made_up_run, rollout, training_rows

VOID = {"meta", "link", "br", "img", "input", "hr"}
EVIL = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)> $\\frac{$ & \x00 \u202e {{ 7 * 7 }}"


class Document(HTMLParser):
    """Elements in order, with their attributes, and the text; fails on unbalanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for result, attrs in self.elements if result == tag]

    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.elements if "id" in attrs]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page_of(*runs: RunData) -> str:
    return render(ReportData("Made up", "never", list(runs)))[0]


def drawn(*runs: RunData) -> dict[str, charts.Drawing]:
    return {drawing.name: drawing for drawing in render(ReportData("Made up", "never", list(runs)))[1]}


@pytest.fixture(scope="module", params=[1, 3], ids=["one run", "three runs"])
def page(request: pytest.FixtureRequest) -> tuple[int, str]:
    return request.param, render(made_up_report(request.param))[0]


def test_a_page_is_whole_and_loads_nothing(page: tuple[int, str]) -> None:
    _, text = page
    document = Document(text)
    ids = document.ids()
    assert len(ids) == len(set(ids))
    assert {"gain", "quality", "rounds", "training", "held-out", "spread", "rollouts", "cost", "settings"} <= set(ids)
    links = [attrs["href"] for attrs in document.all("a")]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert {link for link in links if not link.startswith("#")} == {"numbers.csv", "figures/"}
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in document.all("svg"))
    assert len(document.all("svg")) == len(document.all("figure")) >= 18
    assert all(attrs["scope"] in ("row", "col") for attrs in document.all("th"))
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert not [attrs for _, attrs in document.elements if "src" in attrs or "srcset" in attrs]
    assert [attrs["href"] for attrs in document.all("link")] == ["data:,"]
    (policy,) = (attrs["content"] for attrs in document.all("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")
    assert len(text) < 700_000


def test_the_headline_has_intervals_the_number_of_problems_and_truncated_answers(page: tuple[int, str]) -> None:
    runs, text = page
    headline = Document(re.sub(r"^.*?<main>|(?<=</section>).*", "", text, flags=re.S)).text
    assert "0.220" in headline
    assert "[+0.215, +0.265]" in headline
    assert headline.count("200 × 8") == (1 if runs == 1 else 2 * runs)
    assert re.search(r"\d\.\d % → \d\.\d %", headline)
    assert ("Differences from eopd" in headline) == (runs > 1)


def test_sentences_come_from_the_data() -> None:
    """Half of all tokens are above the gate here, so nothing may say that most tokens are certain."""
    run = RunData("r", teacher_entropy=Histogram([0.0, 0.8, 2.0], [1, 1]), threshold=0.8)
    text = Document(page_of(run)).text
    assert "above tau = 0.8 nats on 50.0 % of the tokens" in text
    assert "certain;" not in text


def evil_run() -> RunData:
    binned = BinnedMeans([0.0, 1.0], [Estimate(0.5)])
    return replace(
        made_up_run(),
        name=EVIL,
        interval=EVIL,
        rounds=[RoundData(0, {"avg": Estimate(0.5)}, {}, 4, 8, benchmarks={EVIL: RoundData(0), "b": RoundData(0)})],
        settings={EVIL: {EVIL: [EVIL]}, "evaluate": {EVIL: EVIL}},
        training=[StepRow(1, step, {"loss": 1.0, EVIL: 1.0}) for step in range(3)],
        bins={OWN: {"fkl": binned}, FIRST: {"fkl": binned}},
        read_with={"evaluate.alignment.tau": EVIL, EVIL: EVIL},
        cost=[CostRow(EVIL, 1, 1.0)],
        rollouts=[RolloutView(EVIL, EVIL, [EVIL, "<script>", ""], [0.1, 2.0, math.nan], [-1.0, -2.0, None])],
        notes=[EVIL],
        warnings=[EVIL],
        graders=[EVIL],
        head=EVIL,
    )


def evil_report() -> ReportData:
    other = replace(evil_run(), settings={"train": {"lr": 1}}, head="x", read_with={EVIL: "other"})
    return ReportData(EVIL, EVIL, [evil_run(), other])


def test_foreign_text_stays_text() -> None:
    page, drawings = render(evil_report())
    document = Document(page)
    assert len(document.all("script")) == 1
    assert not document.all("img")
    assert not [name for _, attrs in document.elements for name in attrs if name.startswith("on")]
    assert "alert(1)" in document.text
    assert "{{ 7 * 7 }}" in document.text
    assert not {"\x00", "\u202e"} & set(page)
    for drawing in drawings:
        root = ElementTree.fromstring(drawing.svg)
        assert not [element for element in root.iter() if element.tag.endswith(("}script", "}image"))]


def test_a_run_without_any_result_says_so() -> None:
    document = Document(page_of(RunData("bare")))
    assert not document.all("svg")
    assert "There is no evaluation yet." in document.text
    assert document.text.count("Nothing of this was measured.") == 5
    assert "There are no rollouts to show." in document.text
    assert "Time and tokens were not measured." in document.text
    assert not re.search(r"0\.000|nan", document.text)
    with pytest.raises(ValueError, match="runs is empty"):
        render(ReportData("none", "never", []))


@pytest.mark.parametrize(
    "run",
    [
        RunData("one evaluation", rounds=[RoundData(3, {"avg": Estimate(0.25)}, {8: Estimate(0.5)}, 10, 8)]),
        RunData("no problem", rounds=[RoundData(0, {"tokens": Estimate(0)}), RoundData(1)]),
        RunData("not finite", training=[StepRow(0, step, {"loss": math.nan, "rkl": 1.0}) for step in range(3)]),
        RunData("empty histogram", teacher_entropy=Histogram([0.0, 1.0], [0]), threshold=0.0),
        RunData("empty bins", bins={OWN: {"fkl": BinnedMeans([0.0, 1.0], [None])}}),
        RunData("empty response", rollouts=[RolloutView("", "", [], [], [])]),
        RunData("one step", training=[StepRow(0, 0, {"loss": 0.0})]),
        RunData("no seconds", cost=[CostRow("train", 0)]),
    ],
    ids=lambda run: run.name,
)
def test_degenerate_data_draw_no_nan(run: RunData) -> None:
    page, drawings = render(ReportData("Made up", "never", [run]))
    assert not re.search(r"\bnan\b|\binf\b|None", Document(page).text)
    assert not any(re.search(r"[ \"](nan|inf)\b", drawing.svg) for drawing in drawings)


def whiskers(drawing: charts.Drawing) -> list[tuple[float, float]]:
    """Vertical extents of the bars, as shares of the axis' height."""
    matches = re.findall(r"M [\d.]+ ([\d.]+) L [\d.]+ ([\d.]+) ?\"[^>]*opacity: 0.5", drawing.inline.replace("\n", " "))
    height = 72 * charts._HEIGHT
    return [(float(low) / height, float(high) / height) for low, high in matches]


@pytest.mark.parametrize(
    ("name", "figure", "estimate"),
    [
        ("truncation_rate", "truncation", Estimate(0.0, 0.0, 0.0146)),
        ("distinct_correct", "distinct-correct", Estimate(0.0, 0.0, 0.1)),
        ("self_bleu", "self-bleu", Estimate(1.0, 0.9, 1.0)),
        ("response_length", "response-length", Estimate(64.0, 64.0, 64.0)),
    ],
)
def test_a_constant_curve_is_drawn_as_points(name: str, figure: str, estimate: Estimate) -> None:
    constant = RunData("r", rounds=[RoundData(number, {name: estimate}) for number in range(4)])
    assert lines(drawn(constant)[figure]) == [4]
    assert whiskers(drawn(constant)[figure]) == []


def test_no_interval_fills_the_axis() -> None:
    rounds = [RoundData(n, {"response_length": Estimate(15.9 + 0.001 * n, 15.5, 16.2)}) for n in range(4)]
    bars = whiskers(drawn(RunData("r", rounds=rounds))["response-length"])
    assert len(bars) == 4
    assert all(0.2 < abs(high - low) < 0.6 for low, high in bars)


def lines(drawing: charts.Drawing) -> list[int]:
    """Vertices of each line that is drawn in a series' colour."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--c\d\); stroke-width: 1.4', drawing.inline)
    return [len(re.findall("[ML]", path)) for path in paths]


def test_a_line_breaks_where_a_figure_is_missing_and_passes_over_what_was_not_to_be_measured() -> None:
    def run(measured: bool) -> RunData:
        rounds = [RoundData(n, {} if n == 2 else {"fkl": Estimate(0.1 * n)}, measured=measured) for n in range(5)]
        return RunData("r", rounds=rounds)

    assert lines(drawn(run(True))["fkl"]) == [2, 2]
    assert lines(drawn(run(False))["fkl"]) == [4]


def test_long_curves_are_thinned_and_steps_that_begin_again_follow_one_another() -> None:
    curves = drawn(RunData("r", training=training_rows(1, 10, 300)))
    assert 50 < max(lines(curves["step-loss"])) <= 120
    assert "clip_fraction" in Document(page_of(RunData("r", training=training_rows(1, 2, 3)))).text
    again = [StepRow(round_, step, {"loss": 1.0 + step}) for round_ in (0, 1) for step in range(3)]
    assert lines(drawn(RunData("r", training=again))["step-loss"]) == [6]


def test_runs_are_told_apart_without_colour_and_have_names_of_their_own() -> None:
    text = Document(page_of(*[RunData("twin") for _ in range(3)])).text
    assert "twin (2)" in text
    assert "twin (3)" in text
    looks = {tuple(sorted(charts._look(charts.Curve("", [], tone), True).items())) for tone in range(40)}
    assert len(looks) == 40


def test_runs_with_different_numbers_of_samples_share_a_k() -> None:
    """A gain of Pass@8 is not shown as one of Pass@4."""
    eight = [RoundData(n, {"avg": Estimate(0.2)}, {4: Estimate(0.2 + n), 8: Estimate(0.3)}, 9, 8) for n in (0, 1)]
    four = RunData("four", rounds=[RoundData(0, {"avg": Estimate(0.25)}, {4: Estimate(0.6)}, 9, 4)])
    text = Document(page_of(RunData("eight", rounds=eight, gains={"pass": Estimate(0.9, 0.8, 1.0)}), four)).text
    assert "Pass@4 0 → 1 0.200 1.200 +1.000 9 × 8" in text
    assert "Avg@k" in text
    assert "[+0.800, +1.000]" not in text


def test_a_change_on_other_problems_is_not_called_one() -> None:
    run = replace(made_up_run(), training=[])
    first = replace(run.scores[0], names=[*run.scores[0].names[:-1], "another"])
    text = Document(page_of(replace(run, scores=[first, run.scores[1]], gains={}))).text
    assert "the two evaluations are of different problems" in text
    assert "+0.2" not in text.split("Right answers")[0]


def test_rollouts_of_one_prompt_stand_together() -> None:
    runs = [RunData(f"run{n}", rollouts=[rollout(n, prompt="same?")]) for n in (1, 2)]
    page = page_of(*runs)
    assert page.count('<details class="prompt"') == 1
    assert page.count('<article class="card') == 2
    assert "cut at the length limit" in page_of(RunData("r", rollouts=[rollout(4)]))


def test_tokens_carry_their_figures() -> None:
    view = RolloutView("p", "p", ["a\n", "<b>", "c"], [0.01, 1.0, math.nan], [-0.5, math.inf, None])
    html, shown = rollouts.token_html(view, 0.8, 10_000)
    assert shown == 3
    assert html.split("</i>") == [
        '<i class=h0 data-e="0.01 −0.50">a↵\n',
        '<i class=H4 data-e="1.00 –">&lt;b&gt;',
        '<i class=hn data-e="– –">c',
        "",
    ]


def test_a_huge_input_gives_a_bounded_page() -> None:
    many = [rollout(seed, 4096) for seed in range(60)]
    runs = [RunData(f"run {n}", rollouts=many if n == 0 else [], settings={"n": n}) for n in range(20)]
    page = page_of(*runs)
    assert len(page) < 2_500_000
    assert page.count('<article class="card') == rollouts.MOST_SHOWN
    assert f"{rollouts.MOST_SHOWN} of 60 are shown" in page
    assert re.search(r"the first \d+ of 4096 tokens", page)


def test_costs_add_up_and_mark_shared_work() -> None:
    """Both runs read one scoring; nobody on the page scored the second round."""
    shared = [CostRow("score", 0, 60.0, 600, 1000, True, "a"), CostRow("score", 1, None, 300, 1000, True, "b")]
    runs = [RunData(name, cost=[*shared, CostRow("train", 0, 20.0, key=name)]) for name in ("x", "y")]
    text = Document(page_of(*runs)).text
    assert "shared work counted once: 1 min 40 s (+ 1 job of unknown time)." in text
    assert "x: 1 min 20 s (+ 1 job of unknown time), of which 20 s not shared" in text
    assert "score (shared) 1 min 0 s (+ 1 job of unknown time) 75.0 % 900 10 2.0 kB" in text


def test_settings_are_flattened_and_compared() -> None:
    one = {"train": {"lr": 1e-5, "gate": {}}, "ks": [1, 8]}
    assert flatten(one) == {"train.lr": "1e-05", "train.gate": "{}", "ks": "[1, 8]"}
    text = Document(page_of(RunData("a", settings=one), RunData("b", settings={"ks": [1, 8]}))).text
    assert "What the runs differ in. setting a b train.lr 1e-05 not set train.gate {} not set" in text


def test_the_numbers_hold_every_figure_once() -> None:
    data = made_up_report(1)
    rows = list(csv.DictReader(to_csv(data).splitlines()))
    rounds = [row for row in rows if row["section"] == "round" and row["name"] == "avg_at_k"]
    assert [float(row["value"]) for row in rounds] == [item.figures["avg"].value for item in data.runs[0].rounds]
    assert {row["x"] for row in rounds} == {"8"}
    assert float(rounds[0]["low"]) == data.runs[0].rounds[0].figures["avg"].low
    assert len([row for row in rows if row["name"] == "clip_fraction"]) == 320
    assert len([row for row in rows if row["section"] == "gain"]) == 2
    assert not [row for row in rows if row["value"] in ("", "None")]
    risky = ReportData("t", "g", [RunData("=1+1", rounds=[RoundData(0, {"rkl": Estimate(1.0)})])])
    assert "'=1+1,round" in to_csv(risky)


def test_run_writes_page_numbers_and_figures_and_removes_old_ones(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    assert make_report(ReportJob(folder, made_up_report(1))) == folder / "index.html"
    names = {path.stem for path in (folder / "figures").iterdir()}
    assert {"avg-at-k", "pass-at-k", "entropy", "gate-fraction", "rkl", "step-rkl", "fkl-by-entropy"} <= names
    assert "Avg@8" in "".join(ElementTree.parse(folder / "figures" / "avg-at-k.svg").getroot().itertext())
    few = ReportData("t", "g", [RunData("only", rounds=made_up_run().rounds[:2])])
    make_report(ReportJob(folder, few))
    assert "step-rkl" not in {path.stem for path in (folder / "figures").iterdir()}
    assert not list(folder.rglob(".*")), "no temporary file stays"
    assert "only" in (folder / "index.html").read_text(encoding="utf-8")
    before = (folder / "figures" / "rkl.svg").read_bytes()
    make_report(ReportJob(folder, few))
    assert (folder / "figures" / "rkl.svg").read_bytes() == before, "equal data give equal files"
