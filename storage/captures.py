"""Captures of top-k lists as scores.

A capture has one row per sequence, with its ids and an uncompressed list of top-k ids and log-probs per position, as
axolotl's plugin reads them, and as DistillKit-style captures have them once unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eopd.storage.errors import InputError
from eopd.storage.teacher_cache import PartHeader
from eopd.storage.teacher_record import LOGPROB_FLOOR, HeadRule, TeacherRows, offsets_of


@dataclass(frozen=True)
class CaptureColumns:
    """Columns of a capture. At position t, lists of ``top_ids`` and ``top_logprobs``; entries whose ``mask`` is 0 are
    not there."""

    ids: str = "input_ids"
    top_ids: str = "top_indices"
    top_logprobs: str = "top_values"
    mask: str | None = None

    @property
    def names(self) -> list[str]:
        return [self.ids, self.top_ids, self.top_logprobs, *([self.mask] if self.mask is not None else [])]


DISTILLKIT = CaptureColumns()
AXOLOTL = CaptureColumns(top_ids="target_token_ids", top_logprobs="target_logprobs", mask="target_mask")


def columns_of(path: Path, named: Mapping[str, str] | None = None) -> CaptureColumns:
    """Return the columns of a capture: axolotl's where the file has them, and DistillKit's otherwise.

    Args:
        named: columns in place of these, by the fields of ``CaptureColumns``.

    Raises:
        ValueError: the file is no Parquet.
    """
    with _naming_what_is_no_parquet(path):
        there = pq.read_schema(path).names
    named = named or {}
    known = DISTILLKIT if {"top_ids", "top_logprobs"} & named.keys() else _known(there)
    return replace(known, **named)


def _known(there: Sequence[str]) -> CaptureColumns:
    if AXOLOTL.top_ids not in there or AXOLOTL.top_logprobs not in there:
        return DISTILLKIT
    return AXOLOTL if AXOLOTL.mask in there else replace(AXOLOTL, mask=None)


@dataclass(frozen=True)
class Wanted:
    """A response that is read from a capture."""

    row: int
    prompt_id: str  # for messages
    prompt: Sequence[int]
    response: Sequence[int]


@dataclass(frozen=True)
class Capture:
    """A capture of top-k lists as rows, one response per sequence, and the rounding that reading needed."""

    rows: TeacherRows
    precision: str  # the type that holds all of its log-probs: bfloat16, float16 or float32
    mass: float  # the largest mass of a position's top-k, before it was scaled to 1


def read_capture(
    path: Path,
    columns: CaptureColumns = DISTILLKIT,
    *,
    shifted: bool = True,
    vocab_size: int | None = None,
    wanted: Sequence[Wanted] | None = None,
) -> Capture:
    """Read a capture of uncompressed top-k lists.

    Args:
        shifted: position t of the capture predicts token t + 1 (so the first token has no scores).
        vocab_size: the teacher's; None checks ids against none.
        wanted: the responses to read, in this order; None: of every sequence the tokens that have lists.

    Fields that a capture lacks are bounded and marked in the header (``imported_header``): the entropy is that of the
    top-k with the rest as one outcome, and a sampled token outside the top-k gets the mass of the rest. Entries without
    mass (log-probs below the floor, such as -inf) are left out, whatever their ids. A null first position, as vLLM
    writes it, has no scores. Masses above 1 that the log-probs' precision explains are scaled to 1.

    Raises:
        ValueError: the file is no Parquet; a column is missing or of another type; or a row or position (both are
            named) has ids outside the vocabulary, an id twice, values that are no log-probs, more mass than 1, lists of
            other lengths, a masked position between others, or other tokens than the response that is wanted.
    """
    check_capture(path, columns)
    table = _rows(path, columns.names, None if wanted is None else [one.row for one in wanted])
    tokens: list[NDArray[np.int64]] = []
    entries: list[_Position] = []
    for number in range(table.num_rows):
        row = number if wanted is None else wanted[number].row
        values = [table.column(name)[number].as_py() for name in columns.names]
        try:
            sequence = _CapturedSequence.of(row, columns, values, shifted)
            start, stop = sequence.span() if wanted is None else sequence.place_of(wanted[number])
            entries += [sequence.position(token, vocab_size) for token in range(start, stop)]
            tokens.append(_ids(sequence.ids, vocab_size, "token id")[start:stop])
        except ValueError as error:
            raise InputError.of(error, file=path, row=row) from error
    every = np.concatenate(tokens) if tokens else np.zeros(0, np.int64)
    lengths = np.asarray([len(some) for some in tokens], np.int64)
    try:
        return _imported(every.astype(np.int32), entries, lengths, vocab_size)
    except ValueError as error:
        raise InputError.of(error, file=path) from error


def check_capture(path: Path, columns: CaptureColumns) -> int:
    """Check the columns of a capture and their types, and return how many sequences it holds.

    Raises:
        ValueError: as ``read_capture``, for what the file's footer shows.
    """
    with _naming_what_is_no_parquet(path):
        schema = pq.read_schema(path)
        rows = int(pq.ParquetFile(path).metadata.num_rows)
    for name in columns.names:
        if name not in schema.names:
            raise InputError(f"{path} has no column {name!r}; it has {', '.join(schema.names)}", file=path)
        _check_type(path, schema.field(name), 1 if name == columns.ids else 2, floats=name == columns.top_logprobs)
    return rows


def _rows(path: Path, columns: list[str], rows: Sequence[int] | None) -> pa.Table:
    with _naming_what_is_no_parquet(path):
        if rows is None:
            return pq.read_table(path, columns=columns).combine_chunks()
        held = pq.ParquetFile(path).metadata.num_rows
        beyond = next((row for row in rows if row >= held), None)
        if beyond is not None:
            raise InputError(f"{path} has {held} rows, and row {beyond} is asked for", file=path)
        return ds.dataset(path, format="parquet").take(pa.array(rows, pa.int64()), columns=columns).combine_chunks()


@dataclass(frozen=True)
class _CapturedSequence:
    """A row of a capture. The lists at place t - ``shift`` describe token t."""

    row: int
    ids: list[int]
    top_ids: list[list[int] | None]
    top_logprobs: list[list[float] | None]
    masks: list[list[int]] | None
    shift: int
    first: int  # the first token that may have lists

    @classmethod
    def of(cls, row: int, columns: CaptureColumns, values: list[Any], shifted: bool) -> _CapturedSequence:
        """Raises InputError for null values, and lists of other lengths than the tokens."""
        for name, value in zip(columns.names, values, strict=True):
            if value is None:
                raise InputError(f"{name} is null")
        ids, top_ids, top_logprobs, *more = values
        masks = more[0] if more else None
        if None in ids:
            raise InputError(f"token {ids.index(None)} of {columns.ids} is null")
        if len(top_ids) != len(top_logprobs) or len(top_logprobs) not in {max(len(ids) - shifted, 0), len(ids)}:
            raise InputError(f"{len(ids)} tokens and {len(top_logprobs)} lists of log-probs ({len(top_ids)} of ids)")
        if masks is not None and [*map(_length, masks)] != [*map(_length, top_ids)]:
            raise InputError(f"{columns.mask} has other lengths than {columns.top_ids}")
        first = int(shifted)
        if len(top_ids) and top_logprobs[0] is None and top_ids[0] is None:
            if shifted:
                raise InputError(
                    "position 0: null, as in vLLM's prompt log-probs, where position t scores token t",
                    remedy="read it with shifted=False (`--no-shifted`)",
                )
            first = 1
        return cls(row, ids, top_ids, top_logprobs, masks, int(shifted), first)

    @property
    def stop(self) -> int:
        """The end of the tokens that may have lists."""
        return min(len(self.ids), len(self.top_ids) + self.shift)

    def is_masked(self, token: int) -> bool:
        return self.masks is not None and not any(self.masks[token - self.shift] or ())

    def span(self) -> tuple[int, int]:
        """Return first and end of the tokens that have lists."""
        there = [token for token in range(self.first, self.stop) if not self.is_masked(token)]
        if not there:
            return self.first, self.first
        start, stop = there[0], there[-1] + 1
        if len(there) < stop - start:
            hole = next(token for token in range(start, stop) if self.is_masked(token))
            raise InputError(
                f"position {hole - self.shift}: masked between positions that are not, and one response a sequence is "
                "read",
                remedy="split the sequence at it",
            )
        return start, stop

    def place_of(self, wanted: Wanted) -> tuple[int, int]:
        """Return first and end of a response's tokens."""
        start, stop = len(wanted.prompt), len(wanted.prompt) + len(wanted.response)
        tokens = [*wanted.prompt, *wanted.response]
        if self.ids[:stop] != tokens:
            other = next(
                (place for place, pair in enumerate(zip(self.ids, tokens, strict=False)) if len({*pair}) > 1), 0
            )
            raise InputError(
                f"it holds other tokens than prompt {wanted.prompt_id!r} and its response: {len(self.ids)} and "
                f"{len(tokens)}, of which number {other} is the first that differs",
                prompt=wanted.prompt_id,
            )
        unread = next(
            (token for token in range(start, stop) if not self.first <= token < self.stop or self.is_masked(token)),
            None,
        )
        if unread is not None:
            raise InputError(
                f"it has no log-probs of token {unread}, which prompt {wanted.prompt_id!r} is to be scored on",
                prompt=wanted.prompt_id,
            )
        return start, stop

    def position(self, token: int, vocab_size: int | None) -> _Position:
        place = token - self.shift
        ids, logprobs = self.top_ids[place], self.top_logprobs[place]
        if self.masks is not None and ids is not None and logprobs is not None and len(ids) == len(logprobs):
            kept = self.masks[place]
            ids = [one for one, keep in zip(ids, kept, strict=True) if keep]
            logprobs = [one for one, keep in zip(logprobs, kept, strict=True) if keep]
        return _position(self.row, place, ids, logprobs, vocab_size)


def _length(values: list[Any] | None) -> int:
    return 0 if values is None else len(values)


@contextmanager
def _naming_what_is_no_parquet(path: Path) -> Iterator[None]:
    """Turn Arrow's errors about a file's bytes into an error that names the file."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the system, which names the file
            raise
        raise InputError(
            f"{path} cannot be read as Parquet: {' '.join(str(error).split())[:300]}", file=path
        ) from error


@dataclass(frozen=True)
class _Position:
    """The entries of one position that have mass, in the listed order."""

    row: int
    place: int
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
        raise InputError(f"{path}: column {field.name!r} is {field.type}; it must hold {form}, of {numbers}", file=path)


def _ids(ids: list[int], vocab_size: int | None, what: str) -> NDArray[np.int64]:
    """Return ids as an array; ids outside the vocabulary are refused."""
    limit = 1 << 31 if vocab_size is None else vocab_size
    outside = next((one for one in ids if not 0 <= one < limit), None)
    if outside is not None:
        raise InputError(f"{what} {outside} is outside the vocabulary of {limit}")
    return np.asarray(ids, np.int64)


def _position(
    row: int, place: int, ids: list[int] | None, logprobs: list[float] | None, vocab_size: int | None
) -> _Position:
    where = f"position {place}"
    if ids is None or logprobs is None or None in ids or None in logprobs:
        raise InputError(f"{where}: null, and only the first position of a sequence may be")
    if len(ids) != len(logprobs):
        raise InputError(f"{where}: {len(ids)} ids and {len(logprobs)} log-probs")
    values = np.asarray(logprobs, np.float64)
    if not (values < np.inf).all():  # NaN is not either
        raise InputError(f"{where}: a log-prob is {'NaN' if np.isnan(values).any() else '+inf'}")
    kept = values >= LOGPROB_FLOOR  # ids beside -inf are often never written
    some = _ids([one for one, keep in zip(ids, kept, strict=True) if keep], vocab_size, f"{where}: id")
    values = values[kept]
    if not len(some):
        raise InputError(f"{where}: its top-k list is empty")
    distinct, counts = np.unique(some, return_counts=True)
    if len(distinct) < len(some):
        raise InputError(f"{where}: id {distinct[counts > 1][0]} is there twice")
    return _Position(row, place, some, values)


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
    probability = np.exp(np.minimum(flat, 99.0))  # finite: an infinite mass would equal the allowed one
    mass = np.bincount(row, probability, minlength=len(sizes))
    # An error of e in a log-prob l changes its probability p by p |l| e; rounding makes none of them positive.
    allowed = 1.0 + 1e-3 + error * np.bincount(row, probability * np.maximum(-flat, 0.0), minlength=len(sizes))
    heavy = np.flatnonzero(~(mass <= allowed))
    if len(heavy):
        entry, most = entries[heavy[0]], mass[heavy[0]]
        raise InputError(
            f"position {entry.place}: mass {most:.4f}", row=entry.row, remedy="check that these are log-probs"
        )
    whole = (sizes == vocab_size) & (mass >= 2.0 - allowed)  # no mass is outside: the difference from 1 is rounding
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
