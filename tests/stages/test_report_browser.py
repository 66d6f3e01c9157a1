"""The report page in a real headless browser. All data are made up.

They fail where there is no Chromium, unless EOPD_NO_BROWSER=1 says that they are to be left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from eopd.stages.report.data import ReportData, RunData
from eopd.stages.report.page import render
from eopd.stages.report.palette import contrast
from eopd.stages.report.seeds import grouped
from tests.stages.headless_browser import Browser, browser, chromium
from tests.stages.made_up_report import made_up_report, made_up_run, made_up_scores
from tests.stages.test_report_page import evil_report

pytestmark = pytest.mark.skipif(os.environ.get("EOPD_NO_BROWSER") == "1", reason="EOPD_NO_BROWSER=1")


def seeds() -> ReportData:
    """Three settings of three seeds each: lines with t intervals, differences in pairs."""
    runs = [
        replace(
            made_up_run(f"{name}-s{seed}", 1 + seed, gain),
            kin=name,
            seed=seed,
            scores=[replace(made_up_scores(seed, gain * at, round_=5 * at), seeds=[seed]) for at in (0, 1)],
        )
        for name, gain in (("opd", 0.15), ("eopd", 0.24), ("fkl", 0.2))
        for seed in range(3)
    ]
    return ReportData("Made up, seeds", "never", grouped(runs))


PAGES = {
    "one": lambda: made_up_report(1),
    "seeds": seeds,
    "seven": lambda: made_up_report(7),
    "evil": evil_report,
    "empty": lambda: ReportData("Made up, nothing measured", "never", [RunData("bare")]),
    "long": lambda: ReportData("Made up " + "x" * 190, "never", [RunData("n" * 300), RunData("m" * 300)]),
}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if chromium() is None:
        pytest.fail(
            "no Chromium on this machine: install it (Debian: apt install chromium; Google Chrome will do), or "
            "set EOPD_NO_BROWSER=1 to leave the tests of the report in a browser out",
            pytrace=False,
        )
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def written(name: str, folder: Path) -> Path:
    page = folder / "index.html"
    page.write_text(render(PAGES[name]()), encoding="utf-8")
    return page


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", sorted(PAGES))
def test_nothing_is_complained_of_requested_or_cut_off(tab: Browser, tmp_path: Path, name: str, width: int) -> None:
    page = written(name, tmp_path)
    tab.open(page, width)
    tab.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.complaints() == []
    assert set(tab.requested()) <= {page.as_uri(), "data:,"}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_several_runs_can_be_read_on_any_screen_in_any_light(
    tab: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    """Wide tables scroll inside themselves; differences stand under the gains; every link of the navigation leads
    somewhere; text keeps its contrast."""
    tab.open(written("seeds", tmp_path), width, dark=dark)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    rows = tab.evaluate("[...document.querySelectorAll('.sub + .beside tbody tr')].map((row) => row.textContent)")
    assert len(rows) == 4
    assert all("Avg@8" in row or "Pass@8" in row for row in rows)
    assert tab.evaluate("document.querySelectorAll('.key button').length") == 3
    assert tab.evaluate("[...document.querySelectorAll('nav a')].every((a) => document.querySelector(a.hash))")
    assert tab.evaluate("document.querySelectorAll('#held-out figure').length") == 6
    pair = "[getComputedStyle(document.querySelector('.sub')).color, getComputedStyle(document.body).backgroundColor]"
    ink, ground = tab.evaluate(pair)
    assert contrast(as_hex(ink), as_hex(ground)) > 7


def as_hex(colour: str) -> str:
    """rgb(1, 2, 3) as #010203."""
    return "#" + "".join(f"{int(part):02x}" for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


def test_text_in_figures_is_large_enough_on_a_phone(tab: Browser, tmp_path: Path) -> None:
    tab.open(written("one", tmp_path), 390)
    heights = "[...document.querySelectorAll('.plot text')].map((text) => text.getBoundingClientRect().height)"
    assert min(tab.evaluate(heights)) >= 9


def test_theme_follows_the_system_and_the_button(tab: Browser, tmp_path: Path) -> None:
    page = written("one", tmp_path)
    ground = "getComputedStyle(document.body).backgroundColor"
    tab.open(page, 1280, dark=False)
    assert tab.evaluate(ground) == "rgb(251, 250, 247)"
    tab.open(page, 1280, dark=True)
    assert tab.evaluate(ground) == "rgb(21, 21, 19)"
    tab.evaluate("document.getElementById('theme').click()")
    assert tab.evaluate(ground) == "rgb(251, 250, 247)"
    tab.evaluate("document.getElementById('theme').click(); localStorage.clear()")
    assert tab.evaluate(ground) == "rgb(21, 21, 19)"


def test_tokens_tell_their_figures_to_tap_and_keyboard(tab: Browser, tmp_path: Path) -> None:
    tab.open(written("one", tmp_path), 390)
    tip = "document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent"
    assert tab.evaluate(tip) == ""
    tab.evaluate("window.scrollTo(0, 0); document.querySelector('.tokens i').click()")
    assert tab.evaluate(tip).startswith("teacher entropy ")
    assert "student log-prob −" in tab.evaluate(tip)
    edges = "(() => { const r = document.getElementById('tip').getBoundingClientRect(); return [r.left, r.right]; })()"
    left, right = tab.evaluate(edges)
    assert left >= 0
    assert right <= 390
    press = "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: '%s', bubbles: true}))"
    tab.evaluate("document.querySelector('.tokens').focus({preventScroll: true})")
    tab.evaluate(press % "ArrowRight")
    assert tab.evaluate("document.querySelector('.tokens .on') === document.querySelector('.tokens').children[1]")
    tab.evaluate(press % "Escape")
    assert tab.evaluate(tip) == ""


def test_runs_can_be_hidden(tab: Browser, tmp_path: Path) -> None:
    tab.open(written("seven", tmp_path), 1280)
    shown = "[...document.querySelectorAll('.plot g.r2')].filter((part) => part.getClientRects().length).length"
    before = tab.evaluate(shown)
    assert before > 10
    tab.evaluate("document.querySelector('.key button[data-run=\"2\"]').click()")
    assert tab.evaluate(shown) == 0
    tab.evaluate("document.querySelector('.key button[data-run=\"2\"]').click()")
    assert tab.evaluate(shown) == before
