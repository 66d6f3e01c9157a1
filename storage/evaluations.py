"""The evaluation record: one sampled response of a model to one problem of a benchmark, and its verdict.

Produced by ``stages.evaluate``, one Parquet file a part of problems. The summary (``RESULTS``) and one row a problem
(``PROBLEMS``) are an artifact of their own, which ``stages.report`` reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from eopd.storage.records import named, read_record, write_rows

SAMPLES = "samples.parquet"
PROBLEMS = "problems.parquet"
RESULTS = "results.json"

SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("benchmark", pa.string(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("problem_index", pa.int64(), nullable=False),  # row of the problem in its source
        pa.field("sample", pa.int32(), nullable=False),  # 0 .. samples - 1
        pa.field("answer", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("response_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_text", pa.string(), nullable=False),  # without stop and special tokens: the graded text
        # log-prob of each sampled token under the full softmax at the sampling temperature, nats; null where the
        # engine gives only the truncated distribution
        pa.field("logprobs", pa.list_(pa.float32())),
        # the same after top-p truncation; null where nothing is truncated
        pa.field("truncated_logprobs", pa.list_(pa.float32())),
        pa.field("finish_reason", pa.string(), nullable=False),  # "stop" | "length"
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("form", pa.string()),  # equal for correct responses that are the same solution
        pa.field("reason", pa.string()),  # why it is not correct, in words
        pa.field("seed", pa.int64(), nullable=False),
    ],
    metadata=named("evaluation_samples"),
)

PROBLEMS_SCHEMA = pa.schema(
    [
        pa.field("benchmark", pa.string(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("samples", pa.int32(), nullable=False),
        pa.field("correct", pa.int32(), nullable=False),  # of the samples
        pa.field("distinct_correct", pa.int32(), nullable=False),
        pa.field("self_bleu", pa.float64()),  # null with fewer than two samples
        pa.field("distinct_4", pa.float64()),  # null where no sample has four tokens
        pa.field("response_tokens", pa.float64(), nullable=False),  # mean over the samples, stop token included
        pa.field("truncated", pa.int32(), nullable=False),  # samples that were cut by the length limit
    ],
    metadata=named("evaluation_problems"),
)


def write_samples(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one part's samples (possibly none) to ``folder``."""
    write_rows(folder / SAMPLES, SAMPLES_SCHEMA, rows)


def read_samples(folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read what was written to ``folder``.

    Raises:
        WrongArtifact, NewerSchema: the file holds another record or a newer version of it. DamagedPart: it cannot be
            read.
    """
    return read_record(folder / SAMPLES, SAMPLES_SCHEMA, columns)


def write_problems(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one row a problem (possibly none) to ``folder``."""
    write_rows(folder / PROBLEMS, PROBLEMS_SCHEMA, rows)


def read_problems(folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read what was written to ``folder``.

    Raises:
        WrongArtifact, NewerSchema: the file holds another record or a newer version of it. DamagedPart: it cannot be
            read.
    """
    return read_record(folder / PROBLEMS, PROBLEMS_SCHEMA, columns)
