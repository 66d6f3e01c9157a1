"""Scores as Parquet tables that other trainers read, and top-k captures of others as scores.

Exported: one row a response, lists a token. Imported: one row a sequence, with its ids and an uncompressed list of
top-k ids and log-probs a position, as DistillKit-style captures have them once unpacked.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    """Write the responses of ``parts`` (all committed ones) to one Parquet file; returns the number of tokens.

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


@dataclass(frozen=True)
class Capture:
    """A capture of top-k lists as rows, one response per sequence, and the rounding that reading needed."""

    rows: TeacherRows
    precision: str  # the type that holds all of its log-probs: bfloat16, float16 or float32
    mass: float  # the largest mass of a position's top-k, before it was scaled to 1


def read_capture(
    path: Path,
    *,
    ids: str = "input_ids",
    top_ids: str = "top_indices",
    top_logprobs: str = "top_values",
    shifted: bool = True,
    vocab_size: int | None = None,
) -> Capture:
    """Read a capture of uncompressed top-k lists.

    Args:
        ids, top_ids, top_logprobs: the capture's columns.
        shifted: position t of the capture predicts token t + 1 (so the first token has no scores).
        vocab_size: the teacher's; None checks ids against none.

    What a capture does not hold is bounded and marked in the header (``imported_header``): the entropy is that of the
    top-k with the rest as one outcome, and a sampled token outside the top-k gets the mass of the rest. Entries without
    mass (log-probs below the floor, such as -inf) are left out, whatever their ids. A first position that is null, as
    vLLM writes it, has no scores. Masses above 1 that the log-probs' precision explains are scaled to 1.

    Raises:
        ValueError: the file is no Parquet; a column is missing or of another type; or a row or position (both are
            named) has ids outside the vocabulary, an id twice, values that are no log-probs, more mass than 1, or lists
            of other lengths.
    """
    with _naming_what_is_no_parquet(path):
        schema = pq.read_schema(path)
    for name, depth in ((ids, 1), (top_ids, 2), (top_logprobs, 2)):
        if name not in schema.names:
            raise ValueError(f"{path} has no column {name!r}; it has {', '.join(schema.names)}")
        _check_type(path, schema.field(name), depth, floats=name == top_logprobs)
    with _naming_what_is_no_parquet(path):
        table = pq.read_table(path, columns=[ids, top_ids, top_logprobs]).combine_chunks()
    tokens: list[NDArray[np.int64]] = []
    entries: list[_Position] = []
    lengths: list[int] = []
    columns = (table.column(name) for name in (ids, top_ids, top_logprobs))
    for row, values in enumerate(zip(*columns, strict=True)):
        sequence, some_ids, some = (value.as_py() for value in values)
        where = f"{path} row {row}"
        for name, value in ((ids, sequence), (top_ids, some_ids), (top_logprobs, some)):
            if value is None:
                raise ValueError(f"{where}: {name} is null")
        if None in sequence:
            raise ValueError(f"{where}: token {sequence.index(None)} of {ids} is null")
        count = len(sequence) - shifted
        if len(some_ids) != len(some) or len(some) not in {max(count, 0), len(sequence)}:
            raise ValueError(
                f"{where}: {len(sequence)} tokens and {len(some)} lists of log-probs ({len(some_ids)} of ids)"
            )
        first = int(shifted)
        if len(some) and some[0] is None and some_ids[0] is None:
            if shifted:
                raise ValueError(
                    f"{where}, position 0: null, as in vLLM's prompt log-probs, where position t scores token t: "
                    "read it with shifted=False (`--no-shifted`)"
                )
            first, some_ids, some = 1, some_ids[1:], some[1:]
        predicted = _ids(sequence, vocab_size, f"{where}: token id")[first:]
        start = first - shifted
        for place, (one, other) in enumerate(zip(some_ids[: len(predicted)], some[: len(predicted)], strict=True)):
            entries.append(_position(one, other, vocab_size, f"{where}, position {place + start}"))
        tokens.append(predicted)
        lengths.append(len(predicted))
    every = np.concatenate(tokens) if tokens else np.zeros(0, np.int64)
    return _imported(every.astype(np.int32), entries, np.asarray(lengths, np.int64), vocab_size)


@contextmanager
def _naming_what_is_no_parquet(path: Path) -> Iterator[None]:
    """Turn Arrow's errors about a file's bytes into an error that names the file."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the system, which names the file
            raise
        raise ValueError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())[:300]}") from error


@dataclass(frozen=True)
class _Position:
    """The entries of one position that have mass, in the listed order."""

    where: str
    ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]


def _check_type(path: Path, field: pa.Field, depth: int, *, floats: bool) -> None:
    kind, levels = field.type, 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, levels = kind.value_type, levels + 1
    right = pa.types.is_floating(kind) if floats else pa.types.is_integer(kind)
    if levels != depth or not (right or pa.types.is_null(kind)):
        form = "a list a sequence" if depth == 1 else "a list a position, in a list a sequence"
        numbers = "floats" if floats else "integers"
        raise ValueError(f"{path}: column {field.name!r} is {field.type}; it must hold {form}, of {numbers}")


def _ids(ids: list[int], vocab_size: int | None, what: str) -> NDArray[np.int64]:
    """Return ids as an array; ids outside the vocabulary are refused."""
    limit = 1 << 31 if vocab_size is None else vocab_size
    outside = next((one for one in ids if not 0 <= one < limit), None)
    if outside is not None:
        raise ValueError(f"{what} {outside} is outside the vocabulary of {limit}")
    return np.asarray(ids, np.int64)


def _position(ids: list[int] | None, logprobs: list[float] | None, vocab_size: int | None, where: str) -> _Position:
    if ids is None or logprobs is None or None in ids or None in logprobs:
        raise ValueError(f"{where}: null, and only the first position of a sequence may be")
    if len(ids) != len(logprobs):
        raise ValueError(f"{where}: {len(ids)} ids and {len(logprobs)} log-probs")
    values = np.asarray(logprobs, np.float64)
    if not (values < np.inf).all():  # NaN is not either
        raise ValueError(f"{where}: a log-prob is {'NaN' if np.isnan(values).any() else '+inf'}")
    kept = values >= LOGPROB_FLOOR  # ids beside -inf are often never written
    some = _ids([one for one, keep in zip(ids, kept, strict=True) if keep], vocab_size, f"{where}: id")
    values = values[kept]
    if not len(some):
        raise ValueError(f"{where}: its top-k list is empty")
    distinct, counts = np.unique(some, return_counts=True)
    if len(distinct) < len(some):
        raise ValueError(f"{where}: id {distinct[counts > 1][0]} is there twice")
    return _Position(where, some, values)


def _precision(values: NDArray[np.float64]) -> tuple[str, float]:
    """Return the narrowest type that holds all values, and the relative error of rounding to it."""
    single = values.astype(np.float32)
    if np.array_equal(single, values):
        if not (single.view(np.uint32) & 0xFFFF).any():
            return "bfloat16", 2.0**-7
        if np.array_equal(values.astype(np.float16), values):
            return "float16", 2.0**-10
    return "float32", 2.0**-23


def _imported(
    tokens: NDArray[np.int32], entries: list[_Position], lengths: NDArray[np.int64], vocab_size: int | None
) -> Capture:
    sizes = np.asarray([len(one.ids) for one in entries], np.int64)
    offsets = offsets_of(sizes)
    row = np.repeat(np.arange(len(sizes)), sizes)
    flat = np.concatenate([one.logprobs for one in entries]) if entries else np.zeros(0)
    flat_ids = np.concatenate([one.ids for one in entries]).astype(np.int32) if entries else np.zeros(0, np.int32)
    precision, error = _precision(flat)
    order = np.lexsort((-flat, row))
    flat, flat_ids = flat[order], flat_ids[order]
    probability = np.exp(np.minimum(flat, 99.0))  # finite: an infinite mass would equal what is allowed
    mass = np.bincount(row, probability, minlength=len(sizes))
    # An error of e in a log-prob l changes its probability p by p |l| e; rounding makes none of them positive.
    allowed = 1.0 + 1e-3 + error * np.bincount(row, probability * np.maximum(-flat, 0.0), minlength=len(sizes))
    heavy = np.flatnonzero(~(mass <= allowed))
    if len(heavy):
        raise ValueError(f"{entries[heavy[0]].where}: mass {mass[heavy[0]]:.4f}; are these log-probs?")
    whole = (sizes == vocab_size) & (mass >= 2.0 - allowed)  # nothing is outside: what is short of 1 is rounding
    flat = np.maximum(flat - np.log(np.where(whole, mass, np.maximum(mass, 1.0)))[row], LOGPROB_FLOOR)
    tail = np.log(np.maximum(1.0 - np.where(whole, 1.0, np.minimum(mass, 1.0)), np.exp(LOGPROB_FLOOR)))
    entropy = -np.bincount(row, np.exp(flat) * flat, minlength=len(sizes)) - np.exp(tail) * tail
    place = np.arange(len(flat)) - offsets[row]
    hit = flat_ids == tokens[row]
    rank, sampled = sizes.copy(), tail.copy()
    rank[row[hit]], sampled[row[hit]] = place[hit], flat[hit]
    nothing = np.zeros(len(sizes) + 1, np.int64)
    rows = TeacherRows(
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
    return Capture(rows, precision, float(mass.max(initial=0.0)))


def imported_header(rows: TeacherRows, *, teacher: str, tokenizer: str, vocab_size: int, source: str) -> PartHeader:
    """Build the header of an imported part: it covers heads, and nothing that the capture does not hold."""
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
