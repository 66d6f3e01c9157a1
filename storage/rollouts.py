"""The rollout record: one response of one policy to one prompt, as token ids.

Produced by ``stages.rollout``; read by ``stages.score``, ``stages.train`` and ``stages.report``. One Parquet
file a part. Token ids are what was sampled, never re-tokenised text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from eopd.storage.errors import DamagedPart
from eopd.storage.records import named, read_record, write_rows

FILE_NAME = "rollouts.parquet"

SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt_index", pa.int64(), nullable=False),  # row of the prompt in its source
        pa.field("sample", pa.int32(), nullable=False),  # 0 .. samples_per_prompt - 1
        pa.field("messages", pa.string()),  # the prompt as JSON chat messages
        pa.field("answer", pa.string()),
        pa.field("verifier", pa.string()),
        pa.field("teacher_prompt", pa.string()),  # the teacher's own prompt text, where the source has a column for it
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),  # as the student read it
        pa.field("response_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_text", pa.string()),  # for people; never read back into ids
        # log-prob of each sampled token under the full softmax at the sampling temperature, nats; null where the
        # engine gives only the truncated distribution
        pa.field("logprobs", pa.list_(pa.float32())),
        # the same after top-p / top-k / min-p truncation; null where nothing is truncated
        pa.field("truncated_logprobs", pa.list_(pa.float32())),
        pa.field("finish_reason", pa.string(), nullable=False),  # "stop" | "length"
        pa.field("stop_token_id", pa.int32()),  # last response token when it is a stop id, else null
        pa.field("seed", pa.int64(), nullable=False),
    ],
    metadata=named("rollouts"),
)


def write_rollouts(folder: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write one part's rollouts (possibly none) to ``folder``."""
    write_rows(folder / FILE_NAME, SCHEMA, rows)


def read_rollouts(folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one part.

    Raises:
        WrongArtifact, NewerSchema: the file holds another record or a newer version of it. DamagedPart: it cannot be
            read.
    """
    table = read_record(folder / FILE_NAME, SCHEMA, columns)
    for name in ("prompt_token_ids", "response_token_ids"):
        if name in table.schema.names and (pc.min(pc.list_flatten(table.column(name))).as_py() or 0) < 0:
            raise DamagedPart(f"{folder / FILE_NAME}: column {name!r} has an id below 0")
    return table
