"""TeacherRows -> the arrays of ``storage.codec``.

Letters: S responses, T tokens, E stop ids, N numbers of a stream, K* head entries, M values of all rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

from eopd.storage import codec as symbols
from eopd.storage import encode as packing
from eopd.storage.codec import (
    CODE_EXTRA,
    DERIVED_ABOVE,
    ENTROPY_EXTRA,
    ID_EXTRA,
    MAX_CODE,
    MAX_ID,
    NORMALISATION_TOLERANCE,
    RAW_PLANES,
    STEPS_PER_NAT,
    STOP_FLOOR,
    Codes,
    Integers,
    Layout,
    PartArrays,
    Symbols,
    draw_guess,
    encode_entropy,
    encode_logprob,
    tail_guess,
)
from eopd.storage.teacher_record import LOGPROB_FLOOR, Float32, Int32, Int64, TeacherRows, offsets_of

# -- compilation ------------------------------------------------------------------------------------------------------

# Numba-compiled loops, for work that NumPy would need one pass over memory per step for.
#
# A module that uses this takes half a second to import: import it where the work is done, not where commands are
# parsed. Numba keeps compiled code beside the source, or in the user's cache folder where that is read-only, and
# looks at the age of a loop's own file only: loops that call each other belong into one file.


Loop = TypeVar("Loop", bound=Callable[..., Any])


def compiled(loop: Loop) -> Loop:
    """Compile ``loop`` on its first call with arguments of these types; it runs without the interpreter's lock.

    Arithmetic follows NumPy (no error on division by zero) and the order in which it is written.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(loop)
    except RuntimeError:  # no folder to cache it in: compiled again in every process
        return numba.njit(**options)(loop)


# -- balancing --------------------------------------------------------------------------------------------------------

# Heads and tails of tokens as codes (``storage.codec``): checked, and rounded so that their errors cancel.
#
# Letters: T tokens, K* head entries of all tokens, M entries of one row: its head and its tail.


Float64 = NDArray[np.float64]


def encode_rows(head: Float32, offsets: Int64, tail: Float32) -> tuple[Codes, Codes]:
    """Quantise heads [K*] of rows ``offsets`` [T+1] together with their tail masses [T].

    Returns:
        codes [K*] (0 as a row's first: derived) and tail codes [T].

    Raises:
        ValueError: a row is empty, not sorted, above zero, or does not sum to one.
    """
    _check_heads(head, offsets)
    mass, tail_mass = _mass(head), _mass(tail)
    _check_sums(mass, offsets, tail_mass)
    codes, tail_codes = np.empty(len(head), np.int32), np.empty(len(tail), np.int32)
    room = np.empty((4, int(np.diff(offsets).max(initial=0)) + 1))
    _encode_rows(head, mass, offsets, tail, tail_mass, codes, tail_codes, room)
    return codes, tail_codes


def _mass(logprob: Float32) -> Float64:
    return np.where(logprob > LOGPROB_FLOOR, np.exp(logprob.astype(np.float64)), 0.0)


def _check_heads(head: Float32, offsets: Int64) -> None:
    sizes = np.diff(offsets)
    if len(sizes) and sizes.min() < 1:
        raise ValueError(f"token {int(np.argmin(sizes))} has an empty head; every token keeps at least one entry")
    if head.size and not (np.isfinite(head).all() and head.max() < 1e-4):
        raise ValueError(f"head log-probs must be finite and at most 0, got {head.min()} .. {head.max()}")
    rising = np.diff(head) > 1e-6
    rising[offsets[1:-1] - 1] = False
    if rising.any():
        token = int(np.searchsorted(offsets, np.flatnonzero(rising)[0], "right")) - 1
        raise ValueError(f"the head of token {token} is not sorted, most probable first")


def _check_sums(mass: Float64, offsets: Int64, tail_mass: Float64) -> None:
    total = np.add.reduceat(mass, offsets[:-1]) + tail_mass if len(tail_mass) else tail_mass
    wrong = np.abs(total - 1.0) > NORMALISATION_TOLERANCE
    if wrong.any():
        token = int(np.argmax(wrong))
        raise ValueError(f"head and tail of token {token} sum to {total[token]:.6f}, not 1")


@compiled
def _encode_rows(
    head: Float32,
    mass: Float64,
    offsets: Int64,
    tail: Float32,
    tail_mass: Float64,
    codes: Codes,
    tail_codes: Codes,
    room: Float64,
) -> None:
    """Fill ``codes`` [K*] and ``tail_codes`` [T]; the masses are those of the log-probs, ``room`` is [4, largest M]."""
    scaled, weights, changes, gains = room[0], room[1], room[2], room[3]
    for t in range(len(tail)):
        low, high = offsets[t], offsets[t + 1]
        entries = high - low + 1
        derived = mass[low] >= DERIVED_ABOVE
        shift = 0.0
        if not derived:
            total = tail_mass[t]
            for i in range(low, high):
                total += mass[i]
            for i in range(low, high):
                scaled[i - low] = np.float64(head[i]) * STEPS_PER_NAT
                weights[i - low] = mass[i] / total
            scaled[entries - 1] = np.float64(tail[t]) * STEPS_PER_NAT
            weights[entries - 1] = tail_mass[t] / total
            shift = balancing_offset(scaled[:entries], weights[:entries], changes, gains)
        for i in range(low, high):
            codes[i] = _code(head[i], shift)
        if derived:
            codes[low] = 0
        tail_codes[t] = _code(tail[t], shift) if tail_mass[t] > 0.0 else MAX_CODE


@compiled
def _code(logprob: float, shift: float) -> int:
    return int(min(max(-np.rint(np.float64(logprob) * STEPS_PER_NAT + shift), 0.0), MAX_CODE))


@compiled
def balancing_offset(scaled: Float64, weights: Float64, changes: Float64, gains: Float64) -> float:
    """Return the o in [0, 1] for which sum_i w_i (round(x_i + o) - x_i - o) = 0.

    Args:
        scaled: [M] log-probs x in steps; overwritten.
        weights: [M] probabilities w that sum to 1.
        changes, gains: room for M numbers each: the offsets at which entries change their code, ascending, and the
            weight of each.
    """
    base = 0.0
    for i in range(len(scaled)):
        rounded = np.rint(scaled[i])
        base += weights[i] * (rounded - scaled[i])
        change = rounded + 0.5 - scaled[i]
        scaled[i] = change if change < 1.0 else 0.0
    for i in range(len(scaled)):
        place = 0  # rows are short: counting what comes before is faster than sorting
        for j in range(i):
            place += scaled[j] <= scaled[i]
        for j in range(i + 1, len(scaled)):
            place += scaled[j] < scaled[i]
        changes[place], gains[place] = scaled[i], weights[i]
    # from one change to the next the mean error is base + gained - o: of its zeros, take the one furthest inside
    best, outside = 0.0, np.inf
    start, gained = 0.0, 0.0
    for i in range(len(scaled) + 1):
        end = changes[i] if i < len(scaled) else 1.0
        zero = base + gained
        if max(start - zero, zero - end) < outside:
            outside = max(start - zero, zero - end)
            best = min(max(zero, start), end)
        start = end
        gained += gains[i] if i < len(scaled) else 0.0
    return best


# -- rows to arrays ---------------------------------------------------------------------------------------------------


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


# -- packing ----------------------------------------------------------------------------------------------------------

# Packing of integers into symbols and raw bits (``storage.codec``), by response; ``symbols.join`` is the inverse.
#
# Letters: S responses, N numbers.


@compiled
def _raw_count(value: int, extra: int) -> int:
    # a float's exponent is the place of the leading one; up to 2^24 every whole number is a float32
    leading = int(np.float32(value).view(np.int32) >> 23) - 127
    return max(leading - extra, 0)


@compiled
def symbols_of(values: Int32, extra: int) -> Symbols:
    """[N]"""
    symbols = np.empty(len(values), np.uint8)
    for i in range(len(values)):
        count = _raw_count(values[i], extra)
        symbols[i] = (count << extra) + (values[i] >> count)
    return symbols


@compiled
def count(values: Int32, bounds: Int64, extra: int, bits: Int64) -> None:
    """Add to ``bits`` [S] the raw bits that each response's numbers need; arguments as for ``append``."""
    for s in range(len(bits)):
        total = 0
        for i in range(bounds[s], bounds[s + 1]):
            total += _raw_count(values[i], extra)
        bits[s] += total


@compiled
def append(
    values: Int32, bounds: Int64, extra: int, plane: Symbols, place: Int64, raw: NDArray[np.uint8], bit: Int64
) -> None:
    """Append the numbers of each response to its symbols and to its raw bits.

    Args:
        values: [N] numbers from 0 to below ``symbols.largest(extra)``.
        bounds: [S+1] the numbers of response s are values[bounds[s] : bounds[s + 1]].
        extra: bits after the leading one that join a symbol.
        plane: symbols; the next one of response s belongs to plane[place[s]].
        place: [S] moved on.
        raw: packed bits, lowest first, zero where nothing was appended; four bytes at its end belong to nobody.
        bit: [S] number of each response's next bit in ``raw``; moved on.
    """
    for s in range(len(place)):
        to, at = place[s], bit[s]
        for i in range(bounds[s], bounds[s + 1]):
            count = _raw_count(values[i], extra)
            plane[to] = (count << extra) + (values[i] >> count)
            shifted = (values[i] & ((1 << count) - 1)) << (at & 7)  # at most 24 + 7 bits
            for byte in range(4):
                raw[(at >> 3) + byte] |= (shifted >> (8 * byte)) & 255
            to, at = to + 1, at + count
        place[s], bit[s] = to, at
