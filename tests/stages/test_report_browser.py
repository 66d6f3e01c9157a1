"""The report page in a real headless browser. All data are made up.

They fail where there is no Chromium, unless EOPD_NO_BROWSER=1 says that they are to be left out.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from eopd.stages.report.compare import grouped
from eopd.stages.report.data import ReportData, RunData
from eopd.stages.report.page import render
from tests.stages.headless_browser import Browser, browser, chromium
from tests.stages.made_up_report import made_up_report, made_up_run, problem_scores
from tests.stages.test_report_page import evil_report

pytestmark = pytest.mark.skipif(os.environ.get("EOPD_NO_BROWSER") == "1", reason="EOPD_NO_BROWSER=1")


def seeds() -> ReportData:
    """Two settings of two seeds each: lines with t intervals, differences in pairs."""
    runs = [
        replace(
            made_up_run(f"{name}-s{seed}", 1 + seed, gain),
            kin=name,
            seed=seed,
            scores=[replace(problem_scores(seed, gain * at, round_=5 * at), seeds=[seed]) for at in (0, 1)],
        )
        for name, gain in (("opd", 0.15), ("eopd", 0.24))
        for seed in range(2)
    ]
    return ReportData("Made up, seeds", "never", grouped(runs))


REPORTS = {
    "one": lambda: made_up_report(1),
    "seeds": seeds,
    "evil": evil_report,
    "empty": lambda: ReportData("Made up, nothing measured", "never", [RunData("bare")]),
    "long": lambda: ReportData("Made up " + "x" * 190, "never", [RunData("n" * 300), RunData("m" * 300)]),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, data in REPORTS.items():
        (folder / f"{name}.html").write_text(render(data())[0], encoding="utf-8")
    return {name: folder / f"{name}.html" for name in REPORTS}


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


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", sorted(REPORTS))
def test_nothing_is_complained_of_requested_or_cut_off(
    tab: Browser, pages: dict[str, Path], tmp_path: Path, name: str, width: int
) -> None:
    tab.open(pages[name], width)
    tab.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.complaints() == []
    assert set(tab.requested()) <= {pages[name].as_uri(), "data:,"}
    tab.screenshot(tmp_path / "page.png")
    wide, high = struct.unpack(">II", (tmp_path / "page.png").read_bytes()[16:24])
    assert width - 20 <= wide <= width  # without the scroll bar
    assert high > 900


CONTRASTS = """(() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
      .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (part) => {
    for (; part; part = part.parentElement) {
      const colour = getComputedStyle(part).backgroundColor;
      if (!/, 0\\)/.test(colour)) return colour;
    }
  };
  return [...document.querySelectorAll("h1, h2, p, td, th, dt, dd, li, .plot text, .tokens i")].map((part) => {
    const style = getComputedStyle(part);
    const [a, b] = [part.closest("svg") ? style.fill : style.color, ground(part)].map(light);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_any_light_and_on_a_phone(tab: Browser, pages: dict[str, Path], dark: bool) -> None:
    """In figures too, which follow the system's light or dark setting with the page."""
    tab.open(pages["seeds"], 390, dark=dark)
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(21, 21, 19)" if dark else "rgb(251, 250, 247)")
    contrasts = tab.evaluate(CONTRASTS)
    assert len(contrasts) > 500
    assert min(contrasts) >= 4.5
    heights = "[...document.querySelectorAll('.plot text')].map((text) => text.getBoundingClientRect().height)"
    assert min(height for height in tab.evaluate(heights) if height) >= 9


def test_numbers_stand_in_columns(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["seeds"], 1280)
    cells = "[...document.querySelectorAll('table:not(.settings) td')].map((cell) => getComputedStyle(cell))"
    assert set(tab.evaluate(f"{cells}.map((style) => style.fontVariantNumeric)")) == {"tabular-nums"}
    right = tab.evaluate(f"{cells}.filter((style) => style.textAlign === 'right').length")
    metrics = tab.evaluate("document.querySelectorAll('.named tbody tr').length")
    assert right == tab.evaluate(f"{cells}.length") - metrics, "all but the names of metrics"


def test_tokens_tell_their_figures_to_tap_and_keyboard(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["one"], 390)
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
