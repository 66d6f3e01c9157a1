"""The rollout record: one response to one prompt, as token ids, and who wrote each of them.

Produced by ``stages.rollout``; read by ``stages.score``, ``stages.train`` and ``stages.report``. One Parquet
file a part. Token ids are those that were sampled, never re-tokenised text.

Version 1 holds responses that the policy sampled, each at once. Version 2 adds ``written``, the writer of every
response token, and, if a verifier judged responses while they were sampled, ``correct`` and ``attempts``. An eopd that
knows version 1 alone refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path

import numpy as np
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


WRITTEN = "written"
SCHEMA_OF_WRITERS = SCHEMA.append(pa.field(WRITTEN, pa.list_(pa.int8()), nullable=False)).with_metadata(
    named("rollouts", 2)
)
"""Log-probs of tokens that the policy did not sample are NaN."""
SCHEMA_JUDGED = SCHEMA_OF_WRITERS.append(pa.field("correct", pa.bool_())).append(pa.field("attempts", pa.int32()))
"""Version 2 with the verdict on each response, and how often one was sampled until it was right."""


class Writer(IntEnum):
    """The writer of a response token."""

    POLICY = 0
    TEACHER = 1
    TEXT = 2  # literal text
    EXPERT = 3  # the policy, reading a context that shows it more
    DATA = 4


def write_rollouts(
    folder: Path, rows: Sequence[Mapping[str, object]], *, writers: bool = False, judged: bool = False
) -> None:
    """Write one part's rollouts (possibly none) to ``folder``.

    Args:
        writers: rows have ``written`` (version 2); otherwise the policy wrote every token.
        judged: rows have ``written``, ``correct`` and ``attempts``.
    """
    schema = SCHEMA_JUDGED if judged else SCHEMA_OF_WRITERS if writers else SCHEMA
    write_rows(folder / FILE_NAME, schema, rows)


def read_rollouts(folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one part. ``written`` is there if asked for (or all columns are), whatever the file's version.

    ``correct`` and ``attempts`` are left out if the file does not hold them.

    Raises:
        WrongArtifact, NewerSchema: the file holds another record or a newer version of it.
        DamagedPart: it cannot be read; an id is negative; tokens have no writer, or one that is unknown.
    """
    path = folder / FILE_NAME
    wanted = columns
    if columns is not None and WRITTEN in columns and "response_token_ids" not in columns:
        wanted = [*columns, "response_token_ids"]
    table = read_record(path, SCHEMA, wanted, others=[SCHEMA_JUDGED])
    if columns is None or WRITTEN in columns:
        table = _with_writers(path, table)
        table = table if columns is None else table.select([name for name in columns if name in table.schema.names])
    for name in ("prompt_token_ids", "response_token_ids"):
        if name in table.schema.names and (pc.min(pc.list_flatten(table.column(name))).as_py() or 0) < 0:
            raise DamagedPart(f"{path}: column {name!r} has an id below 0", file=path)
    return table


def _with_writers(path: Path, table: pa.Table) -> pa.Table:
    """The table with its writers checked, or with the policy as the writer of every token."""
    lengths = pc.list_value_length(table.column("response_token_ids")).to_numpy()
    if WRITTEN not in table.schema.names:
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        values = pa.array(np.full(int(offsets[-1]), Writer.POLICY, np.int8))
        return table.append_column(
            SCHEMA_OF_WRITERS.field(WRITTEN), pa.ListArray.from_arrays(pa.array(offsets), values)
        )
    written = table.column(WRITTEN)
    if not np.array_equal(pc.list_value_length(written).to_numpy(), lengths):
        raise DamagedPart(f"{path}: column {WRITTEN!r} has other lengths than the responses", file=path)
    unknown = set(pc.unique(pc.list_flatten(written)).to_pylist()) - {int(writer) for writer in Writer}
    if unknown:
        raise DamagedPart(f"{path}: column {WRITTEN!r} has the unknown writer {min(unknown)}", file=path)
    return table
