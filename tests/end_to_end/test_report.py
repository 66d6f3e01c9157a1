"""Alignment and the report on real artifacts: one run, two seeds of it on one page, and work that they share."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.end_to_end.conftest import World, commit_times, eopd


@pytest.fixture(scope="module")
def seeded(world: World) -> list[Path]:
    """Folders of three runs of one store: two seeds of one setting, and another objective with the first seed."""
    store = str(world.folder / "seeded" / "store")
    common = {
        "store": store,
        "rounds": 1,
        "prompts": {"verifier": "exact"},
        "evaluate": {"alignment": {"tau": 5.0, "samples": 2, "responses": ["own", "first"]}},
    }
    for name, changes in (
        ("seeded-0", {"seed": 0}),
        ("seeded-1", {"seed": 1}),
        ("other", {"seed": 0, "train": {"objective": {"name": "opd"}}}),
    ):
        eopd("run", world.config(name, **common, **changes))
    return [world.runs(name) for name in ("seeded-0", "seeded-1", "other")]


def numbers(folder: Path) -> list[dict[str, str]]:
    with (folder / "numbers.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_one_run_shows_alignment_and_judged_rollouts(seeded: list[Path]) -> None:
    figures = numbers(seeded[0] / "report")
    binned = {row["name"] for row in figures if row["section"] == "by_entropy_bin"}
    assert {"fkl", "rkl", "agreement"} <= binned
    assert binned == {row["name"] for row in figures if row["section"] == "first_by_entropy_bin"}
    by_round = {(row["name"], row["round"]): row for row in figures if row["section"] == "round"}
    for round_ in "01":
        row = by_round["held_out_fkl", round_]
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
        assert ("held_out_teacher_above", round_) in by_round
        same = by_round["first_held_out_fkl", round_]["value"] == row["value"]
        assert same == (round_ == "0"), "the first student's own samples are the fixed set"
    page = (seeded[0] / "report" / "index.html").read_text()
    assert "wrong" in page
    assert "not judged" not in page.split('id="rollouts"')[1]


def test_costs_have_tokens_and_say_what_is_shared(seeded: list[Path]) -> None:
    figures = numbers(seeded[2] / "report")
    shared = {row["name"] for row in figures if row["section"] == "cost_shared" and row["round"] == "0"}
    assert {"rollout.tokens", "score.tokens", "evaluate.tokens", "align.tokens"} <= shared
    assert "rollout.seconds" not in shared  # another run did it, and this page does not know that run
    own = {row["name"] for row in figures if row["section"] == "cost"}
    assert {"train.seconds", "train.tokens"} <= own


def test_several_runs_on_one_page_with_seeds_as_one_line(seeded: list[Path], tmp_path: Path) -> None:
    before = commit_times(seeded[0].parents[2])
    by_name = ["seeded-0", "--runs", seeded[0].parent]
    eopd("report", *by_name, *seeded[1:], "--out", tmp_path / "page")
    assert commit_times(seeded[0].parents[2]) == before
    page = (tmp_path / "page" / "index.html").read_text()
    assert "seeded (2 seeds)" in page
    assert "Differences from seeded (2 seeds), on the same problems" in page
    assert "train.objective.name" in page
    figures = numbers(tmp_path / "page")
    assert {row["run"] for row in figures} == {"seeded (2 seeds)", "other"}
    seconds = [row for row in figures if row["run"] == "other" and row["name"] == "rollout.seconds"]
    assert [row["section"] for row in seconds] == ["cost_shared"]  # the other run's time, marked
    summaries = [json.loads((folder / "summary.json").read_text())["rounds"] for folder in seeded[:2]]
    mean = sum(rounds[1]["avg_at_2"] for rounds in summaries) / 2
    row = next(
        row for row in figures if (row["run"], row["name"], row["round"]) == ("seeded (2 seeds)", "avg_at_k", "1")
    )
    assert float(row["value"]) == pytest.approx(mean)
    assert (tmp_path / "page" / "figures" / "uncertain-fkl.svg").exists()
