"""Every number of a report as one tidy CSV: run, section, round, x, name, value, low, high, benchmark.

``x`` is the optimiser step, k, or the lower edge of an entropy bin. Missing figures have no row. Section ``benchmark``:
figures of an evaluation on one of several benchmarks, their means being in section ``round``. Sections
``difference_over_problems`` and ``difference_over_seeds``: the run minus the first one, with either interval.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import fields

from eopd.stages.report import words
from eopd.stages.report.comparison import compare
from eopd.stages.report.data import FIRST, FORWARD_KL, Estimate, Histogram, ReportData, RoundData, RunData, StepRow

HEAD = ("run", "section", "round", "x", "name", "value", "low", "high", "benchmark")
Row = tuple[object, ...]
_NOT_FIGURES = {
    *("round", "measured", "step", "further", "avg_at_k", "pass_at_k", "avg_interval", "pass_interval", "intervals"),
    "benchmarks",
}


def to_csv(data: ReportData) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEAD)
    for run in data.runs:
        for row in _run(run):
            writer.writerow((_cell(run.name), *row, ""))
        for benchmark, row in _of_benchmarks(run):
            writer.writerow((_cell(run.name), *row, _cell(benchmark)))
    for one in compare(data.runs).differences if data.runs else ():
        for over, found in (("problems", one.over_problems), ("seeds", one.over_seeds)):
            if found is not None:
                bounds = (one.value, found.low, found.high)
                what = (f"difference_over_{over}", one.round, one.k, f"{one.which}_at_k")
                writer.writerow((_cell(one.name), *what, *bounds, ""))
    return out.getvalue()


def _run(run: RunData) -> Iterator[Row]:
    for item in run.rounds:
        yield from _round(item)
    for name, gain in (("avg_gain", run.avg_gain), ("pass_gain", run.pass_gain)):
        if isinstance(gain, Estimate):
            yield ("gain", "", "", name, gain.value, gain.low, gain.high)
    for step in run.training:
        yield from _figures("training", step, step.step)
        for name, value in step.further.items():
            yield ("training", step.round, step.step, _cell(name), value, "", "")
    for who, histogram in (("teacher", run.entropy_histogram_teacher), ("student", run.entropy_histogram_student)):
        if isinstance(histogram, Histogram):
            for low, count in zip(histogram.edges, histogram.counts, strict=False):
                yield ("entropy_histogram", "", low, who, count, "", "")
    for section, binned in (("", run.by_entropy_bin), (FIRST, run.first_by_entropy_bin)):
        for name, means in binned.items():
            for low, mean, bounds in zip(means.edges[:-1], means.means, means.bounds, strict=True):
                if mean is not None:
                    figure = "fkl" if name == FORWARD_KL else _cell(name)
                    yield (f"{section}by_entropy_bin", "", low, figure, mean, *(bounds or ("", "")))
    for cost in run.cost:
        for name in ("seconds", "tokens", "bytes"):
            value = getattr(cost, name)
            if value is not None:
                section = "cost_shared" if cost.shared else "cost"
                yield (section, cost.round, "", _cell(f"{cost.stage}.{name}"), value, "", "")


def _of_benchmarks(run: RunData) -> Iterator[tuple[str, Row]]:
    """Of the evaluations on several; the figures of a single benchmark are those of the round."""
    for item in run.rounds:
        for name, found in item.benchmarks.items() if len(item.benchmarks) > 1 else ():
            yield from ((name, row) for row in _round(found, "benchmark"))


def _round(item: RoundData, section: str = "round") -> Iterator[Row]:
    for which in ("avg", "pass"):
        intervals = getattr(item, f"{which}_interval")
        for k, value in sorted(getattr(item, f"{which}_at_k").items()):
            yield (section, item.round, k, f"{which}_at_k", value, *intervals.get(k, ("", "")))
    yield from _figures(section, item, "")


def _figures(section: str, item: RoundData | StepRow, x: object) -> Iterator[Row]:
    for entry in fields(item):
        value = getattr(item, entry.name)
        if entry.name not in _NOT_FIGURES and value is not None:
            known = item.intervals.get(entry.name) if isinstance(item, RoundData) else None
            yield (section, item.round, x, entry.name, value, *(known or ("", "")))


def _cell(text: str) -> str:
    """Foreign text that a spreadsheet will not take for a formula."""
    text = words.printable(text)
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text
