"""The alignment job on the Countdown pair: parts, resume, two sources, and errors before any model is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from eopd.stages.align.divergence import SUMMED, compare, known_ids, measure_alignment
from eopd.stages.align.run import AlignmentJob, ResponseReader, run, summarise
from eopd.stages.align.settings import AlignmentSettings
from eopd.stages.engines.hidden import refuse_uniform
from eopd.stages.engines.kept import Engines
from eopd.stages.evaluate import run as evaluating
from eopd.stages.evaluate.run import EvaluateJob
from eopd.stages.job import ModelRef
from eopd.stages.models.lm_head import LMHead
from eopd.stages.models.loading import load_model, load_tokenizer
from eopd.stages.models.packing import Sequence
from eopd.stages.models.prompts import PromptSettings, PromptTable, load_prompts
from eopd.stages.models.teacher_prompts import Context, TeacherPromptSettings
from eopd.stages.stage import SummaryJob
from eopd.storage import records as analyses
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import InputError
from eopd.storage.identity import Identity
from tests.bounds import forward_rounding
from tests.raises import raises
from tests.stages.test_evaluate import COUNTDOWN, STOPS, STUDENT, Lines, job_for, samples_of, settings_for

TEACHER = ModelRef(path=str(COUNTDOWN / "teacher"), dtype="float32", fingerprint="teacher")
ALIGNMENT = {"samples": 2, "batch_tokens": 100}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluateJob:
    job = job_for(tmp_path_factory.mktemp("align"), settings_for(alignment=ALIGNMENT))
    evaluating.run(job)
    return job


@pytest.fixture(scope="module")
def evaluated_first(tmp_path_factory: pytest.TempPathFactory) -> EvaluateJob:
    """Other samples for the same problems."""
    job = replace(job_for(tmp_path_factory.mktemp("first"), settings_for(alignment=ALIGNMENT)), seed=8)
    evaluating.run(job)
    return job


def align(evaluated: EvaluateJob, store: Path, sources: tuple[str, ...] = ("own",), **alignment: Any) -> AlignmentJob:
    settings = settings_for(alignment={**ALIGNMENT, "responses": sources, **alignment})
    count = len(sources) * evaluated.output.parts
    asked = settings.alignment.semantic() if settings.alignment else {}
    output = Artifact(store, Identity("alignments", 1, count, asked, {"teacher": "teacher", "student": "student"}))
    return AlignmentJob(
        output,
        range(count),
        settings,
        Lines(),
        store / "logs",
        tuple((whose, evaluated.output) for whose in sources),
        STUDENT,
        TEACHER,
        TeacherPromptSettings(),
        STOPS,
    )


def summary_of(job: AlignmentJob) -> SummaryJob:
    """The job that sums up what ``job`` measures."""
    identity = Identity("alignment_summaries", 1, 1, inputs={"alignments": job.output.key})
    return SummaryJob(Artifact(job.output.folder.parents[1], identity), job.output, job.settings, Lines())


def run_and_summarise(job: AlignmentJob) -> None:
    run(job)
    summarise(summary_of(job))


def results_of(job: AlignmentJob) -> dict[str, Any]:
    path = summary_of(job).output.part_folder(0) / analyses.ALIGNMENT_RESULTS
    values: dict[str, Any] = json.loads(path.read_text())
    return values


@pytest.fixture(scope="module")
def aligned(evaluated: EvaluateJob, tmp_path_factory: pytest.TempPathFactory) -> AlignmentJob:
    job = align(evaluated, tmp_path_factory.mktemp("aligned"))
    run_and_summarise(job)
    return job


def test_the_summary_is_what_the_two_models_say_of_the_samples(evaluated: EvaluateJob, aligned: AlignmentJob) -> None:
    """Through storage, parts and engines: the same as both models in memory on the same token ids."""
    tokenizer = load_tokenizer(STUDENT)
    problems = {}
    for line in (COUNTDOWN / "evaluate.jsonl").read_text().splitlines()[:12]:
        row = json.loads(line)
        problems[row["id"]] = tokenizer(row["problem"])["input_ids"]
    rows = [row for row in samples_of(evaluated) if row["sample"] < 2]
    sequences = [Sequence(problems[row["problem_id"]], row["response_token_ids"]) for row in rows]
    expected = measure_alignment(
        load_model(TEACHER), load_model(STUDENT), sequences, problems=[row["problem_id"] for row in rows], merged=STOPS
    )
    results = results_of(aligned)["responses"]["own"]
    assert results["all"]["tokens"] == sum(len(row["response_token_ids"]) for row in rows)
    assert results["problems"] == 12
    assert results["responses"] == 24
    assert results["edges"] == list(expected.edges)
    ids = torch.tensor([sequences[0].context_ids])
    largest = max(load_model(ref)(ids).logits.abs().max().item() for ref in (TEACHER, STUDENT))
    error = 2 * forward_rounding(largest)  # of both; they are packed in batches of other sizes
    for mine, theirs in zip(
        (results["all"], results["above"], results["below"], *results["bins"]),
        (expected.all, expected.above, expected.below, *expected.bins),
        strict=True,
    ):
        assert mine["tokens"] == theirs.tokens
        for name in ("fkl", "rkl", "agreement", "student_entropy", "student_above"):
            assert mine[name] == pytest.approx(getattr(theirs, name), abs=error), name
    assert results["above"]["tokens"] > 5
    assert results["all"]["fkl"] > 0.01


def test_the_record_says_what_it_was_made_from(evaluated: EvaluateJob, aligned: AlignmentJob) -> None:
    results = results_of(aligned)
    assert results["settings"]["samples"] == 2
    assert (results["teacher"]["fingerprint"], results["student"]["fingerprint"]) == ("teacher", "student")
    assert results["engines"][0].startswith("transformers")
    assert aligned.output.marker(1).inputs == {"samples": evaluated.output.marker(1).checksum}
    table = analyses.ALIGNMENT_SUMS.read(aligned.output.part_folder(0))
    assert set(SUMMED) < set(table.column_names)
    assert min(table.column("tokens").to_pylist()) >= 1


def test_parts_can_be_done_apart_and_add_up_to_the_same_bytes(
    evaluated: EvaluateJob, aligned: AlignmentJob, tmp_path: Path
) -> None:
    job = align(evaluated, tmp_path)
    run(replace(job, parts=[2]))
    assert job.output.committed() == {2}
    run(replace(job, parts=[0, 1]))
    assert job.output.is_complete()
    run(replace(job, student=replace(STUDENT, path="/nowhere")))  # nothing to do, nothing is loaded
    summary = summary_of(job)
    summarise(summary)
    assert isinstance(summary.progress, Lines)
    assert "nats a token" in summary.progress.seen[-1]
    assert results_of(job)["responses"] == results_of(aligned)["responses"]


def test_fewer_problems_and_a_fixed_set_beside_its_own(
    evaluated: EvaluateJob, evaluated_first: EvaluateJob, tmp_path: Path
) -> None:
    """Each under its own name: what reading either evaluation alone gives."""
    job = align(evaluated, tmp_path / "both", ("own", "first"), samples=1, limit=7)
    run_and_summarise(replace(job, sources=(job.sources[0], ("first", evaluated_first.output))))
    results = results_of(job)["responses"]
    assert results["own"]["problems"] == results["own"]["responses"] == 7
    for name, source in (("own", evaluated), ("first", evaluated_first)):
        alone = align(source, tmp_path / name, samples=1, limit=7)
        run_and_summarise(alone)
        assert results[name] == results_of(alone)["responses"]["own"]
    assert results["own"]["all"]["fkl"] != results["first"]["all"]["fkl"]


def test_the_teacher_reads_its_own_template(evaluated: EvaluateJob, aligned: AlignmentJob, tmp_path: Path) -> None:
    job = replace(
        align(evaluated, tmp_path, samples=1), teacher_prompt=TeacherPromptSettings(kind="template", suffix=" ")
    )
    with raises(InputError, setting="score.teacher_prompt"):
        run(replace(job, teacher=replace(TEACHER, tokenizer=str(COUNTDOWN / "student"))))
    run_and_summarise(job)
    assert results_of(job)["responses"]["own"]["all"]["fkl"] != results_of(aligned)["responses"]["own"]["all"]["fkl"]


def test_responses_longer_than_a_model_reads_are_cut_and_counted(
    evaluated: EvaluateJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eopd.stages.align.run.longest_readable", lambda folder: 16)
    job = align(evaluated, tmp_path)
    run_and_summarise(job)
    results = results_of(job)["responses"]["own"]
    rows = [row for row in samples_of(evaluated) if row["sample"] < 2]
    kept = [min(len(row["response_token_ids"]), 17 - row["prompt_tokens"]) for row in rows]
    assert results["cut"] == sum(len(row["response_token_ids"]) > n for row, n in zip(rows, kept, strict=True)) > 0
    assert results["all"]["tokens"] == sum(kept)


def test_a_source_of_which_every_part_was_set_aside_is_named(evaluated: EvaluateJob, tmp_path: Path) -> None:
    job = align(evaluated, tmp_path, ("own", "first"))
    broken = Artifact(tmp_path, Identity("evaluations", 1, evaluated.output.parts, {"name": "broken"}))
    for part in range(broken.parts):
        broken.set_aside(part, "failed 3 times: out of luck")
    with raises(InputError, "out of luck", setting="evaluate.alignment.responses", remedy="verify --repair"):
        run_and_summarise(replace(job, sources=(*job.sources[:1], ("first", broken))))


def test_a_model_that_reads_other_than_its_checkpoint_is_refused(
    evaluated: EvaluateJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(Lines, "line", lambda _, text: lines.append(text))
    run(align(evaluated, tmp_path / "checked"))
    assert [line.split(" is checked against")[0] for line in lines if "checked against" in line] == [
        "align: the teacher",
        "align: the student",
    ]
    honest = LMHead.logits
    monkeypatch.setattr(LMHead, "logits", lambda self, hidden: 3.0 * honest(self, hidden))
    job = align(evaluated, tmp_path / "scaled")
    with raises(
        InputError, "disagrees with .* own logits", setting="evaluate.alignment.teacher_engine", remedy="other"
    ):
        run(job)
    assert not job.output.committed()


@pytest.mark.parametrize("merged", [(), (3,), (1, 4, 9), (1, 4, 900)])
def test_a_teacher_to_which_all_tokens_are_equal_is_refused(merged: tuple[int, ...]) -> None:
    head = LMHead(torch.zeros(64, 8), None, 1.0, None, 64)
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    figures = compare((hidden, head), (hidden, head), merged=merged)
    known = len(known_ids(merged, 64))
    with raises(
        InputError, r"all 5 tokens .* ln 64 = 4\.1589", setting="here", file="folder", remedy="set here to another"
    ):
        refuse_uniform(figures.teacher_entropy, 64, "folder", "here", merged=known)
    refuse_uniform(figures.teacher_entropy - 1e-3, 64, "folder", "here", merged=known)


def test_a_problem_that_is_no_longer_what_it_was_is_named(
    evaluated: EvaluateJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def renamed(settings: PromptSettings) -> PromptTable:
        return PromptTable([replace(prompt, id=f"new {prompt.id}") for prompt in load_prompts(settings)], settings.path)

    first = samples_of(evaluated)[0]["problem_id"]
    fields = {"prompt": first, "file": evaluated.settings.benchmarks[0].path}
    monkeypatch.setattr("eopd.stages.align.run.teacher_context", lambda *_: Context(((),)))
    with raises(InputError, f"{first}.* no tokens", **fields):
        run(align(evaluated, tmp_path / "empty"))
    monkeypatch.setattr("eopd.stages.problems.load_prompts", renamed)
    with raises(InputError, f"new {first}", setting="evaluate.benchmarks", remedy="plan the run again", **fields):
        run(align(evaluated, tmp_path / "renamed"))


def test_a_teacher_prompt_column_that_is_not_there_is_named(evaluated: EvaluateJob, tmp_path: Path) -> None:
    job = replace(align(evaluated, tmp_path), teacher_prompt=TeacherPromptSettings(kind="column"))
    with raises(InputError, "columns.teacher_prompt", setting="evaluate.benchmarks"):
        run(job)
    assert not job.output.committed()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU could be read on")
@pytest.mark.parametrize("whose", ["engine_options", "teacher_engine_options"])
def test_kept_engines_make_room_on_a_gpu(evaluated: EvaluateJob, tmp_path: Path, whose: str) -> None:
    engines = Engines(keep=True)
    with engines.sampling("transformers", STUDENT, max_model_len=16, log_dir=tmp_path, progress=Lines()):
        pass
    job = replace(align(evaluated, tmp_path, **{whose: {"device": "cuda"}}), engines=engines)
    with pytest.raises((RuntimeError, AssertionError)):  # this machine has none
        run(job)
    assert not engines.any_open
    with engines.sampling("transformers", STUDENT, max_model_len=16, log_dir=tmp_path, progress=Lines()):
        pass
    run(replace(align(evaluated, tmp_path), engines=engines))
    assert engines.any_open
    engines.close()


@pytest.mark.vllm
def test_a_teacher_on_vllm_says_the_same(evaluated: EvaluateJob, aligned: AlignmentJob, tmp_path: Path) -> None:
    job = align(evaluated, tmp_path, teacher_engine="vllm")
    run_and_summarise(job)
    assert any(engine.startswith("vllm") for engine in results_of(job)["engines"])
    result, expected = (results_of(one)["responses"]["own"]["all"] for one in (job, aligned))
    for name in ("fkl", "rkl", "teacher_entropy"):
        assert result[name] == pytest.approx(expected[name], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tau": 0.0}, "greater than 0"),
        ({"bins": [0.4, 0.2]}, "increasing"),
        ({"bins": [0.0, 0.2]}, r"bins\.0\n.*greater than 0"),
        ({"responses": []}, "at least 1"),
        ({"responses": ["own", "own"]}, "twice"),
        ({"engine_options": {"dtype": "bfloat16"}}, r"set student\.dtype or teacher\.dtype"),
    ],
)
def test_settings_refuse_what_makes_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AlignmentSettings(**changes)


def test_more_samples_than_there_are_is_refused_and_evaluations_keep_their_keys() -> None:
    with pytest.raises(ValidationError, match=r"alignment\.samples is 5, but evaluate.samples only 4"):
        settings_for(alignment={"samples": 5})
    assert settings_for(alignment=ALIGNMENT).semantic() == settings_for().semantic()
    moved = AlignmentSettings(teacher_engine="vllm", batch_tokens=7)
    assert moved.semantic() == AlignmentSettings().semantic()


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_teacher_sees_answers_and_copies_of_the_samples(
    evaluated: EvaluateJob, tmp_path: Path, shuffled: bool
) -> None:
    tokenizer = load_tokenizer(STUDENT)
    prompt = TeacherPromptSettings(opening="{{response}}{{answer}}", shuffled=shuffled)
    job = replace(align(evaluated, tmp_path), teacher_prompt=prompt)
    records = ResponseReader(job, tokenizer, tokenizer, (None, 40)).read(evaluated.output, 0)
    answers = {}
    for line in (COUNTDOWN / "evaluate.jsonl").read_text().splitlines()[:12]:
        problem = json.loads(line)
        answers[problem["id"]] = problem["answer"]
    for (_, name, _), own, theirs in zip(records.names, records.student, records.teacher, strict=True):
        copied = list(own.response_ids)
        copied = copied[:-1] if copied and copied[-1] in STOPS else copied
        start = [*own.context_ids, *copied]
        assert theirs.response_ids == own.response_ids
        assert theirs.context_ids[: len(start)] == start
        shown = tokenizer.decode(theirs.context_ids[len(start) :])
        assert shown in answers.values()
        assert (shown == answers[name]) is not shuffled
        assert theirs.input_length <= 40
    assert records.cut > 0
