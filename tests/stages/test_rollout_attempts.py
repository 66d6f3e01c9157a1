"""Sampling again until a response is right: seeds, what is stored, and that interruptions do not show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eopd.stages.engines import kept
from eopd.stages.engines.sampling import derive_seed
from eopd.stages.job import ModelRef
from eopd.stages.judge.settings import JudgeSettings
from eopd.stages.models.tokenizers import response_text
from eopd.stages.rollout import run as stage
from eopd.stages.rollout.run import RolloutJob, run
from eopd.stages.train.job import Selection
from eopd.stages.train.responses import load_responses
from eopd.stages.train.settings import SelectSettings
from eopd.stages.verifiers.registry import PlainVerifier
from eopd.stages.verifiers.verdict import Verdict
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import NewerSchema
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
from tests.stages import sampled_oracle
from tests.stages.test_rollout import PARTS, Recorded, checksums, make_job, policy, rows_of
from tests.stages.tiny_tokenizer import tiny_tokenizer

__all__ = ["policy"]

MOST = 4
STOPS = (2, *range(40, 100))  # so that most responses end


def is_right(text: str) -> bool:
    """Stands for a verifier: about every other text is right."""
    return sum(text.encode()) % 2 == 0


@pytest.fixture(autouse=True)
def verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    made = PlainVerifier("even", lambda response, _: Verdict(is_right(response)), 1)
    monkeypatch.setattr(stage, "open_verifier", lambda name, **_: made)


def attempts_job(folder: Path, student: ModelRef, most: int = MOST, **changes: Any) -> RolloutJob:
    job = make_job(folder, student, rollout={"attempts": {"most": most}, **changes})
    output = Artifact(folder, Identity("rollouts", 1, len(PARTS), {"attempts": most}))
    return replace(job, output=output, judge=JudgeSettings(), stop_ids=STOPS)


def ends_right(row: dict[str, Any]) -> bool:
    return row["finish_reason"] == "stop" and is_right(
        response_text(tiny_tokenizer(), row["response_token_ids"], row["stop_token_id"])
    )


def rows(job: RolloutJob) -> list[dict[str, Any]]:
    return [row for part in range(len(PARTS)) for row in rows_of(job, part)]


def test_only_what_is_wrong_is_sampled_again(tmp_path: Path, policy: tuple[ModelRef, Any]) -> None:
    plain = replace(make_job(tmp_path / "plain", policy[0]), stop_ids=STOPS)
    run(plain)
    job = attempts_job(tmp_path / "attempts", policy[0])
    run(job)
    assert len(rows(job)) == len(rows(plain))
    for row, first in zip(rows(job), rows(plain), strict=True):
        assert (row["prompt_id"], row["sample"]) == (first["prompt_id"], first["sample"])
        assert row["written"] == [Writer.POLICY] * len(row["response_token_ids"])
        assert row["correct"] == ends_right(row)
        assert row["correct"] or row["attempts"] == MOST
        names: list[str | int] = [row["prompt_id"], row["sample"]]
        if row["attempts"] == 1:
            assert row["response_token_ids"] == first["response_token_ids"]
        else:
            assert not ends_right(first)
            names.append(row["attempts"] - 1)
        assert row["seed"] == derive_seed(7, *names)
        ids = row["response_token_ids"]
        full = sampled_oracle.tempered(policy[1], row["prompt_token_ids"], ids, 0.8)
        np.testing.assert_allclose(row["logprobs"], sampled_oracle.at(full, ids), atol=1e-4)
    assert {row["attempts"] for row in rows(job) if row["correct"]} >= {1, 2}
    assert not all(row["correct"] for row in rows(job))
    info = job.output.marker(0).info
    assert info["right"] == sum(row["correct"] for row in rows_of(job, 0))
    assert info["attempts"] == sum(row["attempts"] for row in rows_of(job, 0))
    assert info["tokens"] < info["tokens_sampled"]


def test_the_last_attempt_is_what_one_more_would_go_on_from(tmp_path: Path, policy: tuple[ModelRef, Any]) -> None:
    fewer, more = attempts_job(tmp_path / "fewer", policy[0], 2), attempts_job(tmp_path / "more", policy[0], 3)
    run(fewer)
    run(more)
    right = [(one, other) for one, other in zip(rows(fewer), rows(more), strict=True) if one["correct"]]
    assert right
    assert all(one == other for one, other in right)


def test_interrupted_attempts_are_the_same_bytes(tmp_path: Path, policy: tuple[ModelRef, Any]) -> None:
    whole, broken = (attempts_job(tmp_path / name, policy[0]) for name in ("whole", "broken"))
    run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(replace(broken, progress=Recorded(fail_at=20)))
    assert 0 < len(broken.output.committed()) < len(PARTS)
    run(broken)
    assert checksums(broken.output) == checksums(whole.output)


def test_training_selects_by_the_verdicts_that_rollouts_carry(tmp_path: Path, policy: tuple[ModelRef, Any]) -> None:
    job = attempts_job(tmp_path, policy[0])
    run(job)
    for verdict, correct in (("right", True), ("wrong", False)):
        selected = load_responses(job.output, None, Selection(SelectSettings(verdict=verdict)))
        expected = [f"{row['prompt_id']}/{row['sample']}" for row in rows(job) if row["correct"] is correct]
        assert list(selected.names) == expected
        assert f"{len(expected)} are {verdict}" in str(selected.selection)
    everything = load_responses(job.output, None, Selection(SelectSettings()))
    assert len(everything) == len(rows(job))


def test_an_answer_that_is_missing_ends_the_job_before_a_model_is_loaded(
    tmp_path: Path, policy: tuple[ModelRef, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = attempts_job(tmp_path, policy[0])
    columns = job.prompts.columns.model_copy(update={"answer": None})
    job = replace(job, prompts=job.prompts.model_copy(update={"columns": columns}))
    monkeypatch.setattr(kept, "open_sampling_engine", lambda *_, **__: pytest.fail("an engine was opened"))
    with pytest.raises(ValueError, match=r"'p3': there is no reference answer.*prompts\.columns\.answer"):
        run(job)


def test_verdicts_are_a_part_of_version_2_that_may_be_absent(tmp_path: Path) -> None:
    row = {field.name: None for field in SCHEMA} | {
        "prompt_id": "p",
        "prompt_index": 0,
        "sample": 0,
        "prompt_token_ids": [1],
        "response_token_ids": [5, 6],
        "finish_reason": "length",
        "seed": 1,
        "written": [0, 0],
    }
    asked = ["sample", "correct", "written"]
    write_rollouts(tmp_path, [row | {"correct": True, "attempts": 3}], judged=True)
    assert read_rollouts(tmp_path, asked).to_pylist() == [{"sample": 0, "correct": True, "written": [0, 0]}]
    with pytest.raises(NewerSchema, match="version 2"):
        read_record(tmp_path / FILE_NAME, SCHEMA)
    write_rollouts(tmp_path, [row], writers=True)
    assert read_rollouts(tmp_path, asked).to_pylist() == [{"sample": 0, "written": [0, 0]}]
    assert read_rollouts(tmp_path).schema.names == SCHEMA_OF_WRITERS.names
    write_rollouts(tmp_path, [row])
    assert read_rollouts(tmp_path, asked).to_pylist() == [{"sample": 0, "written": [0, 0]}]
