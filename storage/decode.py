"""The arrays of ``storage.codec`` -> TeacherRows.

Letters: S responses, T tokens, M entries.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eopd.storage import codec as quantise
from eopd.storage import codec as symbols
from eopd.storage.codec import (
    CODE_EXTRA,
    ENTROPY,
    ID_EXTRA,
    Integers,
    Layout,
    PartArrays,
    Planes,
    RawBits,
    draw_guess,
    tail_guess,
)
from eopd.storage.teacher_record import LOGPROB_FLOOR, Float32, Int64, TeacherRows, offsets_of, sums, take_ranges


def decode(arrays: PartArrays, layout: Layout) -> TeacherRows:
    """Invert ``storage.encode.encode``, up to the stated errors and the order of a token's draws (ascending).

    Raises:
        ValueError: the arrays contradict each other.
    """
    tokens, entries = arrays.responses.astype(np.int64).T
    response_offsets = offsets_of(tokens)
    raw = _raw_bytes(arrays.entries, entries)
    bits = RawBits(entries)
    column: dict[str, Integers] = {}
    for plane, (name, extra) in zip(arrays.tokens, layout.columns, strict=True):
        column[name] = _numbers(plane, extra, raw, bits, tokens)
    if len(column["head_size"]) and column["head_size"].min() < 1:
        raise ValueError("a token has no head")
    tail_codes = _tail_codes(column, arrays.tokens[ENTROPY])
    per_token = {
        "head": column["head_size"],
        "miss": (column["sampled"] == 0).astype(np.int64),
        "draw": symbols.unzigzag(column["draws"]) + draw_guess(tail_codes, layout.draw_weight),
        "extra": column["extras"],
    }
    ids = _Sections(
        [per_token["head"], 2 * per_token["miss"], per_token["draw"], per_token["extra"]], response_offsets, entries
    )
    codes = _Sections([per_token["head"] - 1, per_token["miss"], per_token["extra"]], response_offsets, entries)
    id_values = _numbers(ids.symbols(arrays.entries[0]), ID_EXTRA, raw, bits, ids.counts)
    code_values = _numbers(codes.symbols(arrays.entries[1]), CODE_EXTRA, raw, bits, codes.counts)

    head_ids, miss_ids, draw_deltas, extra_ids = ids.split(id_values)
    head_deltas, miss_codes, extra_codes = codes.split(code_values)
    offsets = {name: offsets_of(per_token[name]) for name in ("head", "draw", "extra")}
    head_logprobs, tail = _heads(column["top"], head_deltas, offsets["head"], tail_codes)
    sampled = _sampled(column["sampled"], offsets["head"], head_ids, head_logprobs, miss_ids, miss_codes)
    return TeacherRows(
        response_offsets=response_offsets,
        token_ids=sampled[0],
        entropy=quantise.decode_entropy(column["entropy"]),
        sampled_logprob=sampled[2],
        sampled_rank=sampled[1],
        stop_ids=np.asarray(layout.stop_ids, np.int32),
        stop_logprobs=_stops(column, len(layout.stop_ids), len(tail)),
        head_offsets=offsets["head"],
        head_ids=head_ids,
        head_logprobs=head_logprobs,
        tail_logmass=tail,
        draw_offsets=offsets["draw"],
        draw_ids=sums(draw_deltas, offsets["draw"]).astype(np.int32),
        extra_offsets=offsets["extra"],
        extra_ids=extra_ids,
        extra_logprobs=quantise.decode_logprob(extra_codes),
    )


def _raw_bytes(entries: Planes, counts: Int64) -> Planes:
    """Return the raw bits of the responses, one after the other, plus four bytes (``symbols.join``)."""
    ends = offsets_of(counts)
    pieces = [entries[2:, low:high].reshape(-1) for low, high in itertools.pairwise(ends)]
    return np.concatenate([*pieces, np.zeros(4, np.uint8)])


def _numbers(symbol: Planes, extra: int, raw: Planes, bits: RawBits, numbers: Int64) -> NDArray[np.int32]:
    counts = symbols.raw_counts(symbol, extra)
    return symbols.join(symbol, extra, raw, bits.place(counts, numbers))


def _tail_codes(column: dict[str, Integers], entropy: Planes) -> Integers:
    stored, top = column["tail"], column["top"]
    codes = np.where(top == 0, symbols.unzigzag(stored), stored) + tail_guess(entropy, top)
    if len(codes) and not (codes.min() >= 0 and codes.max() <= quantise.MAX_CODE):
        raise ValueError(f"tail codes run from {codes.min()} to {codes.max()}")
    return codes


class _Sections:
    """Sections of a stream of ``entries``: counts of each kind per response, and their positions."""

    def __init__(self, per_token: list[Integers], response_offsets: Int64, entries: Int64) -> None:
        most = entries.max(initial=0)
        if any(len(counts) and not 0 <= counts.min() <= counts.max() <= 2 * most for counts in per_token):
            raise ValueError(f"a token has fewer than 0 entries, or more than the {most} of its response")
        lengths = [np.diff(offsets_of(counts)[response_offsets]) for counts in per_token]
        self._lengths = np.stack(lengths, axis=1)  # [S, sections]
        self.counts = self._lengths.sum(axis=1)
        self._entries = entries
        if (self.counts > entries).any():
            raise ValueError("the columns of the tokens ask for more entries than their responses have")

    def symbols(self, plane: Planes) -> Planes:
        """Return the stream's symbols, without the padding of responses' entries."""
        return plane[take_ranges(offsets_of(self._entries)[:-1], self.counts)]

    def split(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """Return the numbers of each section, responses one after the other."""
        sections = self._lengths.shape[1]
        starts = offsets_of(self._lengths.reshape(-1))[:-1].reshape(-1, sections)
        return [values[take_ranges(starts[:, i], self._lengths[:, i])] for i in range(sections)]


def _heads(top: Integers, deltas: Integers, offsets: Int64, tail_codes: Integers) -> tuple[Float32, Float32]:
    first = offsets[:-1]
    stored = np.empty(int(offsets[-1]), np.int64)
    later = np.ones(len(stored), bool)
    later[first] = False
    stored[first] = top
    stored[later] = deltas
    codes = sums(stored, offsets)
    if len(codes) and codes.max() > quantise.MAX_CODE:
        raise ValueError(f"log-prob codes run up to {codes.max()}")
    return quantise.decode_rows(codes, offsets, tail_codes)


def _sampled(
    place: Integers,
    offsets: Int64,
    head_ids: Integers,
    head_logprobs: Float32,
    miss_ids: Integers,
    miss_codes: Integers,
) -> tuple[NDArray[np.int32], NDArray[np.int32], Float32]:
    """Return ids, ranks and log-probs of the sampled tokens, [T] each."""
    if not len(place):
        return np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)
    if (place > np.diff(offsets)).any():
        raise ValueError("a sampled token lies beyond the end of its head")
    at = offsets[:-1] + np.maximum(place - 1, 0)
    ids, logprobs = head_ids[at], head_logprobs[at]
    rank = (place - 1).astype(np.int32)
    miss = place == 0
    ids[miss], rank[miss] = miss_ids[0::2], miss_ids[1::2]
    logprobs[miss] = quantise.decode_logprob(miss_codes)
    return ids, rank, logprobs


def _stops(column: dict[str, Integers], stops: int, tokens: int) -> Float32:
    out = np.full((tokens, stops), LOGPROB_FLOOR, np.float32)
    for e in range(stops):
        code = column[f"stop_{e}"]
        out[:, e] = np.where(code > 0, quantise.decode_logprob(code - 1), np.float32(LOGPROB_FLOOR))
    return out
