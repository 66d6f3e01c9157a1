"""TeacherRows -> the arrays of ``storage.codec``.

Letters: S responses, T tokens, N numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eopd.storage import quantise, symbols
from eopd.storage.codec import (
    CODE_EXTRA,
    ID_EXTRA,
    MAX_ID,
    RAW_PLANES,
    STOP_FLOOR,
    Integers,
    Layout,
    PartArrays,
    Planes,
    RawBits,
    draw_guess,
    tail_guess,
)
from eopd.storage.ragged import differences, interleave, offsets_of, sort_rows, take_ranges
from eopd.storage.teacher_record import LOGPROB_FLOOR, Int64, TeacherRows

Section = tuple[Integers, Integers]
_Piece = tuple[symbols.Symbols, NDArray[np.uint8], NDArray[np.uint32]]


def encode(rows: TeacherRows, layout: Layout) -> PartArrays:
    """Encode rows of any number of responses.

    Raises:
        ValueError: a field has the wrong length, an id outside 0 .. 2^24 - 1, or values that are no distribution.
    """
    check(rows)
    fields = _Fields.of(rows, layout)
    ids, id_counts = _by_response(fields.ids, rows.response_offsets)
    codes, code_counts = _by_response(fields.codes, rows.response_offsets)
    columns = [(fields.columns[name], extra) for name, extra in layout.columns]
    pieces = [symbols.split(values, extra) for values, extra in [*columns, (ids, ID_EXTRA), (codes, CODE_EXTRA)]]

    tokens = np.diff(rows.response_offsets)
    numbers = np.stack([tokens] * len(columns) + [id_counts, code_counts])
    entries = np.maximum(id_counts, -(-_raw_bits(pieces, numbers) // (8 * RAW_PLANES)))
    raw = _packed(pieces, numbers, entries)
    ends = offsets_of(entries)
    planes = np.zeros((2 + RAW_PLANES, int(ends[-1])), np.uint8)
    planes[0, take_ranges(ends[:-1], id_counts)] = pieces[-2][0]
    planes[1, take_ranges(ends[:-1], code_counts)] = pieces[-1][0]
    for low, high in itertools.pairwise(ends):
        planes[2:, low:high] = raw[RAW_PLANES * low : RAW_PLANES * high].reshape(RAW_PLANES, high - low)
    return PartArrays(
        responses=np.stack([tokens, entries], axis=1).astype(np.uint32),
        tokens=np.stack([symbol for symbol, *_ in pieces[:-2]]),
        entries=planes,
    )


def _sampled_place(rows: TeacherRows) -> Int64:
    """[T] 1 + place of the sampled token in its head, or 0 where the head does not hold it."""
    if not rows.tokens:
        return np.zeros(0, np.int64)
    rank = rows.sampled_rank.astype(np.int64)
    at = rows.head_offsets[:-1] + rank
    inside = at < rows.head_offsets[1:]
    at = np.where(inside, at, 0)
    same = (rows.head_ids[at] == rows.token_ids) & (np.abs(rows.head_logprobs[at] - rows.sampled_logprob) < 1e-5)
    return np.where(inside & same, rank + 1, 0)


@dataclass(frozen=True)
class _Fields:
    """Everything that is stored, as whole numbers: a number a token, or a section (values, how many a token)."""

    columns: dict[str, Integers]
    ids: dict[str, Section]
    codes: dict[str, Section]

    @classmethod
    def of(cls, rows: TeacherRows, layout: Layout) -> _Fields:
        place = _sampled_place(rows)
        miss = place == 0
        head_codes, tail = quantise.encode_rows(rows.head_logprobs, rows.head_offsets, rows.tail_logmass)
        head, draws, extras = (
            np.diff(offsets) for offsets in (rows.head_offsets, rows.draw_offsets, rows.extra_offsets)
        )
        later = np.ones(len(head_codes), bool)
        later[rows.head_offsets[:-1]] = False
        top = head_codes[rows.head_offsets[:-1]]
        entropy = quantise.encode_entropy(rows.entropy)
        residual = tail - tail_guess(entropy, top)
        columns: dict[str, Integers] = {
            "head_size": head,
            "sampled": place,
            "draws": symbols.zigzag(draws - draw_guess(tail, layout.draw_weight)),
            "extras": extras,
            "entropy": entropy,
            "top": top,
            "tail": np.where(top == 0, symbols.zigzag(residual), residual),
        }
        columns |= {f"stop_{e}": code for e, code in enumerate(_stop_codes(rows).T)}
        ids = {
            "head_ids": (rows.head_ids, head),
            "miss_ids": (interleave(rows.token_ids[miss], rows.sampled_rank[miss]), 2 * miss),
            "draw_ids": (differences(sort_rows(rows.draw_ids, rows.draw_offsets), rows.draw_offsets), draws),
            "extra_ids": (rows.extra_ids, extras),
        }
        codes = {
            "head_logprobs": (differences(head_codes, rows.head_offsets)[later], head - 1),
            "miss_logprobs": (quantise.encode_logprob(rows.sampled_logprob[miss]), miss.astype(np.int64)),
            "extra_logprobs": (quantise.encode_logprob(rows.extra_logprobs), extras),
        }
        return cls(columns, ids, codes)


def streams(rows: TeacherRows, layout: Layout) -> Iterator[tuple[str, Integers, int]]:
    """Name, numbers and ``extra`` of every field as it is stored: what takes how much room."""
    fields = _Fields.of(rows, layout)
    for name, extra in layout.columns:
        yield name, fields.columns[name], extra
    for sections, extra in ((fields.ids, ID_EXTRA), (fields.codes, CODE_EXTRA)):
        for name, (values, _) in sections.items():
            yield name, values, extra


def _stop_codes(rows: TeacherRows) -> Integers:
    """[T, E] 0 where floored, else 1 + code"""
    last = np.zeros(rows.tokens, bool)
    filled = np.diff(rows.response_offsets) > 0
    last[rows.response_offsets[1:][filled] - 1] = True
    kept = (rows.stop_logprobs >= STOP_FLOOR) | last[:, None]
    return np.where(kept, quantise.encode_logprob(rows.stop_logprobs) + 1, 0)


def _by_response(sections: dict[str, Section], response_offsets: Int64) -> tuple[Integers, Int64]:
    """Sections as one stream, response by response; and numbers of each response [S]."""
    starts, lengths, base = [], [], 0
    for values, per_token in sections.values():
        offsets = offsets_of(per_token)[response_offsets]
        starts.append(offsets[:-1] + base)
        lengths.append(np.diff(offsets))
        base += len(values)
    per_response = np.stack(lengths, axis=1)
    order = take_ranges(np.stack(starts, axis=1).reshape(-1), per_response.reshape(-1))
    joined = np.concatenate([np.asarray(values, np.int64) for values, _ in sections.values()])
    return joined[order], per_response.sum(axis=1)


def _raw_bits(pieces: list[_Piece], numbers: Int64) -> Int64:
    """[S] raw bits of each response"""
    total = np.zeros(numbers.shape[1], np.int64)
    for (_, counts, _), per_response in zip(pieces, numbers, strict=True):
        total += np.diff(offsets_of(counts)[offsets_of(per_response)])
    return total


def _packed(pieces: list[_Piece], numbers: Int64, entries: Int64) -> Planes:
    bits = RawBits(entries)
    total = int(RAW_PLANES * entries.sum())
    words = symbols.empty_words(total)
    for (_, counts, raw), per_response in zip(pieces, numbers, strict=True):
        symbols.pack(words, raw, bits.place(counts, per_response), counts)
    return symbols.packed_bytes(words, total)


def check(rows: TeacherRows) -> None:
    """Raises ValueError where fields disagree in length, or hold what cannot be stored."""
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
