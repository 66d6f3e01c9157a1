"""Scores from a capture of another tool: the top-k lists of each response, without a teacher that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from eopd.stages.job import Progress
from eopd.stages.models.loading import load_tokenizer_at
from eopd.stages.models.settings import CaptureSettings
from eopd.stages.models.tokenizers import vocabulary_fingerprint
from eopd.storage.artifacts import Artifact
from eopd.storage.captures import Capture, Wanted, columns_of, imported_header, read_capture
from eopd.storage.claims import claimed_parts
from eopd.storage.codec import MAX_ID
from eopd.storage.errors import InputError
from eopd.storage.records import read_rollouts
from eopd.storage.sources import passes_on
from eopd.storage.teacher_cache import write_part

COLUMNS = ("prompt_id", "prompt_index", "prompt_token_ids", "response_token_ids")


@dataclass(frozen=True)
class CapturedJob:
    """Part i of ``output`` from part i of ``rollouts``, whose prompts are the rows of the capture."""

    output: Artifact
    parts: Sequence[int]
    progress: Progress
    rollouts: Artifact
    capture: CaptureSettings
    fingerprint: str  # of the capture
    tokenizer: str  # folder of the student's, whose ids the capture holds
    temperature: float  # of the log-probs


def run(job: CapturedJob) -> None:
    """Do every part of ``job.parts`` that is not committed.

    Raises:
        ValueError: as ``exchange.read_capture``; a token with fewer entries than ``top_k``.
    """
    done = job.output.committed()
    pending = [part for part in job.parts if part not in done and not passes_on(job.rollouts, part, job.output, part)]
    if not pending:
        return
    tokenizer = vocabulary_fingerprint(load_tokenizer_at(job.tokenizer))
    path = Path(job.capture.path)
    job.progress.start("score", sum(int(job.rollouts.marker(part).info.get("responses", 0)) for part in pending))
    try:
        for part in claimed_parts(job.output, pending, job.progress.line):
            rows = read_part(job, part).rows
            checksum = job.rollouts.marker(part).checksum
            header = replace(
                imported_header(
                    rows,
                    teacher=job.fingerprint,
                    tokenizer=tokenizer,
                    vocab_size=job.capture.vocab_size or MAX_ID,
                    source=path.name,
                ),
                head=job.capture.rule(),
                temperature=job.temperature,
                rollout_checksum=checksum,
            )
            info = {"responses": rows.responses, "tokens": rows.tokens, "truncated": 0}
            with job.output.write_part(part, inputs={"rollouts": checksum}, info=info) as folder:
                write_part(folder, rows, header)
            job.progress.advance(rows.responses)
    finally:
        job.progress.close()


def read_part(job: CapturedJob, part: int) -> Capture:
    """Read the lists of the responses of one part."""
    path = Path(job.capture.path)
    table = read_rollouts(job.rollouts.part_folder(part), COLUMNS).to_pylist()
    wanted = [
        Wanted(row["prompt_index"], row["prompt_id"], row["prompt_token_ids"], row["response_token_ids"])
        for row in table
    ]
    capture = read_capture(
        path,
        columns_of(path, job.capture.named),
        shifted=job.capture.shifted,
        vocab_size=job.capture.vocab_size,
        wanted=wanted,
    )
    sizes = np.diff(capture.rows.head_offsets)
    if len(sizes) and sizes.min() < job.capture.top_k:
        token = int(sizes.argmin())
        response = int(np.searchsorted(capture.rows.response_offsets, token, "right")) - 1
        raise InputError(
            f"{path} row {wanted[response].row}: response token {token - capture.rows.response_offsets[response]} "
            f"has {sizes.min()} entries, fewer than teacher.capture.top_k = {job.capture.top_k}",
            setting="teacher.capture.top_k",
            file=path,
            row=wanted[response].row,
            remedy="lower it",
        )
    return capture
