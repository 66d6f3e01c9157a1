"""Records that are Parquet files. The metadata of a record's schema name it and its version.

Graded samples, rollouts and analyses follow; other records have modules of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eopd.storage.errors import DamagedPart, NewerSchema, WrongArtifact
from eopd.storage.untrusted import MISFITS

ROWS = 1_024
LARGEST = 1 << 33
"""Bytes of a part's rows in memory."""

_RECORD, _VERSION = b"eopd.record", b"eopd.version"


def named(record: str, version: int = 1) -> dict[bytes, bytes]:
    """Return the metadata of a record's schema."""
    return {_RECORD: record.encode(), _VERSION: str(version).encode()}


@dataclass(frozen=True)
class RowRecord:
    """A record that is one Parquet file of rows."""

    file_name: str
    schema: pa.Schema

    def write(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows of one part (possibly none) to ``folder``."""
        write_rows(folder / self.file_name, self.schema, rows)

    def read(self, folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
        """Read what was written to ``folder``, or only ``columns`` of it.

        Raises:
            WrongArtifact, NewerSchema: the file holds another record or a newer version of it. DamagedPart: it cannot
                be read.
        """
        return read_record(folder / self.file_name, self.schema, columns)


def write_rows(path: Path, schema: pa.Schema, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows (possibly none) of the record with this schema."""
    write_record(path, pa.Table.from_pylist([dict(row) for row in rows], schema=schema))


def write_record(path: Path, table: pa.Table) -> None:
    assert _RECORD in table.schema.metadata, path
    pq.write_table(table, path, compression="zstd")


def read_record(
    path: Path, schema: pa.Schema, columns: Sequence[str] | None = None, *, others: Sequence[pa.Schema] = ()
) -> pa.Table:
    """Read one file of the record with this schema, or only ``columns`` of it.

    Args:
        others: schemas of other versions that are read too. Columns that the file's version lacks are left out, and so
            are nullable ones that only these schemas have, if the file lacks them.

    Raises:
        WrongArtifact: the file holds another record.
        NewerSchema: a newer eopd wrote it.
        DamagedPart: it is no Parquet file, is too large, or its columns are not those of the record.
    """
    try:
        with pq.ParquetFile(path) as file:
            first, schema = schema, _schema_of(path, file.schema_arrow.metadata or {}, (schema, *others))
            if columns is not None:
                there = {*file.schema_arrow.names, *first.names, *(one.name for one in schema if not one.nullable)}
                columns = [name for name in columns if name in schema.names and name in there]
            return check_columns(path, _rows(path, file, columns), schema, columns)
    except (pa.ArrowException, *MISFITS) as error:  # Arrow's are ValueErrors, OSErrors and others
        raise DamagedPart(
            f"{path} is no Parquet file that can be read: {str(error).splitlines()[0]}", file=path
        ) from error
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno is not None:
            raise
        raise DamagedPart(f"{path} is no Parquet file that can be read: {error}", file=path) from error


def _rows(path: Path, file: pq.ParquetFile, columns: Sequence[str] | None) -> pa.Table:
    """Yield all rows in small batches, so that a small file that claims to hold much is detected early."""
    batches, size = [], 0
    # a part is small: dividing it over threads takes longer than reading it
    for batch in file.iter_batches(ROWS, columns=None if columns is None else list(columns), use_threads=False):
        batches.append(batch)
        size += batch.nbytes
        if size > LARGEST:
            raise DamagedPart(f"{path} holds more than {LARGEST:,} bytes, which no part does", file=path)
    if not batches:
        return file.read(columns=None if columns is None else list(columns))
    return pa.Table.from_batches(batches).replace_schema_metadata(file.schema_arrow.metadata)


def check_columns(path: Path, table: pa.Table, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Return ``table`` if it has the record's columns and types. Raises DamagedPart."""
    names = schema.names if columns is None else columns
    for name in names:
        field = schema.field(name)
        if name not in table.schema.names:
            if columns is None and field.nullable:  # not written by an older eopd
                continue
            raise DamagedPart(f"{path} has no column {name!r}", file=path)
        column = table.column(name)
        if column.type != field.type:
            raise DamagedPart(f"{path}: column {name!r} is of {column.type}, not {field.type}", file=path)
        nulls = 0 if field.nullable else column.null_count
        if pa.types.is_list(field.type):
            nulls += pa.chunked_array([chunk.flatten() for chunk in column.chunks], field.type.value_type).null_count
        if nulls:
            raise DamagedPart(f"{path}: column {name!r} has {nulls} values that are null", file=path)
    table.validate(full=True)
    return table


def _schema_of(path: Path, metadata: Mapping[bytes, bytes], schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The schema, among versions of one record, that a file says it has."""
    record = schemas[0].metadata[_RECORD]
    if metadata.get(_RECORD) != record:
        there = metadata.get(_RECORD, b"no record of eopd").decode(errors="replace")
        raise WrongArtifact(f"{path} holds {there}, not {record.decode()}", file=path)
    version = int(metadata.get(_VERSION, b"0"))
    known = {int(schema.metadata[_VERSION]): schema for schema in schemas}
    if version > max(known):
        raise NewerSchema(
            f"{path} has version {version}; this eopd reads up to {max(known)}",
            file=path,
            remedy="Upgrade eopd to use it.",
        )
    if version not in known:
        raise WrongArtifact(
            f"{path} has version {version}, and this eopd reads {', '.join(map(str, sorted(known)))}", file=path
        )
    return known[version]


# -- evaluations ------------------------------------------------------------------------------------------------------

# The evaluation record: one sampled response of a model to one problem of a benchmark, and its verdict.
#
# Produced by ``stages.evaluate``, one file of ``SAMPLES`` a part of problems. The summary (``RESULTS``) and one row a
# problem (``PROBLEMS``) are an artifact of their own, which ``stages.report`` reads.


RESULTS = "results.json"

SAMPLES = RowRecord(
    "samples.parquet",
    pa.schema(
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
    ),
)

PROBLEMS = RowRecord(
    "problems.parquet",
    pa.schema(
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
    ),
)


# -- rollouts ---------------------------------------------------------------------------------------------------------

# The rollout record: one response to one prompt, as token ids, and who wrote each of them.
#
# Produced by ``stages.rollout``; read by ``stages.score``, ``stages.train`` and ``stages.report``. One Parquet
# file a part. Token ids are those that were sampled, never re-tokenised text.
#
# Version 1 holds responses that the policy sampled, each at once. Version 2 adds ``written``, the writer of every
# response token, and, if a verifier judged responses while they were sampled, ``correct`` and ``attempts``. An eopd
# that knows version 1 alone refuses it.


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


# -- records of analyses ----------------------------------------------------------------------------------------------

# Records of the analyses of a student: alignment, routing and attribution.
#
# Each is one Parquet file a part. The figures computed from them are a JSON file (``*_RESULTS``) of an artifact of
# their own, which ``stages.report`` reads; those of routing lie beside the choices.


ALIGNMENT_RESULTS = "alignment.json"
ATTRIBUTION_RESULTS = "attribution.json"
ROUTING_RESULTS = "routing.json"

_RESPONSE = [
    pa.field("benchmark", pa.string(), nullable=False),
    pa.field("problem_id", pa.string(), nullable=False),
    pa.field("sample", pa.int32(), nullable=False),
]

ALIGNMENT_SUMS = RowRecord(
    "sums.parquet",
    pa.schema(
        [
            *_RESPONSE,
            pa.field("bin", pa.int32(), nullable=False),  # of teacher entropy, from 0
            pa.field("tokens", pa.float64(), nullable=False),
            # sums over these tokens; divergences and entropies in nats
            pa.field("fkl", pa.float64(), nullable=False),
            pa.field("rkl", pa.float64(), nullable=False),
            pa.field("agreement", pa.float64(), nullable=False),  # tokens whose most probable id is the same
            pa.field("teacher_entropy", pa.float64(), nullable=False),
            pa.field("student_entropy", pa.float64(), nullable=False),
            pa.field("student_above", pa.float64(), nullable=False),  # tokens whose student entropy exceeds tau
            pa.field("teacher_outside", pa.float64(), nullable=False),  # probability on ids the student lacks
            pa.field("student_outside", pa.float64(), nullable=False),
        ],
        metadata=named("alignment_sums"),
    ),
)
"""Sums over the tokens of one response in one bin of teacher entropy, without rows for empty bins. The part's marker
names the bins' edges."""

ENTROPIES = RowRecord(
    "entropies.parquet",
    pa.schema(
        [
            *_RESPONSE,
            # of the distribution before each of the first tokens, at temperature 1 over the full vocabulary, nats
            pa.field("entropy", pa.list_(pa.float32()), nullable=False),
        ],
        metadata=named("entropies"),
    ),
)
"""A model's entropies at the first tokens of one of its samples."""

ROUTING_CHOICES = RowRecord(
    "choices.parquet",
    pa.schema(
        [
            *_RESPONSE,
            pa.field("calibration", pa.bool_(), nullable=False),  # the rule was fitted to it, and no figure has it
            pa.field("mode", pa.string(), nullable=False),  # chosen
            pa.field("oracle", pa.string()),  # the right mode with the fewest tokens; null if none is right
            # null where the response is too short
            pa.field("entropy", pa.float64()),  # sum, nats
            pa.field("trend", pa.float64()),
            pa.field("roughness", pa.float64()),
        ],
        metadata=named("routing_choices"),
    ),
)
"""The mode chosen for a response by those entropies."""

ATTRIBUTION_SCORES = RowRecord(
    "scores.parquet",
    pa.schema(
        [
            pa.field("document", pa.string(), nullable=False),  # its id; of a rollout "prompt id/sample"
            pa.field("query_set", pa.string(), nullable=False),
            # inner product of the document's gradient, preconditioned and of unit length, with the query set's mean
            pa.field("score", pa.float32(), nullable=False),
        ],
        metadata=named("attribution_scores"),
    ),
)
"""The score of one document for a query set, in the documents' order."""
