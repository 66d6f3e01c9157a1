"""The report page as a document: structure, escaping, self-containment, what is missing, size. All data are made up."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from eopd.stages.report import palette, plots
from eopd.stages.report.data import BinnedMean, CostRow, Histogram, ReportData, RolloutView, RoundData, RunData, StepRow
from eopd.stages.report.page import figures, render
from eopd.stages.report.rollout_html import BUDGET, MOST_SHOWN, token_html
from tests.stages.made_up_report import made_up_report, made_up_rollout, made_up_run, made_up_training

VOID = {"meta", "link", "br", "img", "input", "hr"}
EVIL = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)> $x$ & \x00 \u202e {{ 7 * 7 }}"


class Document(HTMLParser):
    """Elements in order, with their attributes and the text directly inside; fails on unbalanced tags."""

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
        return [attrs for found, attrs in self.elements if found == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def report_of(*runs: RunData) -> ReportData:
    return ReportData(title="Made up", generated="never", runs=list(runs))


@pytest.mark.parametrize("runs", [1, 3, 11])
def test_structure_is_whole_and_accessible(runs: int) -> None:
    document = Document(render(made_up_report(runs)))
    ids = [attrs["id"] for _, attrs in document.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert len(document.all("h1")) == 1
    assert {"gain", "quality", "rounds", "training", "spread", "rollouts", "cost", "settings"} <= set(ids)
    for attrs in document.all("a"):
        if attrs["href"].startswith("#"):
            assert attrs["href"][1:] in ids
    for attrs in document.all("section"):
        assert attrs["aria-labelledby"] in ids
    for attrs in document.all("svg"):
        assert attrs.get("aria-hidden") == "true" or (attrs["role"] == "img" and attrs["aria-label"])
    assert all(attrs["scope"] in ("row", "col") for attrs in document.all("th"))
    drawn = len([attrs for attrs in document.all("svg") if attrs.get("class") == "plot"])
    assert drawn == len(figures(made_up_report(runs))) == len(document.all("figure"))
    assert drawn >= 20
    assert len([attrs for attrs in document.all("details") if attrs.get("class") == "numbers"]) >= drawn
    assert "1 further figure" in document.text


def test_nothing_is_loaded_from_anywhere() -> None:
    page = render(made_up_report(2))
    document = Document(page)
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert not re.search(r"url\(", page)
    assert not [attrs for _, attrs in document.elements if "src" in attrs or "srcset" in attrs]
    assert not document.all("iframe")
    assert [attrs["href"] for attrs in document.all("link")] == ["data:,"]
    policy = next(attrs["content"] for attrs in document.all("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy
    links = {attrs["href"] for attrs in document.all("a") if not attrs["href"].startswith("#")}
    assert links == {"numbers.csv", "figures/"}


def evil_report() -> ReportData:
    run = replace(
        made_up_run(),
        name=EVIL,
        interval=EVIL,
        rounds=[RoundData(0, {8: 0.5}, benchmarks={EVIL: RoundData(0, {8: 0.5}), "b": RoundData(0, {8: 0.5})})],
        notes=[EVIL],
        warnings=[EVIL],
        graders=[EVIL],
        settings={EVIL: {EVIL: [EVIL]}, "train": {EVIL: EVIL}, "evaluate": {EVIL: EVIL}},
        training=[StepRow(1, step, loss=1.0, rkl=1.0, further={EVIL: 1.0}) for step in range(3)],
        head=EVIL,
        by_entropy_bin={EVIL: BinnedMean([0.0, 1.0], [0.5])},
        first_by_entropy_bin={EVIL: BinnedMean([0.0, 1.0], [0.5])},
        read_with={EVIL: EVIL},
        cost=[CostRow(EVIL, 1, 1.0)],
        rollouts=[RolloutView(EVIL, [EVIL, "<script>", ""], [0.1, 2.0, None], [-1.0, -2.0, None], verdict=EVIL)],
    )
    other = replace(run, settings={"train": {"lr": 1}}, head="x", read_with={EVIL: "other"})
    return ReportData(title=EVIL, generated=EVIL, runs=[run, other])


def test_foreign_text_stays_text() -> None:
    page = render(evil_report())
    document = Document(page)
    assert len(document.all("script")) == 1
    assert not document.all("img")
    assert not [name for _, attrs in document.elements for name in attrs if name.startswith("on")]
    assert "alert(1)" in document.text
    assert "49" not in document.all("title")
    assert "{{ 7 * 7 }}" in document.text
    assert "\x00" not in page
    assert "\u202e" not in page
    for figure in figures(evil_report()):
        root = ElementTree.fromstring(plots.standalone(figure))
        assert not root.findall(".//{*}script")


def test_an_empty_run_says_so_and_draws_nothing() -> None:
    document = Document(render(report_of(RunData(name="bare"))))
    assert not [attrs for attrs in document.all("svg") if attrs.get("class") == "plot"]
    for words in (
        "This run has no evaluation yet",
        "Not measured: Avg@k and Pass@k",
        "gate fraction",
        "No rollouts were kept",
        "Time and tokens were not measured",
        "No settings were given",
        "Not measured: token entropy, forward KL by teacher entropy",
    ):
        assert words in document.text
    assert "0.000" not in document.text
    with pytest.raises(ValueError, match="runs is empty"):
        render(report_of())


def test_missing_figures_are_gaps_never_zeros() -> None:
    rounds = [
        RoundData(0, {8: 0.2}, {8: 0.7}, student_entropy=0.5),
        RoundData(1, student_entropy=0.45, gate_fraction=0.2, rkl=math.nan),
        RoundData(2, {8: 0.4}, {8: 0.8}, gate_fraction=0.1, rkl=0.3),
    ]
    data = report_of(RunData(name="gaps", rounds=rounds))
    drawn = {figure.name: figure for figure in figures(data)}
    assert "fkl" not in drawn
    assert min(drawn["gate-fraction"].xs()) == 1
    assert drawn["rkl"].xs() == [2]
    assert drawn["entropy"].xs() == [0, 1]
    text = Document(render(data)).text
    assert "Avg@8 rose from 0.200 to 0.400." in text
    assert "no intervals were measured" in text
    assert "not finite" in text
    assert "not measured" in text
    assert "forward kl" in text


def test_a_line_breaks_where_nothing_was_measured() -> None:
    rounds = [RoundData(number, fkl=None if number == 2 else 0.5) for number in range(5)]
    figure = next(item for item in figures(report_of(RunData("gap", rounds=rounds))) if item.name == "fkl")
    drawn = plots.inline(figure, "x")
    assert len(re.findall(r'<path class="s-c0" d="M[^"]*L', drawn)) == 2
    assert drawn.count('class="hit"') == 4


def test_a_line_passes_over_students_that_were_not_to_be_measured() -> None:
    """With evaluate.every: 2 the students between have no figures; the last one's evaluation is yet to come."""
    rounds = [
        RoundData(number, {8: 0.2} if number in (0, 2, 4) else {}, fkl=0.1 * number, measured=number % 2 == 0)
        for number in range(7)
    ]
    drawn = {item.name: item for item in figures(report_of(RunData("seldom", rounds=rounds)))}
    assert len(re.findall(r'<path class="s-c0" d="M[^"]*L', plots.inline(drawn["avg-at-k"], "x"))) == 1
    assert plots.inline(drawn["avg-at-k"], "x").count('class="hit"') == 3
    assert plots.inline(drawn["fkl"], "x").count('class="hit"') == 7


def test_runs_are_told_apart_without_colour() -> None:
    data = made_up_report(4)
    page = render(data)
    document = Document(page)
    pressed = [attrs for attrs in document.all("button") if "data-run" in attrs]
    assert [attrs["data-run"] for attrs in pressed] == ["0", "1", "2", "3"]
    assert "What the runs differ in" in document.text
    assert "train.objective" in document.text
    assert len({plots.shape(run, 0, 0, "") for run in range(4)}) == 4
    assert "Avg@8 ends highest in eopd" in document.text
    assert "shared" in document.text


def test_runs_of_one_name_get_names_of_their_own() -> None:
    text = Document(render(report_of(*[made_up_run("twin", seed) for seed in (1, 2, 3)]))).text
    assert "twin (2)" in text
    assert "twin (3)" in text


def test_rollouts_of_one_prompt_stand_together() -> None:
    runs = [
        replace(made_up_run(f"run{seed}", seed), rollouts=[made_up_rollout(seed, prompt="same?")]) for seed in (1, 2)
    ]
    page = render(report_of(*runs))
    assert page.count('<details class="prompt"') == 1
    assert page.count('<article class="card') == 2


def test_tokens_carry_their_figures() -> None:
    rollout = RolloutView("p", ["a\n", "<b>", "c"], [0.01, 1.0, None], [-0.5, math.inf, None])
    html, shown = token_html(rollout, 0.8, 10_000)
    assert shown == 3
    assert html.split("</i>") == [
        '<i class=h0 data-e="0.01 -0.50">a↵\n',
        '<i class=H4 data-e="1.00 ?">&lt;b&gt;',
        '<i class=hn data-e="- -">c',
        "",
    ]
    bare, _ = token_html(RolloutView("p", ["a"]), None, 10_000)
    assert bare == '<i class=hn data-e="- -">a</i>'


def test_a_huge_input_gives_a_bounded_page() -> None:
    """Made up: 20 runs of 3,000 steps, and 100 rollouts of 4,096 tokens in one of them."""
    long_rollouts = [made_up_rollout(seed, 4096) for seed in range(100)]
    training = made_up_training(1, rounds=10, steps=300)
    run = replace(made_up_run(), training=training, rollouts=long_rollouts)
    runs = [replace(run, name=f"run {index}", rollouts=long_rollouts if index == 0 else []) for index in range(20)]
    page = render(report_of(*runs))
    size = len(page.encode())
    assert size < 5_000_000
    assert page.count('<article class="card') == MOST_SHOWN
    assert f"{MOST_SHOWN} of 100 are shown" in page
    assert re.search(r"The first \d+ of 4097 tokens are shown", page)
    tokens = sum(len(match.encode()) for match in re.findall(r"<i class=[hH].*?</i>", page, flags=re.S))
    assert 0.5 * BUDGET < tokens <= BUDGET
    assert "rows between these are left out here" in page


@pytest.mark.parametrize("colours", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_colours_can_be_read(colours: dict[str, str]) -> None:
    for ground in ("paper", "card"):
        for text in ("ink", "muted", "good", "bad"):
            assert palette.contrast(colours[ground], colours[text]) >= 4.5, (ground, text)
        for index in range(palette.SERIES):
            assert palette.contrast(colours[ground], colours[palette.tone(index)]) >= 3, (ground, index)
    heats = [colours[f"h{step}"] for step in range(len(palette.HEAT_EDGES) + 1)]
    away = [palette.contrast(colours["card"], heat) for heat in heats]
    assert away == sorted(away), "each step must stand out more from the card than the one before"
    assert all(palette.contrast(heat, colours["ink"]) >= 4.5 for heat in heats)
    assert all(after / before > 1.06 for before, after in itertools.pairwise(away))


def test_an_open_last_bin_does_not_squeeze_the_others() -> None:
    """Made up: bins of 0.1 nats up to 4, and one for all above."""
    edges = [round(0.1 * step, 1) for step in range(41)] + [20.0]
    histogram = Histogram(edges, [*range(40, 0, -1), 3])
    figure = figures(report_of(RunData("r", entropy_histogram_teacher=histogram, threshold=0.8)))[0]
    assert figure.x.high == pytest.approx(4.4)
    assert "4 and more" in figure.x.label
    assert "past the gate" in figure.note
    drawn = plots.inline(figure, "x")
    widest = max(float(x) for x in re.findall(r"[ML]([\d.]+) ", drawn))
    assert widest <= plots.WIDTH
    assert "4.00 to 20.0" in render(report_of(RunData("r", entropy_histogram_teacher=histogram)))
