"""The report stage: a page, its figures as files, and its numbers.

<out_dir>/index.html    the page, whole in itself
<out_dir>/numbers.csv   every number
<out_dir>/figures/      every figure as SVG
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from eopd.stages.format import printable
from eopd.stages.report.charts import Drawing
from eopd.stages.report.compare import compare
from eopd.stages.report.data import FIRST, Estimate, ReportData, RoundData, RunData
from eopd.stages.report.page import render
from eopd.storage.files import naming_full_disks, replace_atomically

HEAD = ("run", "section", "round", "x", "name", "value", "low", "high", "benchmark")
Row = tuple[object, ...]


@dataclass(frozen=True)
class ReportJob:
    out_dir: Path
    data: ReportData


def make_report(job: ReportJob) -> Path:
    """Write the report and return the path of its page, which is written last and appears whole.

    Raises:
        ValueError: the data hold no run.
        StoreError: ``out_dir`` is full or not writable.
    """
    page, drawings = render(job.data)
    _write_figures(job.out_dir / "figures", drawings)
    replace_atomically(job.out_dir / "numbers.csv", to_csv(job.data))
    replace_atomically(job.out_dir / "index.html", page)
    return job.out_dir / "index.html"


def _write_figures(folder: Path, drawings: list[Drawing]) -> None:
    """Write every figure; those of an earlier report that this one does not draw are removed."""
    with naming_full_disks(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for drawing in drawings:
            (folder / f"{drawing.name}.svg").write_text(drawing.svg, encoding="utf-8")
    for path in set(folder.glob("*.svg")) - {folder / f"{drawing.name}.svg" for drawing in drawings}:
        path.unlink(missing_ok=True)  # another run of the same name may write its report too


def to_csv(data: ReportData) -> str:
    """Return every number of a report, one per row.

    ``x`` is the optimizer step, k, or the lower edge of an entropy bin. Section ``benchmark`` holds an evaluation's
    figures on one of several benchmarks, ``round`` their means; ``difference_over_problems`` and
    ``difference_over_seeds`` the run minus the first one, with either interval.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEAD)
    for run_ in data.runs:
        writer.writerows((_text(run_.name), *row, "") for row in _rows(run_))
        for item in run_.rounds:
            for name, figures in item.benchmarks.items() if len(item.benchmarks) > 1 else ():
                writer.writerows((_text(run_.name), *row, _text(name)) for row in _round(figures, "benchmark"))
    for one in compare(data.runs).differences if data.runs else ():
        for over, bounds in (("problems", one.over_problems), ("seeds", one.over_seeds)):
            if bounds is not None:
                what = (f"difference_over_{over}", one.round, one.k, f"{one.which}_at_k")
                writer.writerow((_text(one.name), *what, one.value, bounds.low, bounds.high, ""))
    return out.getvalue()


def _rows(run_: RunData) -> Iterator[Row]:
    for item in run_.rounds:
        yield from _round(item, "round")
    for name, gain in run_.gains.items():
        yield ("gain", "", "", f"{name}_gain", *_values(gain))
    for step in run_.training:
        for name, value in step.figures.items():
            yield ("training", step.round, step.step, _text(name), value, "", "")
    for who, histogram in (("teacher", run_.teacher_entropy), ("student", run_.student_entropy)):
        for low, count in zip(histogram.edges, histogram.counts, strict=False) if histogram else ():
            yield ("entropy_histogram", "", low, who, count, "", "")
    for whose, figures in run_.bins.items():
        section = "first_by_entropy_bin" if whose == FIRST else "by_entropy_bin"
        for name, binned in figures.items():
            for low, mean in zip(binned.edges, binned.means, strict=False):
                if mean is not None:
                    yield (section, "", low, name, *_values(mean))
    for name, pair in run_.routing.policies.items() if run_.routing else ():
        assert run_.routing is not None
        for figure, estimate in zip(("accuracy", "tokens"), pair, strict=True):
            yield ("routing", run_.routing.round, "", _text(f"{name}.{figure}"), *_values(estimate))
    attributed = run_.attribution
    for name, values in attributed.z.items() if attributed else ():
        assert attributed is not None
        for bin_, z in zip(attributed.bins, values, strict=True):
            if z is not None:
                yield ("attribution", attributed.round, "", _text(f"{name}.{bin_}"), z, "", "")
    for cost in run_.cost:
        for name in ("seconds", "tokens", "bytes"):
            value = getattr(cost, name)
            if value is not None:
                section = "cost_shared" if cost.shared else "cost"
                yield (section, cost.round, "", _text(f"{cost.stage}.{name}"), value, "", "")


def _round(item: RoundData, section: str) -> Iterator[Row]:
    by_k: Mapping[str, Mapping[int, Estimate]] = {"pass_at_k": item.pass_at}
    if "avg" in item.figures:
        by_k = {"avg_at_k": {item.samples: item.figures["avg"]}, **by_k}
    for name, values in by_k.items():
        for k, estimate in sorted(values.items()):
            yield (section, item.round, k, name, *_values(estimate))
    for name, estimate in item.figures.items():
        if name != "avg":
            yield (section, item.round, "", name, *_values(estimate))


def _values(estimate: Estimate) -> tuple[object, object, object]:
    low, high = estimate.bounds or ("", "")
    return estimate.value, low, high


def _text(text: str) -> str:
    """Return text that a spreadsheet does not take for a formula."""
    text = printable(text)
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text
