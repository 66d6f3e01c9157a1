"""A small rollouts artifact and a score job on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eopd.stages.job import ModelRef, NullProgress
from eopd.stages.score.responses import ScoreJob
from eopd.stages.score.settings import ScoreSettings
from eopd.storage.artifacts import Artifact
from eopd.storage.identity import Identity
from eopd.storage.records import write_rollouts

STOPS = (2, 9)


class Lines(NullProgress):
    """Keeps the lines that a person would see."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def response_row(
    number: int, response: Sequence[int], prompt: Sequence[int] = (5, 6, 7), **changes: Any
) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"question {number}"}]
    row = {
        "prompt_id": f"p{number}",
        "prompt_index": number,
        "sample": 0,
        "messages": json.dumps(messages),
        "answer": None,
        "verifier": None,
        "teacher_prompt": f"hint {number}",
        "prompt_token_ids": list(prompt),
        "response_token_ids": list(response),
        "response_text": None,
        "logprobs": None,
        "truncated_logprobs": None,
        "finish_reason": "stop" if len(response) and response[-1] in STOPS else "length",
        "stop_token_id": None,
        "seed": 1000 + number,
    }
    return row | changes


def random_responses(count: int, seed: int = 0, most: int = 30) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    return [
        response_row(number, generator.integers(3, 300, generator.integers(1, most)).tolist())
        for number in range(count)
    ]


def rollouts(store: Path, parts: Sequence[Sequence[dict[str, Any]]], name: str = "r") -> Artifact:
    artifact = Artifact(store, Identity("rollouts", 1, len(parts), settings={"name": name}))
    for number, rows in enumerate(parts):
        with artifact.write_part(number) as folder:
            write_rollouts(folder, list(rows))
    return artifact


def score_job(store: Path, teacher: Path, source: Artifact, name: str = "s", **changes: Any) -> ScoreJob:
    """Every part of ``source``; ``changes`` are settings, unless they name a field of the job."""
    fields = {field: changes.pop(field) for field in list(changes) if field in ScoreJob.__dataclass_fields__}
    settings = ScoreSettings.model_validate({"engine": "transformers", **changes})
    job = ScoreJob(
        output=Artifact(store, Identity("scores", 1, source.parts, {"name": name}, coverage=settings.coverage())),
        parts=range(source.parts),
        settings=settings,
        progress=Lines(),
        log_dir=store / "logs",
        rollouts=source,
        teacher=ModelRef(str(teacher), fingerprint="f"),
        student_tokenizer=str(teacher),
        stop_ids=STOPS,
        rollout_temperature=1.0,
    )
    return replace(job, **fields)
