"""The judge stage: the prompts' verifier judges every response of stored rollouts.

A response that was cut at the length limit counts as wrong whatever its text, since it is unfinished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from eopd.stages.job import ModelRef, Progress
from eopd.stages.judge.settings import JudgeSettings
from eopd.stages.verifiers.registry import Answered, Verifier, check_answers, judge_responses, open_verifier
from eopd.stages.verifiers.verdict import Verdict
from eopd.storage.artifacts import Artifact
from eopd.storage.claims import claimed_parts
from eopd.storage.records import read_rollouts
from eopd.storage.sources import passes_on
from eopd.storage.verdict_signal import VERDICTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("prompt_id", "sample", "answer", "response_token_ids", "finish_reason", "stop_token_id")


@dataclass(frozen=True)
class JudgeJob:
    """Inputs of the judge stage: part i of ``output`` comes from part i of ``rollouts``."""

    output: Artifact
    parts: Sequence[int]
    rollouts: Artifact
    settings: JudgeSettings
    verifier: str
    student: ModelRef  # whose tokenizer turns responses into text
    progress: Progress


def run(job: JudgeJob) -> None:
    """Do every part of ``job.parts`` that is not committed.

    Raises:
        ValueError: a prompt without a reference answer, or with one that the verifier cannot read; names its id.
    """
    done = job.output.committed()
    todo = sorted(part for part in job.parts if part not in done)
    if not todo:
        return
    from eopd.stages.models.loading import load_tokenizer

    tokenizer = load_tokenizer(job.student)
    verifier = open_verifier(
        job.verifier, seconds=job.settings.seconds_per_answer, workers=job.settings.verifier_workers
    )
    responses = right = 0
    job.progress.start("judge", len(todo), unit="parts")
    try:
        for part in claimed_parts(job.output, todo, job.progress.line):
            if not passes_on(job.rollouts, part, job.output, part):
                verdicts = _do_part(job, part, tokenizer, verifier)
                responses += len(verdicts)
                right += sum(verdict.correct for verdict in verdicts)
            job.progress.advance(1)
    finally:
        job.progress.close()
        verifier.close()
    job.progress.line(f"judge: {right:,} of {responses:,} responses are right")


def _do_part(job: JudgeJob, part: int, tokenizer: PreTrainedTokenizerBase, verifier: Verifier) -> list[Verdict]:
    """Judge one part and commit its verdicts."""
    rows = read_rollouts(job.rollouts.part_folder(part), COLUMNS).to_pylist()
    check_answers(verifier, ((row["prompt_id"], row["answer"]) for row in rows), f"{job.rollouts} part {part}")
    judged = ("response_token_ids", "finish_reason", "stop_token_id", "answer")
    verdicts = judge_responses(verifier, tokenizer, [Answered(*(row[name] for name in judged)) for row in rows])
    info = {
        "responses": len(rows),
        "tokens": sum(len(row["response_token_ids"]) for row in rows),
        "right": sum(verdict.correct for verdict in verdicts),
        "verifier": verifier.named(),
    }
    inputs = {"rollouts": job.rollouts.marker(part).checksum}
    with job.output.write_part(part, inputs=inputs, info=info) as folder:
        VERDICTS.write(
            folder,
            [
                {"prompt_id": row["prompt_id"], "sample": row["sample"], **asdict(verdict)}
                for row, verdict in zip(rows, verdicts, strict=True)
            ],
        )
    return verdicts
