"""TeacherRows -> the arrays of ``storage.codec``.

Letters: S responses, T tokens, E stop ids, N numbers of a stream, K* head entries, M values of all rows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from eopd.storage import packing, symbols
from eopd.storage.balancing import encode_rows
from eopd.storage.codec import (
    CODE_EXTRA,
    ENTROPY_EXTRA,
    ID_EXTRA,
    MAX_ID,
    RAW_PLANES,
    STOP_FLOOR,
    Integers,
    Layout,
    PartArrays,
    draw_guess,
    tail_guess,
)
from eopd.storage.compiled import compiled
from eopd.storage.quantise import encode_entropy, encode_logprob
from eopd.storage.ragged import offsets_of
from eopd.storage.teacher_record import LOGPROB_FLOOR, Float32, Int32, Int64, TeacherRows


def encode(rows: TeacherRows, layout: Layout) -> PartArrays:
    """Encode rows of any number of responses.

    Raises:
        ValueError: a field has the wrong length, an id outside 0 .. 2^24 - 1, or values that are no distribution.
    """
    fields = Fields.of(rows, layout)
    bits = np.zeros(rows.responses, np.int64)
    for stream in fields.streams:
        packing.count(stream.values, stream.bounds, stream.extra, bits)
    ids = sum((np.diff(stream.bounds) for stream in fields.ids), np.zeros(rows.responses, np.int64))
    entries = np.maximum(ids, -(-bits // (8 * RAW_PLANES)))
    ends = offsets_of(entries)
    raw, bit = np.zeros(RAW_PLANES * ends[-1] + 4, np.uint8), 8 * RAW_PLANES * ends[:-1]

    tokens = np.empty((len(fields.columns), rows.tokens), np.uint8)
    for plane, column in zip(tokens, fields.columns, strict=True):
        packing.append(column.values, column.bounds, column.extra, plane, rows.response_offsets[:-1].copy(), raw, bit)
    planes = np.zeros((2 + RAW_PLANES, ends[-1]), np.uint8)
    for plane, streams in ((planes[0], fields.ids), (planes[1], fields.codes)):
        place = ends[:-1].copy()
        for stream in streams:
            packing.append(stream.values, stream.bounds, stream.extra, plane, place, raw, bit)
    for low, high in itertools.pairwise(ends):
        planes[2:, low:high] = raw[RAW_PLANES * low : RAW_PLANES * high].reshape(RAW_PLANES, high - low)
    return PartArrays(
        responses=np.stack([np.diff(rows.response_offsets), entries], axis=1).astype(np.uint32),
        tokens=tokens,
        entries=planes,
    )


class Stream:
    """The numbers of one field, response by response.

    Attributes:
        extra: bits after the leading one that join a symbol.
        values: [N] int32
        bounds: [S+1] those of response s are values[bounds[s] : bounds[s + 1]].
    """

    def __init__(self, name: str, extra: int, values: Integers, bounds: Int64) -> None:
        symbols.check(name, values, extra)
        self.name, self.extra, self.bounds = name, extra, bounds
        self.values: Int32 = np.ascontiguousarray(values, np.int32)


@dataclass(frozen=True)
class Fields:
    """All stored fields of rows as integers, in the order of their raw bits."""

    columns: list[Stream]  # a number a token
    ids: list[Stream]
    codes: list[Stream]

    @property
    def streams(self) -> list[Stream]:
        return [*self.columns, *self.ids, *self.codes]

    @classmethod
    def of(cls, rows: TeacherRows, layout: Layout) -> Fields:
        """Raises ValueError where rows cannot be stored (``encode``)."""
        check(rows)
        head_codes, tail = encode_rows(rows.head_logprobs, rows.head_offsets, rows.tail_logmass)
        top = head_codes[rows.head_offsets[:-1]]
        entropy = encode_entropy(rows.entropy)
        residual = tail - tail_guess(packing.symbols_of(entropy, ENTROPY_EXTRA), top)
        place = _sampled_places(
            rows.token_ids,
            rows.sampled_rank,
            rows.sampled_logprob,
            rows.head_offsets,
            rows.head_ids,
            rows.head_logprobs,
        )
        draws = np.diff(rows.draw_offsets)
        numbers: dict[str, Integers] = {
            "head_size": np.diff(rows.head_offsets),
            "sampled": place,
            "draws": symbols.zigzag(draws - draw_guess(tail, layout.draw_weight)),
            "extras": np.diff(rows.extra_offsets),
            "entropy": entropy,
            "top": top,
            "tail": np.where(top == 0, symbols.zigzag(residual), residual),
        }
        numbers |= {f"stop_{e}": code for e, code in enumerate(_stop_codes(rows).T)}
        at = rows.response_offsets
        miss = np.flatnonzero(place == 0)
        misses = np.searchsorted(miss, at)
        missed = np.stack([rows.token_ids[miss], rows.sampled_rank[miss]], axis=1).reshape(-1)
        head, drawn, extra = rows.head_offsets[at], rows.draw_offsets[at], rows.extra_offsets[at]
        return cls(
            columns=[Stream(name, extra, numbers[name], at) for name, extra in layout.columns],
            ids=[
                Stream("head_ids", ID_EXTRA, rows.head_ids, head),
                Stream("miss_ids", ID_EXTRA, missed, 2 * misses),
                Stream("draw_ids", ID_EXTRA, _sorted_steps(rows.draw_ids, rows.draw_offsets), drawn),
                Stream("extra_ids", ID_EXTRA, rows.extra_ids, extra),
            ],
            codes=[
                Stream("head_logprobs", CODE_EXTRA, _later_steps(head_codes, rows.head_offsets), head - at),
                Stream("miss_logprobs", CODE_EXTRA, encode_logprob(rows.sampled_logprob[miss]), misses),
                Stream("extra_logprobs", CODE_EXTRA, encode_logprob(rows.extra_logprobs), extra),
            ],
        )


@compiled
def _sampled_places(
    token_ids: Int32, ranks: Int32, logprobs: Float32, offsets: Int64, head_ids: Int32, head_logprobs: Float32
) -> Int32:
    """Return 1 + the sampled token's place in its head [T], or 0 if it is not in the head."""
    places = np.zeros(len(token_ids), np.int32)
    for t in range(len(token_ids)):
        at = offsets[t] + ranks[t]
        inside = at < offsets[t + 1]
        if inside and head_ids[at] == token_ids[t] and abs(head_logprobs[at] - logprobs[t]) < np.float32(1e-5):
            places[t] = ranks[t] + 1
    return places


@compiled
def _later_steps(codes: Int32, offsets: Int64) -> Int32:
    """Return, within each row, every code but the first minus the one before: [K* - T]."""
    steps = np.empty(len(codes) - (len(offsets) - 1), np.int32)
    for t in range(len(offsets) - 1):
        for i in range(offsets[t] + 1, offsets[t + 1]):
            steps[i - t - 1] = codes[i] - codes[i - 1]
    return steps


@compiled
def _sorted_steps(ids: Int32, offsets: Int64) -> Int32:
    """Return, within each row, sorted values: the first as it is, others minus the one before: [M]."""
    steps = ids.copy()
    for t in range(len(offsets) - 1):
        row = steps[offsets[t] : offsets[t + 1]]
        for i in range(1, len(row)):  # a few draws a row: nothing is faster than insertion
            inserted, at = row[i], i
            while at > 0 and row[at - 1] > inserted:
                row[at] = row[at - 1]
                at -= 1
            row[at] = inserted
        for i in range(len(row) - 1, 0, -1):
            row[i] -= row[i - 1]
    return steps


def _stop_codes(rows: TeacherRows) -> Integers:
    """Return 0 where floored, else 1 + code: [T, E]."""
    last = np.zeros(rows.tokens, bool)
    filled = np.diff(rows.response_offsets) > 0
    last[rows.response_offsets[1:][filled] - 1] = True
    kept = (rows.stop_logprobs >= STOP_FLOOR) | last[:, None]
    return np.where(kept, encode_logprob(rows.stop_logprobs) + 1, 0)


def check(rows: TeacherRows) -> None:
    """Raise ValueError if fields disagree in length or hold values that cannot be stored."""
    tokens = rows.tokens
    wanted = dict.fromkeys(("entropy", "sampled_logprob", "sampled_rank", "tail_logmass", "stop_logprobs"), tokens)
    wanted |= {f"{name}_offsets": tokens + 1 for name in ("head", "draw", "extra")}
    wanted |= {f"{name}_ids": int(getattr(rows, f"{name}_offsets")[-1]) for name in ("head", "draw", "extra")}
    wanted |= {f"{name}_logprobs": int(getattr(rows, f"{name}_offsets")[-1]) for name in ("head", "extra")}
    for name, count in wanted.items():
        if len(getattr(rows, name)) != count:
            raise ValueError(f"{name} has {len(getattr(rows, name))} entries where {count} belong")
    if int(rows.response_offsets[-1]) != tokens:
        raise ValueError(f"response_offsets end at {int(rows.response_offsets[-1])}; there are {tokens} tokens")
    for name in ("token_ids", "head_ids", "draw_ids", "extra_ids", "sampled_rank"):
        values = getattr(rows, name)
        if values.size and not (values.min() >= 0 and values.max() < MAX_ID):
            raise ValueError(f"{name} must be in 0 .. {MAX_ID - 1}, got {values.min()} .. {values.max()}")
    for name in ("sampled_logprob", "tail_logmass", "stop_logprobs", "extra_logprobs"):
        if not np.isfinite(getattr(rows, name)).all():
            raise ValueError(f"{name} holds values that are not finite; the floor is {LOGPROB_FLOOR}")
