"""Responses that the student did not write, or not alone: the teacher's, those with a prefix of it, and data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eopd.stages.job import ModelRef
from eopd.stages.models.loading import load_model
from eopd.stages.models.teacher_prompts import TeacherPromptSettings
from eopd.stages.rollout.run import RolloutJob, run
from eopd.stages.rollout.segments import Prefixes, prefixes_of
from eopd.stages.rollout.settings import RolloutSettings
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import DamagedPart, InputError, NewerSchema
from eopd.storage.identity import Identity
from eopd.storage.records import (
    FILE_NAME,
    SCHEMA,
    SCHEMA_OF_WRITERS,
    Writer,
    read_record,
    read_rollouts,
    write_rollouts,
)
from tests.raises import raises
from tests.stages import sampled_oracle
from tests.stages.test_rollout import PARTS, STOPS, Recorded, checksums, make_job, policy, rows_of
from tests.stages.tiny_models import save_tiny
from tests.stages.tiny_tokenizer import save_tokenizer, tiny_tokenizer

__all__ = ["policy"]

TEMPLATE = TeacherPromptSettings(kind="template", suffix=" Think.")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    folder = tmp_path_factory.mktemp("teacher")
    save_tiny("llama", folder)
    save_tokenizer(folder)
    return ModelRef(str(folder), fingerprint="t" * 64)


def guide_job(folder: Path, student: ModelRef, teacher: ModelRef, **changes: Any) -> RolloutJob:
    job = make_job(folder, student, rollout={"source": "teacher"})
    fields = {"policy": teacher, "student": student, "teacher_prompt": TEMPLATE, **changes}
    return replace(job, output=Artifact(folder, Identity("rollouts", 1, len(PARTS), {"by": "teacher"})), **fields)


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory, policy: tuple[ModelRef, Any], teacher: ModelRef) -> RolloutJob:
    job = guide_job(tmp_path_factory.mktemp("guide"), policy[0], teacher)
    run(job)
    return job


def prefix_job(folder: Path, student: ModelRef, guide: RolloutJob, limit: int, **changes: Any) -> RolloutJob:
    uniform = changes.pop("uniform", False)
    job = make_job(folder, student, rollout={"source": "prefix", **changes})
    prefixes = Prefixes(start=limit, end=0, first=0, step=0, total=2, uniform=uniform)
    return replace(job, guide=guide.output, prefixes=prefixes)


# -- schedule


def test_the_limit_falls_by_half_a_cosine_to_nothing() -> None:
    settings = RolloutSettings(source="prefix", max_new_tokens=100)
    result = [prefixes_of(settings, 5, round_, 8) for round_ in range(5)]
    assert [None if one is None else one.limit(0) for one in result] == [100, 85, 50, 14, None]
    assert result[1] is not None
    assert result[1].identity() == {"limit": 85, "length": "cap"}


def test_by_response_one_round_has_every_limit() -> None:
    settings = RolloutSettings(source="prefix", max_new_tokens=10, prefix={"over": "responses", "end": 2})
    (only,) = [prefixes_of(settings, 1, 0, 9)]
    assert only is not None
    assert [only.limit(rank) for rank in range(9)] == [10, 9, 8, 7, 6, 4, 3, 2, 2]
    first, second = (prefixes_of(settings, 2, round_, 9) for round_ in (0, 1))
    assert first is not None
    assert second is not None
    assert first.limit(0) == 10
    assert second.limit(8) == 2
    assert first.identity() != second.identity()


def test_uniform_lengths_have_every_value_and_depend_on_the_sample_alone() -> None:
    prefixes = Prefixes(start=4, end=0, first=0, step=0, total=2, uniform=True)
    lengths = [prefixes.length(rank, 7, "p", sample) for sample in range(200) for rank in (0, 5)]
    assert set(lengths) == set(range(5))
    assert lengths[::2] == lengths[1::2]


# -- the teacher's responses


def test_the_teacher_writes_under_its_own_prompt(guide: RolloutJob) -> None:
    rows = [row for part in range(len(PARTS)) for row in rows_of(guide, part)]
    tokenizer = tiny_tokenizer()
    for row in rows:
        assert row["written"] == [Writer.TEACHER] * len(row["response_token_ids"])
        assert row["logprobs"] is None
        assert tokenizer.decode(row["prompt_token_ids"]).endswith("assistant: ")
        assert "Think." not in tokenizer.decode(row["prompt_token_ids"])
    with pytest.raises(NewerSchema, match="version 2"):  # a reader of version 1 refuses them
        read_record(guide.output.part_folder(0) / FILE_NAME, SCHEMA)


def test_greedy_the_teacher_s_response_is_its_own_most_probable_one(
    tmp_path: Path, policy: tuple[ModelRef, Any], teacher: ModelRef
) -> None:
    job = guide_job(tmp_path, policy[0], teacher)
    job = replace(job, settings=job.settings.model_copy(update={"top_k": 1, "samples_per_prompt": 1}))
    run(job)
    model, tokenizer = load_model(teacher), tiny_tokenizer()
    for row in rows_of(job, 0):
        text = f"<turn>user: {json.loads(row['messages'])[0]['content']} Think.</turn><turn>assistant: "
        context = tokenizer(text)["input_ids"]
        full = sampled_oracle.tempered(model, context, row["response_token_ids"], 1.0)
        assert np.argmax(full, axis=1).tolist() == row["response_token_ids"]


def test_a_teacher_of_another_vocabulary_is_refused(
    tmp_path: Path, policy: tuple[ModelRef, Any], teacher: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eopd.stages.rollout.run.vocabulary_size", lambda folder: 1)
    with raises(InputError, "vocabulary of 1", setting="rollout.source", part=0, remedy="the student's tokenizer"):
        run(guide_job(tmp_path, policy[0], teacher))


# -- prefixes


@pytest.mark.parametrize("limit", [1, 5, 11])
def test_a_response_begins_with_the_teacher_s_first_tokens(
    tmp_path: Path, policy: tuple[ModelRef, Any], guide: RolloutJob, limit: int
) -> None:
    job = prefix_job(tmp_path, policy[0], guide, limit)
    run(job)
    continued = 0
    for part in range(len(PARTS)):
        for own, theirs in zip(rows_of(job, part), rows_of(guide, part), strict=True):
            ids, count = own["response_token_ids"], own["written"].count(Writer.TEACHER)
            assert own["written"] == sorted(own["written"], reverse=True)
            assert ids[:count] == theirs["response_token_ids"][:count]
            assert count == min(limit, len(theirs["response_token_ids"]))
            assert len(ids) <= 12
            assert np.isnan(own["logprobs"][:count]).all()
            if count == len(ids):
                assert own["stop_token_id"] == theirs["stop_token_id"]
                continue
            continued += 1
            full = sampled_oracle.tempered(policy[1], own["prompt_token_ids"], ids, 0.8)
            np.testing.assert_allclose(own["logprobs"][count:], sampled_oracle.at(full, ids)[count:], atol=1e-4)
            assert (own["finish_reason"] == "stop") == (ids[-1] in STOPS)
    assert continued
    info = job.output.marker(0).info
    assert info["teacher_tokens"] == sum(row["written"].count(Writer.TEACHER) for row in rows_of(job, 0))
    assert job.output.marker(0).inputs["guide"] == guide.output.marker(0).checksum


def test_a_guide_longer_than_a_response_is_the_whole_response(
    tmp_path: Path, policy: tuple[ModelRef, Any], guide: RolloutJob
) -> None:
    job = prefix_job(tmp_path, policy[0], guide, 100, max_new_tokens=4)
    run(job)
    for own, theirs in zip(rows_of(job, 0), rows_of(guide, 0), strict=True):
        ids = theirs["response_token_ids"]
        assert own["response_token_ids"] == ids[:4]
        whole = len(ids) <= 4 and theirs["finish_reason"] == "stop"
        assert own["finish_reason"] == ("stop" if whole else "length")


def test_more_samples_than_guides_take_them_in_turn(
    tmp_path: Path, policy: tuple[ModelRef, Any], teacher: ModelRef
) -> None:
    few = guide_job(tmp_path / "guide", policy[0], teacher)
    few = replace(few, settings=few.settings.model_copy(update={"samples_per_prompt": 2}))
    run(few)
    job = prefix_job(tmp_path / "own", policy[0], few, 3)
    run(job)
    begun = [row["response_token_ids"] for row in rows_of(job, 0)[:3]]
    theirs = [row["response_token_ids"] for row in rows_of(few, 0)[:2]]
    assert [ids[:1] for ids in begun] == [theirs[number][:1] for number in (0, 1, 0)]


def test_interrupted_prefix_rollouts_are_the_same_bytes(
    tmp_path: Path, policy: tuple[ModelRef, Any], guide: RolloutJob
) -> None:
    whole = prefix_job(tmp_path / "whole", policy[0], guide, 5, uniform=True)
    run(whole)
    broken = prefix_job(tmp_path / "broken", policy[0], guide, 5, uniform=True)
    with pytest.raises(KeyboardInterrupt):
        run(replace(broken, progress=Recorded(fail_at=9)))
    assert 0 < len(broken.output.committed()) < len(PARTS)
    run(broken)
    assert checksums(broken.output) == checksums(whole.output)


def test_a_prompt_without_a_guide_is_named(
    tmp_path: Path, policy: tuple[ModelRef, Any], guide: RolloutJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eopd.stages.rollout.run.read_rollouts", lambda *_: read_rollouts(*_)[3:])
    with raises(InputError, prompt=rows_of(guide, 0)[0]["prompt_id"], artifact=str(guide.output), part=0):
        run(prefix_job(tmp_path, policy[0], guide, 5))


# -- data


def data_job(folder: Path, student: ModelRef, rows: list[dict[str, Any]], **changes: Any) -> RolloutJob:
    prompts = {"columns": {"response": "response", **changes.pop("columns", {})}, **changes.pop("prompts", {})}
    job = make_job(folder, student, rollout={"source": "data", "samples_per_prompt": 1, **changes}, **prompts)
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = Artifact(folder, Identity("rollouts", 1, 1))
    return replace(job, output=output, parts=range(1), prompt_indices=[list(range(len(rows)))], stop_ids=(4, 2))


def test_text_ids_and_messages_are_the_responses_that_they_say(tmp_path: Path, policy: tuple[ModelRef, Any]) -> None:
    tokenizer = tiny_tokenizer()
    rows = [
        {"prompt": "What is it?", "response": "It is four."},
        {"prompt": "And?", "response": [5, 6, 7]},
        {"prompt": "And so?", "response": [5, 6, 2]},
        {"prompt": "Well?", "response": {"role": "assistant", "content": "It is five."}},
    ]
    job = data_job(tmp_path, policy[0], rows, prompts={"too_long": "refuse"}, max_new_tokens=64)
    run(job)
    result = rows_of(job, 0)
    text, ids, ended, message = (row["response_token_ids"] for row in result)
    assert text == [*tokenizer("It is four.")["input_ids"], 4]
    assert (ids, ended) == ([5, 6, 7], [5, 6, 2])
    assert message == [*tokenizer("It is five.")["input_ids"], 4]
    assert [row["finish_reason"] for row in result] == ["stop", "length", "stop", "stop"]
    assert [row["stop_token_id"] for row in result] == [4, None, 2, 4]
    assert all(row["written"] == [Writer.DATA] * len(row["response_token_ids"]) for row in result)
    assert all(row["logprobs"] is None for row in result)
    assert tokenizer.decode(result[0]["prompt_token_ids"]).endswith("<turn>assistant: ")


def test_the_last_message_of_a_conversation_is_its_response(tmp_path: Path, policy: tuple[ModelRef, Any]) -> None:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Four."}]
    rows = [{"messages": turns}, {"messages": [*turns, turns[0], {"role": "assistant", "content": "Five."}]}]
    job = data_job(
        tmp_path, policy[0], rows, columns={"prompt": "messages", "response": "messages", "id": None, "answer": None}
    )
    run(job)
    tokenizer = tiny_tokenizer()
    decoded = [
        (tokenizer.decode(row["prompt_token_ids"]), tokenizer.decode(row["response_token_ids"]))
        for row in rows_of(job, 0)
    ]
    first = "<turn>user: What?</turn><turn>assistant: "
    assert decoded == [(first, "Four.</turn>"), (f"{first}Four.</turn>{first}", "Five.</turn>")]


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
def test_other_files_of_responses_are_read_alike(tmp_path: Path, policy: tuple[ModelRef, Any], kind: str) -> None:
    rows = [{"prompt": "What is it?", "response": [5, 6, 2]}, {"prompt": "And?", "response": [7, 2]}]
    job = data_job(tmp_path / "lines", policy[0], rows)
    run(job)
    path = tmp_path / ("file.parquet" if kind == "parquet" else "file")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        from datasets import Dataset

        Dataset.from_list(rows).save_to_disk(path)
    other = data_job(tmp_path / "other", policy[0], rows)
    run(replace(other, prompts=other.prompts.model_copy(update={"path": str(path)})))
    assert read_rollouts(other.output.part_folder(0)).equals(read_rollouts(job.output.part_folder(0)))


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("", "must hold a response"),
        (None, "must hold a response"),
        ([], "must hold a response"),
        ([5, "6"], "must hold a response"),
        ([5, 100_000], "id 100000"),
        ([5, -1], "id -1"),
        ([5, 2, 6], "stop id 2 as token 1 of 3"),
        ("It is </turn> four.", "stop id 4"),
        ({"role": "user", "content": "x"}, "must hold a response"),
        ([5] * 13, "13 tokens"),
    ],
)
def test_a_response_that_cannot_be_trained_on_is_refused_by_prompt(
    tmp_path: Path, policy: tuple[ModelRef, Any], response: Any, message: str
) -> None:
    rows = [{"prompt": "What is it?", "response": [5, 2]}, {"prompt": "And?", "response": response}]
    job = data_job(tmp_path, policy[0], rows, prompts={"too_long": "refuse"})
    with raises(InputError, message, file=job.prompts.path) as caught:
        run(job)
    assert (caught.value.line, caught.value.prompt) in ((2, None), (None, "1"))
    assert not job.output.committed()


def test_responses_that_are_too_long_are_skipped_and_counted(tmp_path: Path, policy: tuple[ModelRef, Any]) -> None:
    rows = [{"prompt": "What is it?", "response": [5, 2]}, {"prompt": "And?", "response": [5] * 13}]
    job = data_job(tmp_path, policy[0], rows)
    run(job)
    assert len(rows_of(job, 0)) == 1
    assert isinstance(job.progress, Recorded)
    assert any("skipped 1 responses" in line and "13" in line for line in job.progress.lines)


# -- the record


def test_who_wrote_a_token_is_known_of_old_records_and_checked_in_new_ones(tmp_path: Path) -> None:
    row = {field.name: None for field in SCHEMA} | {
        "prompt_id": "p",
        "prompt_index": 0,
        "sample": 0,
        "prompt_token_ids": [1],
        "response_token_ids": [5, 6],
        "finish_reason": "length",
        "seed": 1,
    }
    write_rollouts(tmp_path, [row, {**row, "response_token_ids": []}])
    assert read_rollouts(tmp_path, ["written"]).column("written").to_pylist() == [[0, 0], []]
    for written, message in (([1], "other lengths"), ([1, 9], "unknown writer 9")):
        pq.write_table(
            pa.Table.from_pylist([{**row, "written": written}], schema=SCHEMA_OF_WRITERS), tmp_path / "rollouts.parquet"
        )
        with pytest.raises(DamagedPart, match=message):
            read_rollouts(tmp_path)
        assert read_rollouts(tmp_path, ["sample"]).to_pylist() == [{"sample": 0}]
