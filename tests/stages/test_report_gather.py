"""What the report reads from artifacts: evaluations, alignments, training, rollouts, costs. All figures are made up."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from eopd.stages.align.divergence import SUMMED, EntropyBins, summarise_bins
from eopd.stages.report.compare import merged
from eopd.stages.report.data import FIRST, OWN, Estimate, ReportData, RunData
from eopd.stages.report.gather import FIRST_STEP, RoundArtifacts, RunArtifacts, gather, seconds_by_key, summary_rows
from eopd.stages.report.page import render
from eopd.stages.report.run import to_csv
from eopd.storage import records as analyses
from eopd.storage import records as evaluations
from eopd.storage.artifacts import Artifact
from eopd.storage.identity import Identity
from eopd.storage.records import write_rollouts
from eopd.storage.teacher_record import HeadRule
from tests.storage.making import scores

FIGURES = {
    "avg_at_k": 0.25,
    "avg_interval": [0.2, 0.3],
    "pass_at_k": {"1": 0.25, "2": 0.5},
    "pass_interval": {"1": [0.2, 0.3], "2": [0.4, 0.6]},
    "distinct_correct": 0.5,
    "distinct_correct_interval": [0.4, 0.6],
    "self_bleu": 0.75,
    "self_bleu_interval": [0.625, 0.875],
    "distinct_4": 0.125,
    "distinct_4_interval": None,
    "token_entropy": 0.5,
    "token_entropy_interval": [0.4375, 0.5625],
    "response_tokens": {"mean": 17.0, "interval": [16.0, 18.0]},
    "stop_rate": 0.75,
    "truncation_rate": 0.25,
    "truncation_rate_interval": [0.125, 0.375],
    "ungraded": 0,
}
ONE = {**FIGURES, "problems": 2, "samples": 2, "skipped": []}


def evaluation(store: Path, number: int, *, confidence: float = 0.95, **changes: Any) -> Artifact:
    """An evaluation of benchmarks b and a with two problems each; the summary alone."""
    files = {"benchmark a": "fa", "benchmark b": "fb", "policy": str(number)}
    artifact = Artifact(store, Identity("evaluation_summaries", 1, 1, {"made up": number}, files))
    rows = [
        {
            "benchmark": benchmark,
            "problem_id": str(problem),
            "samples": 2,
            "correct": problem,
            "truncated": 0,
            "distinct_correct": problem,
            "self_bleu": 0.75,
            "distinct_4": 0.125,
            "response_tokens": 17.0,
        }
        for benchmark in ("b", "a")
        for problem in range(2)
    ]
    results = {"mean": FIGURES, "benchmarks": {"b": ONE, "a": ONE}, "settings": {"confidence": confidence}, **changes}
    with artifact.write_part(0) as folder:
        evaluations.PROBLEMS.write(folder, rows)
        (folder / evaluations.RESULTS).write_text(json.dumps(results))
    return artifact


def gathered(tmp_path: Path, *rounds: RoundArtifacts, name: str = "run", seed: int = 0, **more: Any) -> RunData:
    none = tmp_path / "none"
    settings = {"train": {"objective": {"name": "opd", "support": "renormalised", "k": 16}}}
    return gather(
        RunArtifacts(**{"name": name, "settings": settings, "rounds": rounds, "tokenizer": "", "tau": None, **more},
                     metrics=none, jobs=none, seed=seed)
    )  # fmt: skip


def evaluated(tmp_path: Path, *result: Artifact, **more: Any) -> RunData:
    return gathered(tmp_path, *[RoundArtifacts(number, artifact) for number, artifact in enumerate(result)], **more)


def rows_of(*runs: RunData) -> list[dict[str, str]]:
    return list(csv.DictReader(to_csv(ReportData("made up", "now", list(runs))).splitlines()))


def page_of(*runs: RunData) -> str:
    return render(ReportData("made up", "now", list(runs)))[0]


def test_every_figure_of_an_evaluation_is_in_the_table_and_in_the_numbers(tmp_path: Path) -> None:
    run = evaluated(tmp_path, evaluation(tmp_path, 0))
    rows = {row["name"]: row for row in rows_of(run) if row["section"] == "round"}
    wanted = {
        "self_bleu": 0.75,
        "distinct_4": 0.125,
        "token_entropy": 0.5,
        "stop_rate": 0.75,
        "truncation_rate": 0.25,
        "response_length": 17.0,
        "distinct_correct": 0.5,
        "ungraded": 0,
        "left_out": 0,
    }
    assert {name: float(rows[name]["value"]) for name in wanted} == wanted
    assert (rows["self_bleu"]["low"], rows["distinct_4"]["low"], rows["response_length"]["high"]) == (
        "0.625",
        "",
        "18.0",
    )
    table = page_of(run).split("Every evaluation</summary>")[1].split("</table>")[0]
    for cell in ("4 × 2", "0.250 [0.200, 0.300] at 2", "0.750 [0.625, 0.875]", "25.0 % [12.5 %, 37.5 %]"):
        assert f"<td>{cell}</td>" in table
    assert (run.warnings, run.interval) == ([], "95 % bootstrap over problems")
    assert [row["problems"] for row in summary_rows(run, 2)] == [4]
    assert [row["avg_at_2"] for row in summary_rows(run, 2)] == [0.25]


def test_figures_of_each_benchmark_stand_beside_their_mean(tmp_path: Path) -> None:
    aime = {**ONE, "avg_at_k": 0.125, "avg_interval": [0.0625, 0.1875], "ungraded": 1, "skipped": ["x"]}
    left_out = [{"benchmark": "b", "start": 4, "stop": 9}]
    made = evaluation(tmp_path, 0, left_out=left_out, benchmarks={"a": ONE, "b": aime})
    run = evaluated(tmp_path, made)
    rows = {row["name"]: row for row in rows_of(run) if row["section"] == "benchmark" and row["benchmark"] == "b"}
    assert [rows["avg_at_k"][name] for name in ("x", "value", "low", "high")] == ["2", "0.125", "0.0625", "0.1875"]
    assert (rows["left_out"]["value"], rows["ungraded"]["value"]) == ("6", "1")
    table = page_of(run).split("Every evaluation</summary>")[1].split("</table>")[0]
    assert [table.index(f"<td>{name}</td>") for name in ("mean", "a", "b")] == sorted(
        table.index(f"<td>{name}</td>") for name in ("mean", "a", "b")
    )
    better = evaluation(tmp_path, 1, benchmarks={"b": {**aime, "avg_at_k": 0.375}, "a": ONE})
    both = merged([run, evaluated(tmp_path, better, seed=1, name="other")]).rounds[0]
    assert both.benchmarks["b"].value("avg") == 0.25
    assert both.value("left_out") == 7  # a sum, not a mean
    alone = evaluated(tmp_path, evaluation(tmp_path, 2, benchmarks={"b": ONE}))
    assert "benchmark" not in {row["section"] for row in rows_of(alone)}


def test_the_gain_is_paired_by_problem_with_the_confidence_of_the_run(tmp_path: Path) -> None:
    def gain(confidence: float) -> Estimate:
        result = [evaluation(tmp_path / str(confidence), n, confidence=confidence) for n in (0, 1)]
        return evaluated(tmp_path, *result).gains["avg"]

    wide, narrow = gain(0.95), gain(0.5)
    assert wide.value == narrow.value == 0.0
    assert wide.low is not None
    assert narrow.low is not None
    assert wide.low < narrow.low
    run = evaluated(tmp_path, evaluation(tmp_path, 0), evaluation(tmp_path, 1))
    assert [score.names for score in run.scores] == [["a/0", "a/1", "b/0", "b/1"]] * 2
    assert run.scores[0].correct == [[0, 1, 0, 1]]
    assert run.scores[0].sources == {"a": "fa", "b": "fb"}


def test_what_spoils_figures_is_said_beside_them(tmp_path: Path) -> None:
    spoilt = evaluation(
        tmp_path,
        1,
        mean={**FIGURES, "ungraded": 3},
        benchmarks={"b": {**ONE, "ungraded": 3, "skipped": ["x"]}, "a": ONE},
        verifiers=["math-verify 0.9.0"],
        left_out=[{"benchmark": "b", "start": 4, "stop": 9}],
    )
    run = evaluated(tmp_path, evaluation(tmp_path, 0, verifiers=["math-verify 0.8.0"]), spoilt)
    assert [(item.value("ungraded"), item.value("left_out")) for item in run.rounds] == [(0, 0), (3, 6)]
    assert len(run.warnings) == 4
    for text in ("3 of 8 answers in round 1", ": 5 in round 1", ": 1 in round 1", "math-verify 0.8.0 and math-verify"):
        assert any(text in warning for warning in run.warnings), text
    page = page_of(run)
    assert all(warning in page.split('id="quality"')[0] for warning in run.warnings)
    assert merged([run, evaluated(tmp_path, seed=1)]).warnings[0].startswith("Seed 0: ")


def measured(fkl: float, tau: float) -> dict[str, Any]:
    """Two problems, tokens below and above ``tau``."""
    bins = EntropyBins.of((), tau, 50)
    sums = np.zeros((2, bins.count, len(SUMMED)))
    sums[:, :, 0] = 10
    sums[:, :, SUMMED.index("fkl")] = 10 * fkl * np.asarray([[0.9], [1.1]])
    return summarise_bins(sums, [0, 1], bins).to_json()


def alignment(store: Path, fkl: dict[str, float], *, tau: float = 0.8, teacher: str = "t", **settings: Any) -> Artifact:
    artifact = Artifact(store, Identity("alignment_summaries", 1, 1, {"made up": [fkl, tau, teacher, settings]}))
    results = {
        "responses": {name: measured(value, tau) for name, value in fkl.items()},
        "settings": {"tau": tau, "temperature": 1.0, "merge_stops": True, "limit": None, **settings},
        "teacher_prompt": {"kind": "same"},
        "teacher": {"fingerprint": teacher},
        "artifact": {"inputs": {f"{name} evaluation": f"{name} key" for name in fkl}},
    }
    with artifact.write_part(0) as folder:
        (folder / analyses.ALIGNMENT_RESULTS).write_text(json.dumps(results))
    return artifact


def aligned(tmp_path: Path, *result: Artifact, **more: Any) -> RunData:
    rounds = [RoundArtifacts(number, None, alignment=artifact) for number, artifact in enumerate(result)]
    return gathered(tmp_path, *rounds, **more)


@pytest.mark.parametrize("order", [(OWN, FIRST), (FIRST, OWN)])
def test_alignments_of_each_kind_of_samples_are_drawn_apart(tmp_path: Path, order: tuple[str, str]) -> None:
    fkl = {OWN: 1.5, FIRST: 0.25}
    run = aligned(tmp_path, *[alignment(tmp_path, {name: fkl[name] + n for name in order}) for n in range(2)])
    assert [item.value("held_out_fkl") for item in run.rounds] == pytest.approx([1.5, 2.5])
    assert [item.value("first_held_out_fkl") for item in run.rounds] == pytest.approx([0.25, 1.25])
    assert run.rounds[0].figures["first_held_out_uncertain_fkl"].bounds == pytest.approx((0.225, 0.275))
    svgs = {drawing.name: drawing.svg for drawing in render(ReportData("made up", "now", [run]))[1]}
    for panel in ("uncertain-fkl", "held-out-fkl", "agreement", "above-threshold", "fkl-by-entropy"):
        assert "own samples" in svgs[panel]
        assert "the first student's samples" in svgs[f"first-{panel}"]
    assert "above 0.8 nats" in svgs["uncertain-fkl"]
    bins = [(row["section"], float(row["value"])) for row in rows_of(run) if row["name"] == "fkl"]
    assert (
        sorted(bins)
        == [("by_entropy_bin", pytest.approx(2.5))] * 2 + [("first_by_entropy_bin", pytest.approx(1.25))] * 2
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tau": 1.2}, "evaluate.alignment.tau is 0.8 in a and 1.2 in b"),
        ({"temperature": 0.7}, "evaluate.alignment.temperature is 1.0 in a and 0.7 in b"),
        ({"teacher": "u"}, "the teacher is t in a and u in b"),
        ({}, ""),
    ],
)
def test_alignments_of_different_things_are_named(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    one = aligned(tmp_path, alignment(tmp_path, {OWN: 1.5}), name="a")
    other = aligned(tmp_path, alignment(tmp_path, {OWN: 1.5}, **changes), name="b")
    page = page_of(one, other)
    assert ("Not measured alike" in page) == bool(text)
    assert text in page


TOKENS = 10


def trained(store: Path, round_: int, steps: int = 3, epochs: int = 2) -> Artifact:
    """Figures of step s of round r are r + s / 10; with the entropies of ``2 + r`` tokens at the round's start."""
    artifact = Artifact(store, Identity("checkpoints", 1, 2, {"round": round_}))
    rows = [
        {"round": round_, "step": step, "epoch": step // steps, "tokens": TOKENS, "note": "text"}
        | dict.fromkeys(FIRST_STEP, round_ + step / 10)
        for step in range(steps * epochs)
    ]
    with artifact.write_part(0) as folder:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with artifact.write_part(1) as folder:
        save_file({"entropy": np.full(2 + round_, 0.25, np.float32)}, folder / "round_start.safetensors")
    return artifact


def test_a_figure_by_round_is_of_the_student_at_its_start(tmp_path: Path) -> None:
    """That is the first step, taken before any update; the last student trains no more and has none."""
    made: list[Any] = [trained(tmp_path, number) for number in range(2)]
    run = gathered(tmp_path, *[RoundArtifacts(n, None, checkpoint=one) for n, one in enumerate([*made, None])])
    for name in FIRST_STEP:
        assert [item.value(name) for item in run.rounds] == [0.0, 1.0, None]
        assert [row[name] for row in summary_rows(run, 8)] == [0.0, 1.0, None]
    assert [item.value("tokens") for item in run.rounds] == [3 * TOKENS, 3 * TOKENS, None]
    assert "note" not in run.training[0].figures
    page = page_of(run)
    assert "0.00 → 1.00 (round 1)" in page
    assert "<dt>Training tokens</dt><dd>60</dd>" in page


def test_the_histograms_are_of_one_round_and_empty_parts_count_nothing(tmp_path: Path) -> None:
    """Of the last that is scored and trained: not of a round under way, nor of one whose start was pruned."""
    scored = [scores(tmp_path / str(n), 1, lengths=tokens)[0] for n, tokens in enumerate([[2], [3], [4]])]
    one, other = trained(tmp_path, 0), trained(tmp_path, 1)

    def counts(*rounds: RoundArtifacts) -> list[int | None]:
        run = gathered(tmp_path, *rounds)
        return [sum(each.counts) if each is not None else None for each in (run.teacher_entropy, run.student_entropy)]

    first = RoundArtifacts(0, None, scores=(scored[0],), checkpoint=one)
    second = RoundArtifacts(1, None, scores=(scored[1],), checkpoint=other)
    under_way = RoundArtifacts(2, None, scores=(scored[2],))
    unscored = RoundArtifacts(1, None, checkpoint=other)
    assert counts(first, second, under_way) == [3, 3]
    assert counts(first, unscored) == [2, 2]
    assert counts(under_way) == [4, None]
    assert counts(unscored) == [None, 3]
    assert counts() == counts(RoundArtifacts(0, None)) == [None, None]


def test_divergences_of_other_heads_are_said_to_be_such(tmp_path: Path) -> None:
    """Heads of 16 and of 4 ids give other KL of the same models; what is stored and not read makes no difference."""

    def run(called: str, head: HeadRule, **objective: Any) -> RunData:
        scored = scores(tmp_path / called, 1, head, lengths=[2])[0]
        rounds = RoundArtifacts(0, None, scores=(scored,), checkpoint=trained(tmp_path / called, 0))
        settings = {"train": {"objective": {"support": "bucket", **objective}}}
        return gathered(tmp_path, rounds, name=called, settings=settings)

    fixed, wide = HeadRule(k_max=16, full_head_above=-1.0), HeadRule(k_max=64, full_head_above=-1.0)
    opd, wider = run("opd", fixed, name="opd", k=16), run("wider", wide, name="opd", k=16)
    assert opd.head == wider.head == "the 16 most probable ids"
    assert "different heads" not in page_of(opd, wider)
    few = run("few", fixed, name="fkl", k=4)
    assert "different heads: the teacher's head is the 16 most probable ids in opd and the 4" in page_of(
        opd, few
    ).replace("&#39;", "'")
    assert run("sft", fixed, name="sft", k=16).head == "the most probable id"
    assert run("draws", wide, name="fkl", k=16, support="sampled").head == "the 64 most probable ids"
    assert run("adaptive", HeadRule(), name="fkl", k=16).head.startswith("ids of probability 0.03 and more, 16")


def test_the_heading_of_a_rollout_is_the_users_message(tmp_path: Path) -> None:
    """Not the system prompt, which is the same for all. A prompt that holds no message is shown as its tokens."""
    vocabulary = {word: number for number, word in enumerate(["system", "ask", "well", "<|im_start|>"])}
    Tokenizer(WordLevel(vocabulary, unk_token="ask")).save(str(tmp_path / "tokenizer.json"))
    conversation = [("system", "Be brief."), ("user", "What is 1 + 1?"), ("assistant", "2"), ("user", "And <b>2</b>?")]
    messages = json.dumps([{"role": role, "content": content} for role, content in conversation])
    scored = scores(tmp_path, 1, lengths=[2, 2, 2])[0]
    rollouts = Artifact(tmp_path, Identity("rollouts", 1, 1, {"made up": 1}))
    rows = [
        {
            "prompt_id": str(n),
            "prompt_index": n,
            "sample": 0,
            "messages": text,
            "answer": "4",
            "verifier": "exact",
            "prompt_token_ids": [0, 1],
            "response_token_ids": [2, 2],
            "response_text": "well well",
            "seed": 0,
            "logprobs": None,
            "finish_reason": reason,
        }
        for n, (text, reason) in enumerate([(messages, "stop"), (None, "length"), ("[" * 100_000, "stop")])
    ]
    with rollouts.write_part(0) as folder:
        write_rollouts(folder, rows)
    rounds = RoundArtifacts(0, None, rollouts=rollouts, scores=(scored,))
    run = gathered(tmp_path, rounds, tokenizer=str(tmp_path), judge=lambda _, pairs: [True] * len(pairs))
    assert [view.prompt for view in run.rollouts] == ["And <b>2</b>?", "system ask", "system ask"]
    assert [view.truncated for view in run.rollouts] == [False, True, False]
    page = page_of(run)
    assert '<span class="ask">And &lt;b&gt;2&lt;/b&gt;?</span><span class="score">1 of 1 right</span>' in page
    assert "Be brief." not in page


def test_costs_take_their_time_from_the_runs_that_did_the_work(tmp_path: Path) -> None:
    mine, theirs = (Artifact(tmp_path, Identity("rollouts", 1, 1, {"n": n})) for n in (0, 1))
    for artifact in (mine, theirs):
        with artifact.write_part(0, info={"tokens": 7}) as folder:
            (folder / "data").write_bytes(b"12345")
    logs = [tmp_path / "mine.jsonl", tmp_path / "theirs.jsonl"]
    logs[0].write_text(f'{{"key": "{mine.key}", "seconds": 2.0}}\n{{"key": "{mine.key}", "seconds": 1.5}}\n{{"k')
    logs[1].write_text(f'{{"key": "{theirs.key}", "seconds": 4.0}}\n{{"key": "{mine.key}", "seconds": 1.0}}\n')
    rounds = [RoundArtifacts(n, None, made={"rollout": artifact}) for n, artifact in enumerate((mine, theirs))]
    run = gather(
        RunArtifacts(
            "run", {}, rounds, "", None, tmp_path / "none", logs[0], elsewhere=logs[1:], also_read={theirs.key}
        )
    )
    assert [(row.seconds, row.tokens, row.bytes, row.shared) for row in run.cost] == [
        (4.5, 7, 5, False),
        (4.0, 7, 5, True),
    ]
    assert seconds_by_key(tmp_path / "none") == {}
