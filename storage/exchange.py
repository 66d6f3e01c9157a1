"""Scores as Parquet tables that other trainers read.

A table has one row per response with lists per token, or per sequence with top-k lists in the columns of axolotl's
KD plugin.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eopd.storage.artifacts import Artifact
from eopd.storage.files import naming_full_disks
from eopd.storage.records import named, read_rollouts
from eopd.storage.sources import filled_parts
from eopd.storage.teacher_cache import TeacherCache
from eopd.storage.teacher_record import TeacherRows

EXPORT_SCHEMA = pa.schema(
    [
        pa.field("part", pa.int32()),
        pa.field("row", pa.int32()),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("entropy", pa.list_(pa.float32())),  # nats, full vocabulary
        pa.field("sampled_logprob", pa.list_(pa.float32())),
        pa.field("tail_logmass", pa.list_(pa.float32())),
        pa.field("head_ids", pa.list_(pa.list_(pa.int32()))),
        pa.field("head_logprobs", pa.list_(pa.list_(pa.float32()))),
        pa.field("draw_ids", pa.list_(pa.list_(pa.int32()))),
    ],
    metadata=named("scores export"),
)


def export_parquet(cache: TeacherCache, path: Path, parts: Iterable[int] | None = None) -> int:
    """Write the responses of ``parts`` (all committed ones) to one Parquet file; returns the number of tokens.

    The file appears whole or not at all.

    Raises:
        StoreFull, StoreUnwritable: it cannot be written; MissingPart, DamagedPart: or not be read.
    """
    tokens = 0
    with _whole_file(path, EXPORT_SCHEMA) as writer:
        for part in filled_parts(cache.artifact) if parts is None else parts:
            rows = cache.read_part(part)
            writer.write_table(_table(rows, part))
            tokens += rows.tokens
    return tokens


@contextmanager
def _whole_file(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Open a Parquet file for writing that takes its name once it is complete."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with naming_full_disks(path), pq.ParquetWriter(beside, schema, compression="zstd") as writer:
            yield writer
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _table(rows: TeacherRows, part: int) -> pa.Table:
    outer = rows.response_offsets

    def flat(values: NDArray[Any]) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(outer, pa.int32()), pa.array(values))

    def nested(offsets: NDArray[Any], values: NDArray[Any]) -> pa.Array:
        inner = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
        return pa.ListArray.from_arrays(pa.array(outer, pa.int32()), inner)

    columns = [
        pa.array(np.full(rows.responses, part, np.int32)),
        pa.array(np.arange(rows.responses, dtype=np.int32)),
        flat(rows.token_ids),
        flat(rows.entropy),
        flat(rows.sampled_logprob),
        flat(rows.tail_logmass),
        nested(rows.head_offsets, rows.head_ids),
        nested(rows.head_offsets, rows.head_logprobs),
        nested(rows.draw_offsets, rows.draw_ids),
    ]
    return pa.Table.from_arrays(columns, schema=EXPORT_SCHEMA)


SEQUENCE_SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32())),  # prompt and response
        pa.field("attention_mask", pa.list_(pa.int8())),  # 1
        pa.field("labels", pa.list_(pa.int32())),  # the response's ids, IGNORED before them
        pa.field("completion_mask", pa.list_(pa.int8())),  # 1 for the response's tokens
        pa.field("target_token_ids", pa.list_(pa.list_(pa.int32()))),  # at position j: of token j + 1
        pa.field("target_logprobs", pa.list_(pa.list_(pa.float32()))),
        pa.field("target_mask", pa.list_(pa.list_(pa.int8()))),  # 1 for entries that are there
    ]
)
"""Columns of axolotl's KD plugin. TRL's trainers read the first four."""
IGNORED = -100
NO_MASS = -1e9  # log-prob of an entry that is not there; -inf would make NaN in a loss


def export_sequences(cache: TeacherCache, rollouts: Artifact, path: Path) -> tuple[int, int]:
    """Write every scored response with its prompt to one Parquet file (``SEQUENCE_SCHEMA``).

    Lists of a sequence are all as long as its largest head. The file appears whole or not at all.

    Returns:
        Sequences, and tokens with log-probs.

    Raises:
        StoreFull, StoreUnwritable: it cannot be written; MissingPart, DamagedPart: or not be read.
    """
    sequences = tokens = 0
    with _whole_file(path, SEQUENCE_SCHEMA) as writer:
        for part in filled_parts(cache.artifact):
            prompts = read_rollouts(rollouts.part_folder(part), ["prompt_token_ids"])["prompt_token_ids"].to_pylist()
            rows = cache.read_part(part)
            table = [
                _sequence(rows, response, prompt)
                for response, prompt in enumerate(prompts)
                if rows.response_offsets[response] < rows.response_offsets[response + 1]
            ]
            writer.write_table(pa.Table.from_pylist(table, schema=SEQUENCE_SCHEMA))
            sequences, tokens = sequences + len(table), tokens + rows.tokens
    return sequences, tokens


def _sequence(rows: TeacherRows, response: int, prompt: list[int]) -> dict[str, list[Any]]:
    """Return one response after its prompt, as a row of ``SEQUENCE_SCHEMA``."""
    first, last = rows.response_offsets[response : response + 2]
    ids = rows.token_ids[first:last].tolist()
    sizes = np.diff(rows.head_offsets[first : last + 1])
    widest = int(sizes.max())
    entries = slice(rows.head_offsets[first], rows.head_offsets[last])
    there = np.arange(widest) < sizes[:, None]
    lists = {}
    for name, values, absent in (
        ("target_token_ids", rows.head_ids[entries], 0),
        ("target_logprobs", rows.head_logprobs[entries], NO_MASS),
        ("target_mask", np.ones(int(sizes.sum()), np.int8), 0),
    ):
        # The token after the prompt is described at the prompt's last position, and nothing at the last of all.
        filled = np.full((len(prompt) + len(ids), widest), absent, values.dtype)
        filled[len(prompt) - 1 : -1][there] = values
        lists[name] = list(filled)
    return {
        "input_ids": prompt + ids,
        "attention_mask": [1] * (len(prompt) + len(ids)),
        "labels": [IGNORED] * len(prompt) + ids,
        "completion_mask": [0] * len(prompt) + [1] * len(ids),
        **lists,
    }
