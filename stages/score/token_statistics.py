"""The result of the statistics head: flat arrays of T tokens, and their conversion to the score record.

Letters: T tokens, E stop ids, K* head entries, N* draws, X* extra ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from eopd.storage.teacher_record import Float32, Int32, Int64, TeacherRows


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics as ``TeacherRows`` describes them, with counts per token in place of offsets."""

    token_ids: Int32  # [T]
    entropy: Float32  # [T]
    sampled_logprob: Float32  # [T]
    sampled_rank: Int32  # [T]
    stop_logprobs: Float32  # [T, E]
    tail_logmass: Float32  # [T]
    head_counts: Int64  # [T]
    head_ids: Int32  # [K*]
    head_logprobs: Float32  # [K*]
    draw_counts: Int64  # [T]
    draw_ids: Int32  # [N*]
    extra_counts: Int64  # [T]
    extra_ids: Int32  # [X*]
    extra_logprobs: Float32  # [X*]

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


_RAGGED = {
    "head_ids": "head_counts",
    "head_logprobs": "head_counts",
    "draw_ids": "draw_counts",
    "extra_ids": "extra_counts",
    "extra_logprobs": "extra_counts",
}


def empty(stops: int) -> TokenStatistics:
    """Return the statistics of no token."""
    ints, wide, floats = np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32)
    return TokenStatistics(
        token_ids=ints,
        entropy=floats,
        sampled_logprob=floats,
        sampled_rank=ints,
        stop_logprobs=np.zeros((0, stops), np.float32),
        tail_logmass=floats,
        head_counts=wide,
        head_ids=ints,
        head_logprobs=floats,
        draw_counts=wide,
        draw_ids=ints,
        extra_counts=wide,
        extra_ids=ints,
        extra_logprobs=floats,
    )


def concatenate(pieces: Sequence[TokenStatistics]) -> TokenStatistics:
    """Concatenate statistics, at least one."""
    if len(pieces) == 1:
        return pieces[0]
    names = [field.name for field in fields(TokenStatistics)]
    return TokenStatistics(**{name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in names})


def offsets_of(counts: Int64) -> Int64:
    """Turn counts [N] into offsets [N+1]."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def ranges(starts: Int64, counts: Int64) -> Int64:
    """Return the integers of [start, start + count) of each pair, one range after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    values: Int64 = np.arange(total) + np.repeat(starts - (ends - counts), counts)
    return values


def take(statistics: TokenStatistics, tokens: Int64) -> TokenStatistics:
    """Select the given tokens (numbers into T), in that order."""
    taken: dict[str, Any] = {}
    places: dict[str, Int64] = {}
    for name in {*_RAGGED.values()}:
        counts = getattr(statistics, name)
        starts = np.cumsum(counts) - counts
        places[name] = ranges(starts[tokens], counts[tokens])
    for field in fields(statistics):
        index = places[_RAGGED[field.name]] if field.name in _RAGGED else tokens
        taken[field.name] = getattr(statistics, field.name)[index]
    return TokenStatistics(**taken)


def in_response_order(
    statistics: TokenStatistics,
    order: Sequence[int],
    lengths: Sequence[int],
    stop_ids: Int32,
    responses: int,
) -> TeacherRows:
    """Build the record of responses 0 .. ``responses`` - 1 from statistics in packed order.

    Args:
        order: number of the response of each consecutive run of tokens; responses that it lacks get no rows.
        lengths: tokens of each run.
    """
    run_lengths = np.asarray(lengths, np.int64)
    numbers = np.asarray(order, np.int64)
    assert int(run_lengths.sum()) == statistics.tokens
    assert len(np.unique(numbers)) == len(numbers)
    by_number = np.argsort(numbers)
    starts = np.cumsum(run_lengths) - run_lengths
    sorted_statistics = take(statistics, ranges(starts[by_number], run_lengths[by_number]))
    counts = np.zeros(responses, np.int64)
    counts[numbers] = run_lengths
    return TeacherRows(
        response_offsets=offsets_of(counts),
        token_ids=sorted_statistics.token_ids,
        entropy=sorted_statistics.entropy,
        sampled_logprob=sorted_statistics.sampled_logprob,
        sampled_rank=sorted_statistics.sampled_rank,
        stop_ids=stop_ids,
        stop_logprobs=sorted_statistics.stop_logprobs,
        head_offsets=offsets_of(sorted_statistics.head_counts),
        head_ids=sorted_statistics.head_ids,
        head_logprobs=sorted_statistics.head_logprobs,
        tail_logmass=sorted_statistics.tail_logmass,
        draw_offsets=offsets_of(sorted_statistics.draw_counts),
        draw_ids=sorted_statistics.draw_ids,
        extra_offsets=offsets_of(sorted_statistics.extra_counts),
        extra_ids=sorted_statistics.extra_ids,
        extra_logprobs=sorted_statistics.extra_logprobs,
    )
