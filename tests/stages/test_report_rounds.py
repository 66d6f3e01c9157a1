"""Which student a figure by round is of, and which round the histograms are of. All figures are made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from eopd.stages.report import headline
from eopd.stages.report.data import ReportData, RoundData, RunData
from eopd.stages.report.gather import FIGURES, RoundArtifacts, RunArtifacts, gather, summary_rows
from eopd.stages.report.page import figures, render
from eopd.stages.report.seeds import merged
from eopd.storage.artifacts import Artifact, Identity
from eopd.storage.teacher_record import HeadRule
from tests.storage.making import scores

TOKENS = 10


def trained(store: Path, round_: int, steps: int = 3, epochs: int = 2) -> Artifact:
    """Figures of step s of round r are r + s / 10; with the entropies of ``2 + r`` tokens at the round's start."""
    artifact = Artifact(store, Identity("checkpoints", 1, 2, {"round": round_}))
    rows = [
        {"round": round_, "step": step, "epoch": step // steps, "tokens": TOKENS}
        | dict.fromkeys(FIGURES, round_ + step / 10)
        for step in range(steps * epochs)
    ]
    with artifact.write_part(0) as folder:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with artifact.write_part(1) as folder:
        save_file({"entropy": np.full(2 + round_, 0.25, np.float32)}, folder / "round_start.safetensors")
    return artifact


def gathered(tmp_path: Path, rounds: list[RoundArtifacts], objective: dict[str, Any] | None = None) -> RunData:
    none = tmp_path / "none"
    settings = {"train": {"objective": objective or {"name": "opd", "support": "renormalised", "k": 16}}}
    return gather(RunArtifacts("run", settings, rounds, tokenizer="", tau=None, metrics=none, jobs=none))


def test_a_figure_by_round_is_of_the_student_at_its_start(tmp_path: Path) -> None:
    """That is the first step, taken before any update; the last student trains no more and has none."""
    made: list[Any] = [trained(tmp_path, number) for number in range(2)]
    rounds = [RoundArtifacts(number, None, checkpoint=found) for number, found in enumerate([*made, None])]
    run = gathered(tmp_path, rounds)
    for name in FIGURES:
        assert [getattr(item, name) for item in run.rounds] == [0.0, 1.0, None]
        assert [row[name] for row in summary_rows(run, 8)] == [0.0, 1.0, None]
    assert [item.tokens for item in run.rounds] == [3 * TOKENS, 3 * TOKENS, None]
    drawn = {figure.name: figure for figure in figures(ReportData("made up", "now", [run]))}
    assert drawn["rkl"].xs() == [0, 1]
    facts = dict(headline.summarise([run])[0].facts)
    assert facts["Reverse KL"] == "0 → 1.00 (round 1)"
    assert facts["Student tokens"] == "60"


def test_a_fact_of_the_last_round_needs_no_round() -> None:
    run = RunData("run", rounds=[RoundData(0, distinct_correct=1.0, fkl=0.5), RoundData(1, distinct_correct=1.5)])
    facts = dict(headline.summarise([run])[0].facts)
    assert facts == {"Distinct correct": "1.00 → 1.50", "Forward KL": "0.500 (round 0)"}


def test_the_histograms_of_teacher_and_student_are_of_one_round(tmp_path: Path) -> None:
    """Of the last that is scored and trained: not of a round under way, nor of one whose start was pruned."""
    lengths = [[2], [3], [4]]
    scored = [scores(tmp_path / str(n), 1, lengths=tokens)[0] for n, tokens in enumerate(lengths)]
    one, other = trained(tmp_path, 0), trained(tmp_path, 1)

    def counts(*rounds: RoundArtifacts) -> list[int | None]:
        run = gathered(tmp_path, list(rounds))
        found = run.entropy_histogram_teacher, run.entropy_histogram_student
        return [sum(each.counts) if each is not None else None for each in found]

    first, second = (
        RoundArtifacts(n, None, scores=scored[n], checkpoint=found) for n, found in enumerate((one, other))
    )
    under_way = RoundArtifacts(2, None, scores=scored[2])
    assert counts(first, second, under_way) == [3, 3]
    unscored = RoundArtifacts(1, None, checkpoint=other)
    assert counts(first, unscored) == [2, 2]
    assert counts(under_way) == [4, None]
    assert counts(unscored) == [None, 3]


@pytest.mark.parametrize("rounds", [[], [RoundArtifacts(0, None)]])
def test_nothing_is_guessed(tmp_path: Path, rounds: list[RoundArtifacts]) -> None:
    run = gathered(tmp_path, rounds)
    assert run.entropy_histogram_teacher is run.entropy_histogram_student is None
    assert all(item.rkl is None and item.tokens is None for item in run.rounds)


def test_divergences_of_training_of_other_heads_are_said_to_be_such(tmp_path: Path) -> None:
    """Heads of 16 and of 4 ids give other KL of the same models; what is stored and not read makes no difference."""

    def run(called: str, head: HeadRule, **objective: Any) -> RunData:
        found = scores(tmp_path / called, 1, head, lengths=[2])[0]
        rounds = [RoundArtifacts(0, None, scores=found, checkpoint=trained(tmp_path / called, 0))]
        return replace(gathered(tmp_path, rounds, {"support": "bucket", **objective}), name=called)

    fixed = HeadRule(k_max=16, full_head_above=-1.0)
    opd, wider = run("opd", fixed, name="opd", k=16), run("wider", replace(fixed, k_max=64), name="opd", k=16)
    assert opd.head == wider.head == "the 16 most probable ids"
    assert "of the teacher's head" not in render(ReportData("same", "now", [opd, wider]))
    others = [
        run("few", fixed, name="fkl", k=4),
        run("sft", fixed, name="sft", k=16),
        run("draws", replace(fixed, k_max=64), name="fkl", k=16, support="sampled"),
        run("adaptive", HeadRule(), name="fkl", k=16),
        run("own", fixed, name="mine.py:loss", k=16),
    ]
    assert [other.head for other in others] == [
        "the 4 most probable ids",
        "the most probable id",
        "the 64 most probable ids",
        "ids of probability 0.03 and more, 16 at most and past 0.4 nats",
        "the 16 most probable ids, as mine.py:loss reads it",
    ]
    for other in others:
        page = render(ReportData("two", "now", [opd, wider, other]))
        assert page.count(f"it is the 16 most probable ids in opd and wider and {other.head} in {other.name}.") == 2
    assert merged([replace(opd, seed=0), replace(wider, seed=1)]).head == opd.head
