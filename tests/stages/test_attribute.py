"""Attribution: ids and labels that are handed over, bins and z-scores by hand, refusals, and bergson where it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from eopd.stages.attribute import run as stage
from eopd.stages.attribute import trackstar
from eopd.stages.attribute.documents import (
    Text,
    bins_of_file,
    check_bins,
    read_documents,
    read_queries,
    read_rollout_documents,
)
from eopd.stages.attribute.run import (
    AttributeJob,
    AttributionSummaryJob,
    bin_table,
    contrast,
    permutation_test,
    run,
    summarise,
)
from eopd.stages.attribute.settings import AttributeSettings, QuerySettings, bergson_version, check_model
from eopd.stages.evaluate.settings import EvaluateSettings
from eopd.stages.job import ModelRef
from eopd.stages.models.prompts import PromptSettings
from eopd.stages.problems import Problems
from eopd.stages.report.data import AttributionData, ReportData, RunData
from eopd.stages.report.figures import attribution
from eopd.stages.report.gather import RoundArtifacts, _attribution
from eopd.stages.report.page import render
from eopd.stages.report.run import to_csv
from eopd.storage import records as analyses
from eopd.storage import records as evaluations
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import DamagedPart, InputError, UserError
from eopd.storage.identity import Identity
from tests.raises import raises
from tests.stages.score_case import Lines, response_row, rollouts

COUNTDOWN = Path(__file__).parents[2] / "examples" / "countdown"
STUDENT = ModelRef(str(COUNTDOWN / "student"), fingerprint="student")
TOKENIZER = AutoTokenizer.from_pretrained(COUNTDOWN / "student")
STOP = int(TOKENIZER.eos_token_id)
TIMES, PLUS = "2+3=5,5*4=20", "2*3=6,6+4=10"
ROWS = [
    {"id": f"d{number}", "problem": "2,3,4=20:" if last == "*" else "2,3,4=10:", "text": text, "last": last, "n": 3}
    for number, (last, text) in enumerate([("*", TIMES), ("+", PLUS)] * 4)
]
PROMPTS = PromptSettings(path="p.jsonl", template="plain")


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def settings(folder: Path, rows: list[dict[str, Any]] = ROWS, **changes: Any) -> AttributeSettings:
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "documents": {
            "path": str(path),
            "columns": {"prompt": "problem", "text": "text", "id": "id"},
            "bins": ["last", "n"],
        },
        "queries": {"right": {"benchmark": "b"}, "wrong": {"benchmark": "b", "samples": "wrong"}},
        "cpu_threads": 1,
    }
    return AttributeSettings(**(values | changes))


def evaluated(folder: Path) -> tuple[Artifact, EvaluateSettings]:
    """Two right samples and a wrong one, of one problem, and a right one of another benchmark."""
    problems = folder / "b.jsonl"
    problems.write_text('{"id": "q", "problem": "3,4,5=35:", "answer": "3,4,5=35"}\n')
    benchmarks = [{"name": name, "path": str(problems), "verifier": "countdown"} for name in ("b", "other")]
    asked = EvaluateSettings(benchmarks=benchmarks, template="plain", suffix="", max_new_tokens=24)
    rows = [
        {
            "benchmark": benchmark,
            "problem_id": "q",
            "problem_index": 0,
            "sample": sample,
            "answer": "3,4,5=35",
            "prompt_tokens": 9,
            "response_token_ids": [*ids_of(text), STOP],
            "response_text": text,
            "finish_reason": "stop",
            "correct": correct,
            "seed": 0,
        }
        for benchmark, sample, text, correct in [
            ("b", 0, "3+4=7,7*5=35", True),
            ("b", 1, "3*4=12,12+5=17", False),
            ("b", 2, "4+3=7,5*7=35", True),
            ("other", 0, "4+3=7,7*5=35", True),
        ]
    ]
    evaluation = Artifact(folder / "store", Identity("evaluations", 1, 1))
    with evaluation.write_part(0) as part:
        evaluations.SAMPLES.write(part, rows)
    return evaluation, asked


def job_for(folder: Path, query: str = "right", asked: AttributeSettings | None = None, **changes: Any) -> AttributeJob:
    evaluation, evaluate = evaluated(folder)
    job = AttributeJob(
        output=Artifact(folder / "store", Identity("attributions", 1, 1, {"query": query})),
        query=query,
        settings=asked or settings(folder),
        evaluation=evaluation,
        evaluate=evaluate,
        rollouts=None,
        prompts=PROMPTS,
        stop_ids=(STOP,),
        policy=STUDENT,
        seed=3,
        log=folder / "logs" / "bergson.log",
        progress=Lines(),
    )
    return replace(job, **changes)


def summary_for(folder: Path, job: AttributeJob, **scores: Artifact) -> AttributionSummaryJob:
    output = Artifact(folder / "store", Identity("attribution_summaries", 1, 1))
    return AttributionSummaryJob(output, scores, job.settings, job.evaluate, job.rollouts, PROMPTS, 3, Lines())


class Standing:
    """A process in bergson's place: the score of a document is the sum of its labels, which says whose it is."""

    def __init__(self, *, fails: bool = False, value: float | None = None) -> None:
        self.fails, self.value = fails, value
        self.tasks: list[dict[str, Any]] = []
        self.read: dict[str, list[dict[str, list[int]]]] = {}

    def __call__(self, command: list[str], *, stdout: Any, env: dict[str, str], **_: Any) -> Any:
        folder = Path(command[-1])
        assert command[:-1] == [sys.executable, "-m", "eopd.stages.attribute.trackstar"]
        assert env["HF_HUB_OFFLINE"] == "1"
        assert env["TMPDIR"] == str(folder)
        if self.fails:
            stdout.write(b"one\ntwo\nthree\nOutOfMemoryError: no room\n")
            return subprocess.CompletedProcess(command, 3)
        self.tasks.append(json.loads((folder / trackstar.TASK).read_text()))
        for name in (trackstar.DOCUMENTS, trackstar.QUERIES):
            self.read[name] = pq.read_table(folder / name).to_pylist()
        scores = [self.value or sum(max(one, 0) for one in row["labels"]) for row in self.read[trackstar.DOCUMENTS]]
        np.save(folder / trackstar.SCORES, np.array(scores, dtype=np.float32))
        (folder / trackstar.RESULT).write_text(json.dumps({"modules": 21}))
        (folder / "left.pth").write_bytes(b"a pickle")
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def standing(monkeypatch: pytest.MonkeyPatch) -> Standing:
    process = Standing()
    monkeypatch.setattr(stage.subprocess, "run", process)
    monkeypatch.setattr(stage, "lacking_bergson", lambda: None)
    monkeypatch.setattr(stage, "bergson_version", lambda: "2.5.1")
    return process


# -- ids and labels ---------------------------------------------------------------------------------------------------


def test_a_document_after_a_prompt_has_a_loss_on_its_text_alone(tmp_path: Path) -> None:
    asked = settings(tmp_path)
    assert asked.documents is not None
    first = next(read_documents(asked.documents.source(PROMPTS), TOKENIZER, [STOP]))
    prompt, text = ids_of("2,3,4=20:"), [*ids_of(TIMES), STOP]
    assert (first.name, first.ids) == ("d0", prompt + text)
    assert first.labels == [-100] * len(prompt) + text
    assert first.losses == len(text)


def test_a_document_without_a_prompt_is_its_text(tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text('{"text": "1+2=3", "kind": "a"}\n')
    asked = settings(tmp_path, documents={"path": str(path), "bins": ["kind"]})
    assert asked.documents is not None
    chat = PromptSettings(path="p.jsonl", suffix="not added")
    (document,) = read_documents(asked.documents.source(chat), TOKENIZER, [STOP])
    assert (document.name, document.ids, document.labels) == ("0", ids_of("1+2=3"), ids_of("1+2=3"))
    assert document.losses == len(document.ids) - 1, "nothing predicts the first token"


def test_rollouts_are_read_as_they_were_sampled(tmp_path: Path) -> None:
    row = response_row(4, [5, 6, 7], prompt_token_ids=[8, 9])
    (document,) = read_rollout_documents(rollouts(tmp_path, [[row]]))
    assert document.name == f"{row['prompt_id']}/{row['sample']}"
    assert (document.ids, document.labels) == ([8, 9, 5, 6, 7], [-100, -100, 5, 6, 7])


@pytest.mark.parametrize(("samples", "chosen"), [("right", ["q/0", "q/2"]), ("wrong", ["q/1"]), ("any", [0, 1, 2])])
def test_a_query_set_has_the_samples_of_one_benchmark(tmp_path: Path, samples: Any, chosen: list[Any]) -> None:
    evaluation, asked = evaluated(tmp_path)
    query = QuerySettings(benchmark="b", samples=samples)
    read = list(read_queries(evaluation, query, Problems(asked, TOKENIZER)))
    assert [text.name for text in read] == [one if isinstance(one, str) else f"q/{one}" for one in chosen]
    assert all(text.ids[: text.start] == ids_of("3,4,5=35:") for text in read)


def test_scores_are_those_of_their_documents_and_nothing_else_is_stored(tmp_path: Path, standing: Standing) -> None:
    job = job_for(tmp_path)
    run(job)
    (task,) = standing.tasks
    assert (task["model"], task["token_batch"], task["seed"]) == (str(COUNTDOWN / "student"), 256, 3)
    assert len(standing.read[trackstar.QUERIES]) == 2
    handed = standing.read[trackstar.DOCUMENTS]
    assert Counter(len(row["input_ids"]) for row in handed) == {len(ids_of("2,3,4=20:" + TIMES)) + 1: 8}
    rows = analyses.ATTRIBUTION_SCORES.read(job.output.part_folder(0)).to_pylist()
    assert [row["document"] for row in rows] == [row["id"] for row in ROWS]
    assert [row["score"] for row in rows] == [sum(ids_of(row["text"])) + STOP for row in ROWS]
    assert {row["query_set"] for row in rows} == {"right"}
    assert [path.name for path in job.output.part_folder(0).iterdir()] == [analyses.ATTRIBUTION_SCORES.file_name]
    assert job.output.marker(0).info["bergson"] == "2.5.1"


# -- bins -------------------------------------------------------------------------------------------------------------


def test_the_table_of_bins_by_hand() -> None:
    scores, bins = np.array([1.0, 3.0, 5.0, 6.0, 10.0]), [("a",), ("a",), ("b",), ("c",), ("c",)]
    rows = bin_table(scores, bins)
    assert [(row["bin"], row["n"], row["mean"]) for row in rows] == [(["a"], 2, 2.0), (["b"], 1, 5.0), (["c"], 2, 8.0)]
    # means 2, 5, 8: their standard deviation is 3
    assert [row["z"] for row in rows] == pytest.approx([-1.0, 0.0, 1.0])
    assert [row["sd"] for row in rows] == [pytest.approx(2**0.5), None, pytest.approx(8**0.5)]
    assert [row["z"] for row in bin_table(np.ones(2), [("a",), ("b",)])] == [None, None]


def test_bins_that_decide_the_score_pass_the_permutation_test_and_random_ones_do_not() -> None:
    bins = [("a",)] * 20 + [("b",)] * 20
    apart = permutation_test(np.repeat([0.0, 1.0], 20), bins, 999, seed=0)
    assert (apart["between"], apart["p"]) == (pytest.approx(1.0), 1 / 1000)
    same = permutation_test(np.tile([0.0, 1.0], 20), bins, 999, seed=0)
    assert (same["between"], same["p"]) == (0.0, 1.0)
    # of 4 documents in pairs, 2 of the 6 ways to draw a pair are as far apart
    few = permutation_test(np.array([0.0, 0.0, 1.0, 1.0]), [("a",), ("a",), ("b",), ("b",)], 9999, seed=0)
    assert few["p"] == pytest.approx(1 / 3, abs=0.03)


def test_a_contrast_is_of_standardised_scores() -> None:
    bins = [("a",), ("a",), ("b",), ("b",)]
    first, second = np.array([3.0, 3.0, 1.0, 1.0]), np.array([10.0, 30.0, 10.0, 30.0])
    rows = contrast(first, second, bins, resamples=200, confidence=0.9)
    # standardised: 1, 1, -1, -1 and -1, 1, -1, 1
    assert [(row["bin"], row["n"], row["mean"]) for row in rows] == [(["a"], 2, 1.0), (["b"], 2, -1.0)]
    assert rows[0]["interval"] == pytest.approx([0.0, 2.0])


def test_the_summary_joins_scores_and_bins(tmp_path: Path, standing: Standing) -> None:
    asked = settings(tmp_path, contrasts=[["right", "wrong"]], min_documents=4, permutations=100)
    jobs: dict[str, AttributeJob] = {}
    for name in ("right", "wrong"):
        (tmp_path / name).mkdir()
        jobs[name] = job_for(tmp_path / name, name, asked)
        run(jobs[name])
    job = summary_for(tmp_path, jobs["right"], **{name: one.output for name, one in jobs.items()})
    summarise(job)
    results = json.loads((job.output.part_folder(0) / analyses.ATTRIBUTION_RESULTS).read_text())
    rows = results["queries"]["right"]["bins"]
    assert [(row["bin"], row["n"], row["mean"]) for row in rows] == [
        (["*", "3"], 4, sum(ids_of(TIMES)) + STOP),
        (["+", "3"], 4, sum(ids_of(PLUS)) + STOP),
    ]
    assert (results["documents"], results["columns"], results["bergson"]) == (8, ["last", "n"], ["2.5.1"])
    assert (results["queries"]["right"]["count"], results["queries"]["wrong"]["count"]) == (2, 1)
    assert [row["mean"] for row in results["contrasts"][0]["bins"]] == [0.0, 0.0], "equal scores"
    assert isinstance(job.progress, Lines)
    # the file changed since
    settings(tmp_path, [{**row, "id": f"other {row['id']}"} for row in ROWS])
    again = replace(job, output=Artifact(tmp_path / "again", Identity("attribution_summaries", 1, 1)))
    with raises(InputError, setting="attribute.documents", remedy="plan the run again"):
        summarise(again)


def test_bins_of_rollouts_are_columns_of_their_prompts(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "x", "kind": "a"}\n{"prompt": "y", "kind": "b"}\n')
    source = rollouts(tmp_path, [[response_row(1, [5], prompt_index=1), response_row(0, [5], prompt_index=0)]])
    asked = settings(tmp_path, documents=None, rollouts={"round": 0, "bins": ["kind"]})
    named = stage.read_bins(asked, PromptSettings(path=str(prompts)), source)
    assert [bin_ for _, bin_ in named] == [("b",), ("a",)]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"last": None}, "'last' has no value"),
        ({"last": ["*"]}, "'last' has list"),
    ],
)
def test_a_document_without_a_bin_is_refused(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    asked = settings(tmp_path, [*ROWS[:-1], {**ROWS[-1], **row}])
    with raises(InputError, words, file="documents.jsonl", line=8):
        bins_of_file(asked, PROMPTS)


def test_one_bin_for_all_is_refused(tmp_path: Path) -> None:
    asked = settings(tmp_path, [{**row, "last": "*"} for row in ROWS])
    with raises(InputError, "last, n", setting="attribute.documents.bins"):
        bins_of_file(asked, PROMPTS)


def test_contrasts_over_small_bins_are_refused(tmp_path: Path) -> None:
    asked = settings(tmp_path, contrasts=[["right", "wrong"]])
    bins = [("a", "1")] * 30 + [("b", "2")] * 19
    with raises(InputError, "bin b / 2 has 19 documents", setting="attribute.contrasts"):
        check_bins(asked, bins)
    check_bins(settings(tmp_path), bins)


def test_a_query_set_without_samples_is_refused(tmp_path: Path, standing: Standing) -> None:
    asked = settings(tmp_path, queries={"right": {"benchmark": "other", "samples": "wrong"}})
    with raises(InputError, "other has no sample that is wrong", setting="attribute.queries.right"):
        run(job_for(tmp_path, asked=asked))
    assert not standing.tasks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (Text("x", [5], 0), "no token"),
        (Text("x", [5, 6], 2), "no token"),
        (Text("x", [5] * 9, 2), "9 tokens, and 8"),
    ],
)
def test_texts_without_a_gradient_or_too_long_are_refused(text: Text, message: str) -> None:
    with raises(InputError, message, setting="attribute.documents", prompt="x"):
        stage.check_texts("attribute.documents", [Text("fine", [5, 6], 1), text], 8)


@pytest.mark.parametrize("kind", ["quantised", "adapter"])
def test_models_that_are_not_the_trained_ones_are_refused(tmp_path: Path, kind: str) -> None:
    config: dict[str, Any] = {"quantization_config": {"bits": 4}} if kind == "quantised" else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if kind == "adapter":
        (tmp_path / "adapter_config.json").write_text("{}")
    with raises(InputError, kind, file=tmp_path):
        check_model(tmp_path)


def test_a_process_that_fails_is_told_with_the_end_of_its_log(
    tmp_path: Path, standing: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.subprocess, "run", Standing(fails=True))
    job = job_for(tmp_path)
    with raises(UserError, r"exit code 3.*two . three . OutOfMemoryError", file=job.log):
        run(job)
    assert not job.output.committed()


def test_scores_that_are_no_numbers_are_not_stored(
    tmp_path: Path, standing: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.subprocess, "run", Standing(value=float("nan")))
    job = job_for(tmp_path)
    with raises(UserError, "no numbers", file=job.log):
        run(job)
    assert not job.output.committed()


def test_without_bergson_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eopd.stages.attribute.settings.bergson_version", lambda: "")
    with raises(InputError, r"2\.5", setting="attribute", remedy="[attribution]"):
        run(job_for(tmp_path))


# -- bergson ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not bergson_version(), reason="bergson is not installed: the extra `attribution` brings it")
def test_bergson_scores_documents_like_the_samples_highest(tmp_path: Path) -> None:
    job = job_for(tmp_path)
    run(job)
    rows = analyses.ATTRIBUTION_SCORES.read(job.output.part_folder(0)).to_pylist()
    mean = {last: np.mean([one["score"] for one, row in zip(rows, ROWS, strict=True) if row["last"] == last])
            for last in "*+"}  # fmt: skip
    assert mean["*"] > mean["+"], "the right samples end with a multiplication"
    again = replace(job, output=Artifact(tmp_path / "again", job.output.identity))
    run(again)
    same = analyses.ATTRIBUTION_SCORES.read(again.output.part_folder(0)).column("score").to_pylist()
    assert same == pytest.approx([row["score"] for row in rows], abs=1e-5)
    assert [path.name for path in job.output.part_folder(0).iterdir()] == [analyses.ATTRIBUTION_SCORES.file_name]
    assert job.output.marker(0).info["modules"] == 21


# -- report -----------------------------------------------------------------------------------------------------------


def test_the_report_shows_bins_by_query_set(tmp_path: Path, standing: Standing) -> None:
    asked = settings(tmp_path, contrasts=[["right", "wrong"]], min_documents=4, permutations=100)
    outputs = {}
    for name in ("right", "wrong"):
        (tmp_path / name).mkdir()
        job = job_for(tmp_path / name, name, asked)
        run(job)
        outputs[name] = job.output
    summary = summary_for(tmp_path, job, **outputs)
    summarise(summary)
    made = RoundArtifacts(1, None, made={"attribution_summary": summary.output})
    result = _attribution(made)
    assert (result.round, result.documents, result.bins) == (1, 8, ["* / 3", "+ / 3"])
    highest = int(np.argmax([sum(ids_of(TIMES)), sum(ids_of(PLUS))]))
    assert result.z["right"][highest] == pytest.approx(0.5**0.5), "of two bins"
    data = ReportData("x", "today", [RunData("one", attribution=result), RunData("none")])
    page, drawings = render(data)
    assert "attribution-0" in {drawing.name for drawing in drawings}
    assert 'id="attribution"' in page
    assert "one: right - wrong" in page
    assert f"one,attribution,1,,right.* / 3,{result.z['right'][0]}" in to_csv(data)
    assert 'id="attribution"' not in render(ReportData("x", "today", [RunData("none")]))[0]
    path = summary.output.part_folder(0) / analyses.ATTRIBUTION_RESULTS
    path.write_text(json.dumps({"documents": 8}).ljust(path.stat().st_size))
    with pytest.raises(DamagedPart, match=r"attribution\.json"):
        _attribution(made)


def test_a_heat_map_shows_the_bins_furthest_from_the_mean() -> None:
    z = [0.1 * place for place in range(20)]
    result = AttributionData(0, 9, [f"b{place:02}" for place in range(20)], {"q": [*z[:-1], None]}, {"q": (0.1, 0.5)})
    (drawing,) = attribution([RunData("one", attribution=result)])
    assert "14 of 20 bins" in drawing.label
    assert ">b18<" in drawing.svg
    assert ">b04<" not in drawing.svg
