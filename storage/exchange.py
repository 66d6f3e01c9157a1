"""Scores as Parquet tables that other trainers read, and top-k captures of others as scores.

Exported: one row a response, lists a token. Imported: one row a sequence, with its ids and an uncompressed list of
top-k ids and log-probs a position, as DistillKit-style captures have them once unpacked.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eopd.storage.files import naming_full_disks
from eopd.storage.ragged import offsets_of
from eopd.storage.records import named
from eopd.storage.sources import filled_parts
from eopd.storage.teacher_cache import PartHeader, TeacherCache
from eopd.storage.teacher_record import LOGPROB_FLOOR, HeadRule, TeacherRows

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
    """Write the responses of ``parts`` (all committed ones) to one Parquet file; returns how many tokens.

    The file appears whole or not at all.

    Raises:
        StoreFull, StoreUnwritable: it cannot be written; MissingPart, DamagedPart: or not be read.
    """
    tokens = 0
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with naming_full_disks(path), pq.ParquetWriter(beside, EXPORT_SCHEMA, compression="zstd") as writer:
            for part in filled_parts(cache.artifact) if parts is None else parts:
                rows = cache.read_part(part)
                writer.write_table(_table(rows, part))
                tokens += rows.tokens
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return tokens


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


def import_topk(
    path: Path,
    *,
    ids: str = "input_ids",
    top_ids: str = "top_indices",
    top_logprobs: str = "top_values",
    shifted: bool = True,
) -> TeacherRows:
    """A capture of uncompressed top-k lists as rows, one response a sequence.

    Args:
        ids, top_ids, top_logprobs: the capture's columns.
        shifted: position t of the capture predicts token t + 1 (so the first token has no scores).

    What a capture does not hold is bounded and marked in the header (``imported_header``): the entropy is that of the
    top-k with the rest as one outcome, and a sampled token outside the top-k gets the mass of the rest.

    Raises:
        ValueError: a column is missing, lists disagree in length, or a position's top-k has more mass than 1.
    """
    schema = pq.read_schema(path).names
    for name in (ids, top_ids, top_logprobs):
        if name not in schema:
            raise ValueError(f"{path} has no column {name!r}; it has {', '.join(schema)}")
    table = pq.read_table(path, columns=[ids, top_ids, top_logprobs]).combine_chunks()
    cut = 1 if shifted else 0
    tokens: list[int] = []
    found: list[Any] = []
    logprobs: list[Any] = []
    lengths: list[int] = []
    for sequence, some_ids, some in zip(*(table.column(name) for name in (ids, top_ids, top_logprobs)), strict=True):
        predicted = sequence.as_py()[cut:]
        kept_ids, kept = some_ids.as_py()[: len(predicted)], some.as_py()[: len(predicted)]
        if not len(predicted) == len(kept_ids) == len(kept):
            raise ValueError(f"{path} row {len(lengths)}: {len(predicted)} tokens and {len(kept)} lists of log-probs")
        lengths.append(len(predicted))
        tokens += predicted
        found += kept_ids
        logprobs += kept
    return _imported(np.asarray(tokens, np.int32), found, logprobs, np.asarray(lengths, np.int64), path)


def _imported(
    tokens: NDArray[np.int32], ids: list[Any], logprobs: list[Any], lengths: NDArray[np.int64], path: Path
) -> TeacherRows:
    sizes = np.asarray([len(some) for some in ids], np.int64)
    if len(sizes) and sizes.min() < 1:
        raise ValueError(f"{path}: position {int(np.argmin(sizes))} has an empty top-k list")
    offsets = offsets_of(sizes)
    row = np.repeat(np.arange(len(sizes)), sizes)
    flat = np.asarray([value for some in logprobs for value in some], np.float64)
    flat_ids = np.asarray([value for some in ids for value in some], np.int32)
    if len(flat) != len(flat_ids):
        raise ValueError(f"{path}: {len(flat_ids)} ids and {len(flat)} log-probs")
    order = np.lexsort((-flat, row))
    flat, flat_ids = np.maximum(flat[order], LOGPROB_FLOOR), flat_ids[order]
    mass = np.bincount(row, np.exp(flat), minlength=len(sizes))
    if len(mass) and mass.max() > 1.0 + 1e-3:
        raise ValueError(f"{path}: position {int(np.argmax(mass))} has mass {mass.max():.4f}; are these log-probs?")
    flat -= np.log(np.maximum(mass, 1.0))[row]
    tail = np.log(np.maximum(1.0 - np.minimum(mass, 1.0), np.exp(LOGPROB_FLOOR)))
    entropy = -np.bincount(row, np.exp(flat) * flat, minlength=len(sizes)) - np.exp(tail) * tail
    place = np.arange(len(flat)) - offsets[row]
    hit = flat_ids == tokens[row]
    rank, sampled = sizes.copy(), tail.copy()
    rank[row[hit]], sampled[row[hit]] = place[hit], flat[hit]
    nothing = np.zeros(len(sizes) + 1, np.int64)
    return TeacherRows(
        response_offsets=offsets_of(lengths),
        token_ids=tokens,
        entropy=np.maximum(entropy, 0.0).astype(np.float32),
        sampled_logprob=sampled.astype(np.float32),
        sampled_rank=rank.astype(np.int32),
        stop_ids=np.zeros(0, np.int32),
        stop_logprobs=np.zeros((len(sizes), 0), np.float32),
        head_offsets=offsets,
        head_ids=flat_ids,
        head_logprobs=flat.astype(np.float32),
        tail_logmass=tail.astype(np.float32),
        draw_offsets=nothing,
        draw_ids=np.zeros(0, np.int32),
        extra_offsets=nothing,
        extra_ids=np.zeros(0, np.int32),
        extra_logprobs=np.zeros(0, np.float32),
    )


def imported_header(rows: TeacherRows, *, teacher: str, tokenizer: str, vocab_size: int, source: str) -> PartHeader:
    """The header of an imported part: it answers for heads, and for nothing that the capture did not hold."""
    sizes = np.diff(rows.head_offsets)
    return PartHeader(
        teacher=teacher,
        tokenizer=tokenizer,
        teacher_context="imported",
        temperature=1.0,
        head=HeadRule(k_max=int(sizes.min(initial=1 << 20)) if len(sizes) else 1, full_head_above=-1.0, draws="none"),
        vocab_size=vocab_size,
        rollout_checksum="",
        engine=f"import of {source}",
        has_entropy=False,
        has_sampled=False,
    )
