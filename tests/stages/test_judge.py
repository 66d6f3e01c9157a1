"""The judge stage: verdicts on hand-made responses, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from eopd.stages.job import ModelRef
from eopd.stages.judge import run as stage
from eopd.stages.judge.run import JudgeJob, run
from eopd.stages.judge.settings import JudgeSettings
from eopd.stages.verifiers.registry import TRUNCATED
from eopd.storage.artifacts import Artifact
from eopd.storage.identity import Identity
from eopd.storage.verdict_signal import VERDICTS
from tests.stages.score_case import Lines, response_row, rollouts

STUDENT = Path(__file__).parents[2] / "examples" / "countdown" / "student"
TOKENIZER = AutoTokenizer.from_pretrained(STUDENT)
STOP = int(TOKENIZER.eos_token_id)


def response(number: int, text: str, answer: str | None = "2,3,4=9", *, stops: bool = True, **changes: Any) -> Any:
    ids = [*TOKENIZER(text, add_special_tokens=False)["input_ids"], *([STOP] if stops else [])]
    ending = {"finish_reason": "stop" if stops else "length", "stop_token_id": STOP if stops else None}
    return response_row(number, ids, answer=answer, verifier="countdown", **ending, **changes)


RIGHT, WRONG = "2+3=5,5+4=9", "2+3=5,5*4=20"
PARTS = (
    [response(0, RIGHT), response(0, WRONG, sample=1), response(0, RIGHT, sample=2, stops=False)],
    [],
    [response(1, "3+2=5,4+5=9"), response(2, RIGHT, "2,3,4=10")],
)


def judge_job(folder: Path, parts: Sequence[Sequence[Any]] = PARTS, verifier: str = "countdown") -> JudgeJob:
    source = rollouts(folder / "store", parts)
    return JudgeJob(
        output=Artifact(folder / "store", Identity("verdicts", 1, len(parts))),
        parts=range(len(parts)),
        rollouts=source,
        settings=JudgeSettings(),
        verifier=verifier,
        student=ModelRef(str(STUDENT)),
        progress=Lines(),
    )


def verdicts_of(job: JudgeJob, part: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = VERDICTS.read(job.output.part_folder(part)).to_pylist()
    return rows


def test_every_response_is_judged(tmp_path: Path) -> None:
    job = judge_job(tmp_path)
    run(job)
    first, last = verdicts_of(job, 0), verdicts_of(job, 2)
    assert [(row["prompt_id"], row["sample"], row["correct"]) for row in first] == [
        ("p0", 0, True),
        ("p0", 1, False),
        ("p0", 2, False),
    ]
    assert [row["correct"] for row in last] == [True, False]
    assert first[0]["form"] is not None
    assert first[1]["reason"]
    assert first[2]["reason"] == TRUNCATED
    assert verdicts_of(job, 1) == []
    marker = job.output.marker(0)
    assert (marker.info["responses"], marker.info["right"]) == (3, 1)
    assert marker.inputs["rollouts"] == job.rollouts.marker(0).checksum
    assert "2 of 5 responses are right" in job.progress.lines[-1]  # type: ignore[attr-defined]


def test_the_stop_token_is_not_part_of_the_text(tmp_path: Path) -> None:
    job = judge_job(tmp_path, [[response(0, RIGHT, RIGHT)]], verifier="exact")
    run(job)
    assert verdicts_of(job, 0)[0]["correct"]


def test_a_killed_job_goes_on_with_the_parts_that_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, written = judge_job(tmp_path), VERDICTS.write

    def killed(folder: Path, rows: Sequence[Any]) -> None:
        written(folder, rows)
        if job.output.committed():
            raise KeyboardInterrupt

    monkeypatch.setattr(stage, "VERDICTS", SimpleNamespace(write=killed))
    with pytest.raises(KeyboardInterrupt):
        run(job)
    assert job.output.committed() == {0}
    before = job.output.marker(0).checksum
    monkeypatch.undo()
    run(job)
    assert job.output.is_complete()
    assert job.output.marker(0).checksum == before
    whole = replace(judge_job(tmp_path / "whole"), progress=Lines())
    run(whole)
    assert [verdicts_of(job, part) for part in range(3)] == [verdicts_of(whole, part) for part in range(3)]


def test_parts_of_rollouts_that_were_set_aside_are_passed_on(tmp_path: Path) -> None:
    job = judge_job(tmp_path)
    source = Artifact(tmp_path / "other", Identity("rollouts", 1, 1))
    source.set_aside(0, "the sampler died")
    job = replace(job, rollouts=source, parts=[0], output=Artifact(tmp_path / "other", Identity("verdicts", 1, 1)))
    run(job)
    assert "the sampler died" in (job.output.marker(0).set_aside or "")


@pytest.mark.parametrize("answer", [None, "no numbers"])
def test_an_answer_that_cannot_be_judged_by_names_its_prompt(tmp_path: Path, answer: str | None) -> None:
    job = judge_job(tmp_path, [[response(0, RIGHT), response(7, RIGHT, answer)]])
    with pytest.raises(ValueError, match="prompt 'p7'"):
        run(job)
    assert not job.output.committed()
