"""What the report shows of alignments: each kind of responses apart, with what it was measured with. All made up."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eopd.stages.evaluate.alignment.bins import SUMMED, EntropyBins, summarise
from eopd.stages.report import plots
from eopd.stages.report.data import ReportData, RunData
from eopd.stages.report.gather import RoundArtifacts, RunArtifacts, gather
from eopd.stages.report.numbers import to_csv
from eopd.stages.report.page import figures, render
from eopd.storage import alignments
from eopd.storage.artifacts import Artifact, Identity


def measured(fkl: float, tau: float) -> dict[str, Any]:
    """Two problems, tokens below and above ``tau``."""
    bins = EntropyBins.of((), tau, 50)
    sums = np.zeros((2, bins.count, len(SUMMED)))
    sums[:, :, 0] = 10
    sums[:, :, SUMMED.index("fkl")] = 10 * fkl * np.asarray([[0.9], [1.1]])
    return {**summarise(sums, [0, 1], bins).to_json(), "cut": 0}


def alignment(
    store: Path, responses: dict[str, float], *, tau: float = 0.8, teacher: str = "teacher", **settings: Any
) -> Artifact:
    """Of forward KLs by kind of responses; the summary alone."""
    artifact = Artifact(store, Identity("alignments", 2, 1, {"made up": [responses, tau, teacher, settings]}))
    results = {
        "responses": {name: measured(fkl, tau) for name, fkl in responses.items()},
        "settings": {
            "responses": list(responses),
            "tau": tau,
            "temperature": 1.0,
            "merge_stops": True,
            "limit": None,
            **settings,
        },
        "teacher_prompt": {"kind": "same"},
        "teacher": {"fingerprint": teacher, "dtype": "float32"},
        "artifact": {"inputs": {f"{name} evaluation": f"{name} key" for name in responses}},
    }
    with artifact.write_part(0) as folder:
        (folder / alignments.RESULTS).write_text(json.dumps(results))
    return artifact


def gathered(tmp_path: Path, *found: Artifact, name: str = "run") -> RunData:
    rounds = [RoundArtifacts(number, None, alignment=artifact) for number, artifact in enumerate(found)]
    none = tmp_path / "none"
    return gather(RunArtifacts(name, {}, rounds, tokenizer="", tau=None, metrics=none, jobs=none))


def report(*runs: RunData) -> ReportData:
    return ReportData("made up", "now", list(runs))


@pytest.mark.parametrize("order", [("own", "first"), ("first", "own")])
def test_every_kind_of_responses_is_drawn_apart_and_in_the_numbers(tmp_path: Path, order: tuple[str, str]) -> None:
    fkl = {"own": 1.5, "first": 0.25}
    found = [alignment(tmp_path, {name: fkl[name] + number for name in order}) for number in range(2)]
    run = gathered(tmp_path, *found)
    assert [item.held_out_fkl for item in run.rounds] == pytest.approx([1.5, 2.5])
    assert [item.first_held_out_fkl for item in run.rounds] == pytest.approx([0.25, 1.25])
    assert run.rounds[0].intervals["first_uncertain_fkl"] == pytest.approx((0.225, 0.275))
    drawn = {figure.name: figure for figure in figures(report(run))}
    for kind, name, last in (("", "own samples", 2.5), ("first-", "first student's samples", 1.25)):
        for panel in ("uncertain-fkl", "held-out-fkl", "agreement", "above-threshold", "fkl-by-entropy"):
            assert name in drawn[f"{kind}{panel}"].note
        assert max(y for y in drawn[f"{kind}held-out-fkl"].ys()) == pytest.approx(1.1 * last)
        assert max(y for y in drawn[f"{kind}fkl-by-entropy"].ys()) == pytest.approx(1.1 * last)
    assert "past 0.8 nats" in drawn["first-uncertain-fkl"].note
    note = drawn["first-above-threshold"].note
    assert len(note) > 66
    assert all(
        part in plots.standalone(drawn["first-above-threshold"]) for part in ("samples · entropy", "dashed</text>")
    )
    rows = list(csv.DictReader(to_csv(report(run)).splitlines()))
    bins = [(row["section"], float(row["value"])) for row in rows if row["name"] == "fkl"]
    assert bins == [("by_entropy_bin", pytest.approx(2.5))] * 2 + [("first_by_entropy_bin", pytest.approx(1.25))] * 2
    by_round = [float(row["value"]) for row in rows if row["name"] == "first_held_out_fkl"]
    assert by_round == pytest.approx([0.25, 1.25])


def test_runs_that_were_read_on_other_responses_share_no_line_chart(tmp_path: Path) -> None:
    own = gathered(tmp_path, alignment(tmp_path, {"own": 1.5}), name="a")
    first = gathered(tmp_path, alignment(tmp_path, {"first": 1.5}), name="b")
    data = report(own, first)
    for figure in figures(data):
        assert len({mark.run for mark in figure.marks}) == 1
    assert "evaluate.alignment.responses is own in a and first in b" in render(data)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tau": 1.2}, "evaluate.alignment.tau is 0.8 in a and 1.2 in b"),
        ({"temperature": 0.7}, "evaluate.alignment.temperature is 1.0 in a and 0.7 in b"),
        ({"limit": 5}, "evaluate.alignment.limit is null in a and 5 in b"),
        ({"teacher": "another"}, "the teacher is teacher in a and another in b"),
    ],
)
def test_alignments_of_different_things_are_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    one = gathered(tmp_path, alignment(tmp_path, {"own": 1.5}), name="a")
    other = gathered(tmp_path, alignment(tmp_path, {"own": 1.5}, **changes), name="b")
    page = render(report(one, other))
    assert f"Not measured alike, which may be all of a difference: {said}." in page
    assert "Not measured alike" not in render(
        report(one, gathered(tmp_path, alignment(tmp_path, {"own": 2.0}), name="c"))
    )
    if "tau" in changes:
        assert "past 0.8 or 1.2 nats" in page
