"""The score record: the teacher's decoded statistics for every response token.

Produced by ``stages.score``; read by ``stages.train``, ``stages.report`` and the `eopd store` commands.
On disk it is encoded by ``storage.codec`` and found by ``storage.teacher_cache``.

Letters: S responses, T scored response tokens, E stop ids, K* head entries, N* draws, X* extra ids.
Logs are natural (nats).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from eopd.storage.errors import InputError

LOGPROB_FLOOR = -50.0
"""Log-probs and log-masses are never stored below this (nats): exp(-50) is 0 to every consumer, and finite."""

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]

DrawMode = Literal["none", "beyond_head", "full"]


@dataclass(frozen=True)
class HeadRule:
    """Rule for which entries of the teacher's distribution are stored for each token.

    The head of a token is its ``k_max`` most probable ids where entropy > ``full_head_above``; elsewhere those
    with p >= ``min_prob``, at least one and at most ``k_max``. ``full_head_above = -1`` is a fixed top-k.
    Draws ``beyond_head`` sample the rest systematically, each draw of weight ``min_prob``, repeats kept; draws
    ``full`` are ``n_draws`` ids with replacement from the whole distribution (sampled KD).
    """

    k_max: int = 16
    min_prob: float = 0.03
    full_head_above: float = 0.4
    draws: DrawMode = "beyond_head"
    n_draws: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.k_max < 1:
            raise ValueError(f"head.k_max must be at least 1, got {self.k_max}")
        if not 0.0 < self.min_prob <= 1.0:
            raise ValueError(f"head.min_prob must be in (0, 1], got {self.min_prob}")
        if (self.draws == "full") != (self.n_draws > 0):
            problem = f"n_draws is {self.n_draws}, and draws is {self.draws!r}"
            raise InputError(problem, setting="n_draws", remedy="set n_draws with draws: full, and only then")


@dataclass(frozen=True)
class TeacherRows:
    """Teacher statistics of S responses, T tokens in all, in the order of the request.

    A response longer than the teacher could read has fewer rows here than tokens: the first ones.
    """

    response_offsets: Int64  # [S+1] rows of response s are [offsets[s], offsets[s+1])
    token_ids: Int32  # [T] as sampled by the student
    entropy: Float32  # [T] over the full vocabulary, nats
    sampled_logprob: Float32  # [T]
    sampled_rank: Int32  # [T] 0 is the most probable
    stop_ids: Int32  # [E] union of both models' stop ids, ascending
    stop_logprobs: Float32  # [T, E] floored at LOGPROB_FLOOR
    head_offsets: Int64  # [T+1]
    head_ids: Int32  # [K*] most probable first
    head_logprobs: Float32  # [K*] true full-vocabulary log-probs
    tail_logmass: Float32  # [T] log of the mass outside the head
    draw_offsets: Int64  # [T+1]
    draw_ids: Int32  # [N*] repeats kept
    extra_offsets: Int64  # [T+1]
    extra_ids: Int32  # [X*] ids the caller named (the student's own top-k), empty when none
    extra_logprobs: Float32  # [X*]

    @classmethod
    def without_responses(cls, stop_ids: Sequence[int]) -> TeacherRows:
        """Return rows without any response."""
        ids, logs, offsets = np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(1, np.int64)
        return cls(
            response_offsets=offsets,
            token_ids=ids,
            entropy=logs,
            sampled_logprob=logs,
            sampled_rank=ids,
            stop_ids=np.asarray(stop_ids, np.int32),
            stop_logprobs=np.zeros((0, len(stop_ids)), np.float32),
            head_offsets=offsets,
            head_ids=ids,
            head_logprobs=logs,
            tail_logmass=logs,
            draw_offsets=offsets,
            draw_ids=ids,
            extra_offsets=offsets,
            extra_ids=ids,
            extra_logprobs=logs,
        )

    @classmethod
    def unscored(cls, responses: Sequence[Sequence[int]]) -> TeacherRows:
        """Rows of tokens that no teacher has scored: NaN, and heads without entries."""
        tokens = sum(map(len, responses))
        nothing = cls.without_responses(())
        return replace(
            nothing,
            response_offsets=np.cumsum([0, *map(len, responses)]).astype(np.int64),
            token_ids=np.fromiter((token for ids in responses for token in ids), np.int32, tokens),
            entropy=np.full(tokens, np.nan, np.float32),
            sampled_logprob=np.full(tokens, np.nan, np.float32),
            sampled_rank=np.zeros(tokens, np.int32),
            stop_logprobs=np.zeros((tokens, 0), np.float32),
            tail_logmass=np.zeros(tokens, np.float32),
            head_offsets=np.zeros(tokens + 1, np.int64),
            draw_offsets=np.zeros(tokens + 1, np.int64),
            extra_offsets=np.zeros(tokens + 1, np.int64),
        )

    @property
    def responses(self) -> int:
        return len(self.response_offsets) - 1

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


# -- ragged -----------------------------------------------------------------------------------------------------------

# Ragged rows as flat arrays and offsets.
#
# Letters: N rows, M values of all rows.


def offsets_of(counts: NDArray[Any]) -> Int64:
    """Turn counts [N] into offsets [N+1]."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(np.asarray(counts, np.int64), out=offsets[1:])  # cast first: a sum that casts is three times slower
    return offsets


def sums(deltas: NDArray[Any], offsets: Int64) -> Int64:
    """Return, within each row, the running sum of the deltas: [M]."""
    total = np.cumsum(deltas, dtype=np.int64)
    starts = offsets[:-1]
    before = np.where(starts > 0, total[starts - 1], 0) if len(total) else np.zeros(len(starts), np.int64)
    return total - np.repeat(before, np.diff(offsets))


def take_ranges(starts: Int64, counts: NDArray[Any]) -> Int64:
    """Return the indices of the ranges [start, start + count), one after the other."""
    ends = offsets_of(counts)
    return np.arange(ends[-1]) + np.repeat(starts - ends[:-1], counts)
