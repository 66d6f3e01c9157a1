"""Statistics of rows that fit the processor's cache whole: vocabularies of a few thousand ids, on a CPU.

The same statistics as from ``LogitBlocks``, in NumPy: its partial sort is several times faster than torch's top-k
here, and threads of Python's own take a chunk of rows each, with no barrier between them.

Letters: C rows of a chunk, V vocabulary, K head entries, N draws of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from eopd.stages.models.lm_head import LMHead
from eopd.stages.score.draws import UInt64, uniforms
from eopd.stages.score.token_batch import NotFinite, TokenBatch
from eopd.stages.score.token_statistics import TokenStatistics
from eopd.storage.teacher_record import LOGPROB_FLOOR, HeadRule

MOST_IDS = 4096
"""Up to this vocabulary whole rows are worked on; beyond it blocks of columns (``LogitBlocks``)."""
CHUNK_BYTES = 2 << 20
GROUP = 16
LAST = 1.0 - 2.0**-40
TINY = 1e-300

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class WholeRows:
    """``rows(hidden, batch)`` gives the statistics of one chunk; safe to call from several threads at once."""

    head: LMHead  # float32, on the CPU
    rule: HeadRule
    temperature: float
    stop_ids: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of a chunk."""
        return max(16, CHUNK_BYTES // (4 * self.head.vocab_size))

    def __call__(self, hidden: Tensor, batch: TokenBatch) -> TokenStatistics:
        """Of hidden [C, D]. Raises NotFinite."""
        logits = self._logits(hidden)
        values, ids = largest(logits, min(self.rule.k_max, self.head.vocab_size))
        with np.errstate(invalid="ignore"):
            logits -= values[:, :1]  # from here on relative to the row's largest
            values = values - values[:, :1]
            mass = torch.exp(torch.from_numpy(logits)).numpy()
            total = mass.sum(1).astype(np.float64)
            lse = np.log(total)
            entropy = lse - np.einsum("cv,cv->c", mass, logits) / total
        bad = np.flatnonzero(~np.isfinite(entropy))
        if len(bad):
            raise NotFinite(int(bad[0]))
        logprobs = values - lse[:, None]
        kept = self._kept(logprobs, entropy)
        sampled = self._at(logits, np.arange(len(logits)), batch.sampled_ids)
        extra_counts, extra_ids, extra = self._extra(logits, lse, batch)
        rank = self._rank(logits, sampled, batch.sampled_ids, values, ids)
        # what follows takes the head out of ``mass``
        drawn_first = self._full_draws(batch.keys, mass) if self.rule.draws == "full" else None
        tail = _without(mass, ids, kept)
        draw_counts, draw_ids = drawn_first or self._draws_beyond(batch.keys, mass, tail, total)
        with np.errstate(divide="ignore"):
            tail_logmass = np.log(tail / total)
        return TokenStatistics(
            token_ids=batch.sampled_ids.astype(np.int32),
            entropy=np.maximum(entropy, 0.0).astype(np.float32),
            sampled_logprob=_floored(sampled - lse),
            sampled_rank=rank.astype(np.int32),
            stop_logprobs=self._stops(logits, lse),
            tail_logmass=_floored(tail_logmass),
            head_counts=kept.sum(1),
            head_ids=ids[kept].astype(np.int32),
            head_logprobs=_floored(logprobs[kept]),
            draw_counts=draw_counts,
            draw_ids=draw_ids,
            extra_counts=extra_counts,
            extra_ids=extra_ids,
            extra_logprobs=extra,
        )

    def _logits(self, hidden: Tensor) -> Float32:
        """[C, V] divided by the temperature"""
        logits: Float32 = self.head.logits(hidden).numpy()
        if self.temperature != 1.0:
            logits /= self.temperature
        return logits

    def _at(self, logits: Float32, rows: Int64, ids: Int64) -> Float64:
        """Logits at (row, id) pairs; -inf for ids that the vocabulary lacks."""
        vocabulary = self.head.vocab_size
        found = logits[rows, np.minimum(ids, vocabulary - 1)].astype(np.float64)
        return np.where(ids < vocabulary, found, -np.inf)

    def _stops(self, logits: Float32, lse: Float64) -> Float32:
        """[C, E]"""
        rows, stops = np.arange(len(logits))[:, None], np.asarray(self.stop_ids, np.int64)[None, :]
        return _floored(self._at(logits, rows, stops) - lse[:, None])

    def _extra(self, logits: Float32, lse: Float64, batch: TokenBatch) -> tuple[Int64, NDArray[np.int32], Float32]:
        if batch.extra_counts is None or batch.extra_ids is None:
            return np.zeros(len(logits), np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
        rows = np.repeat(np.arange(len(logits)), batch.extra_counts)
        logprobs = _floored(self._at(logits, rows, batch.extra_ids) - lse[rows])
        return batch.extra_counts, batch.extra_ids.astype(np.int32), logprobs

    def _kept(self, logprobs: Float64, entropy: Float64) -> NDArray[np.bool_]:
        """[C, K] which of the top entries are in the head: a prefix of each row."""
        kept = logprobs >= math.log(self.rule.min_prob)
        kept[:, 0] = True
        kept[entropy > self.rule.full_head_above] = True
        return kept

    def _rank(
        self, logits: Float32, sampled: Float64, sampled_ids: Int64, values: Float32, ids: Int64
    ) -> NDArray[np.int64]:
        """[C] how many ids are more probable than the sampled one."""
        rank = (values > sampled[:, None]).sum(1)
        among = (ids == sampled_ids[:, None]).any(1)
        beyond = np.flatnonzero(~among & (rank == ids.shape[1]))
        rank[beyond] = _count_above(logits[beyond], sampled[beyond].astype(np.float32))
        return np.where(sampled_ids < self.head.vocab_size, rank, self.head.vocab_size)

    def _draws_beyond(
        self, keys: UInt64, mass: Float32, tail: Float64, total: Float64
    ) -> tuple[Int64, NDArray[np.int32]]:
        """Systematic draws (``draws.py``) from what ``mass`` still holds."""
        if self.rule.draws == "none":
            return np.zeros(len(mass), np.int64), np.zeros(0, np.int32)
        uniform, weight = uniforms(keys, 1)[:, 0], self.rule.min_prob * total
        counts = np.maximum(np.ceil(tail / weight - uniform), 0.0).astype(np.int64)
        rows = np.repeat(np.arange(len(mass)), counts)
        number = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        return counts, _ids_under(mass, rows, weight[rows] * (uniform[rows] + number))

    def _full_draws(self, keys: UInt64, mass: Float32) -> tuple[Int64, NDArray[np.int32]]:
        """``n_draws`` independent draws with replacement from the whole distribution."""
        counts = np.full(len(mass), self.rule.n_draws)
        points = uniforms(keys, self.rule.n_draws) * mass.sum(1, dtype=np.float64)[:, None]
        return counts, _ids_under(mass, np.repeat(np.arange(len(mass)), counts), points.reshape(-1))


def largest(logits: Float32, k: int) -> tuple[Float32, Int64]:
    """The k largest logits of each row, largest first, lower ids first among equals: (logits [C, k], ids [C, k])."""
    vocabulary = logits.shape[1]
    if k < vocabulary:
        ids = np.argpartition(logits, vocabulary - k, axis=1)[:, vocabulary - k :]
    else:
        ids = np.broadcast_to(np.arange(vocabulary), logits.shape)
    bits = np.take_along_axis(logits, ids, 1).view(np.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # float32 as integers that compare the same way
    keys = (ordered.astype(np.int64) << 32) | (vocabulary - 1 - ids)
    keys.sort(axis=1)
    ids = vocabulary - 1 - (keys[:, ::-1] & 0xFFFFFFFF)
    return np.take_along_axis(logits, ids, 1), ids


def _without(mass: Float32, ids: Int64, kept: NDArray[np.bool_]) -> Float64:
    """Take the head out of ``mass`` [C, V], in place; what is left of each row [C].

    Summed from the rest's own: 1 minus the head's mass would be rounding noise where the teacher is sure.
    """
    rows = np.repeat(np.arange(len(mass)), kept.sum(1))
    mass[rows, ids[kept]] = 0.0
    left: Float64 = mass.sum(1).astype(np.float64)
    return left


def _count_above(logits: Float32, bounds: Float32) -> Int64:
    """[N] how many of each row [N, V] exceed its bound [N]. Counted in float32: sums of booleans are slow."""
    above = torch.empty(logits.shape)
    torch.gt(torch.from_numpy(logits), torch.from_numpy(bounds)[:, None], out=above)
    return above.sum(1).long().numpy()


def _ids_under(mass: Float32, rows: Int64, points: Float64) -> NDArray[np.int32]:
    """Ids [N] in which points [N] of ``rows`` [N] lie when the masses of a row [C, V] are laid end to end.

    First among groups of neighbouring ids, of all rows at once: row r takes the interval [r, r + 1). Then in the
    group that was found.
    """
    groups = functional.pad(torch.from_numpy(mass), (0, -mass.shape[1] % GROUP)).view(len(mass), -1, GROUP)
    ends = groups.sum(2).double().cumsum(1).numpy()
    total = np.maximum(ends[:, -1], TINY)
    numbered = np.arange(len(mass))
    borders = np.append(0.0, (ends / total[:, None] + numbered[:, None]).reshape(-1))
    # rounding may put a point at the very end of its row, where nothing begins
    at = rows + np.minimum(points / total[rows], LAST)
    found = np.searchsorted(borders, at, side="right") - 1
    filled = groups.view(-1, GROUP)[torch.from_numpy(found)].double().cumsum(1).numpy()
    # and the same in its group
    within = np.minimum((at - borders[found]) * total[rows], filled[:, -1] * LAST)
    places = (filled <= within[:, None]).sum(1)
    ids: NDArray[np.int32] = (found % groups.shape[1] * GROUP + places).astype(np.int32)
    return ids


def _floored(logprobs: NDArray[Any]) -> Float32:
    floored: Float32 = np.clip(logprobs, LOGPROB_FLOOR, 0.0).astype(np.float32)
    return floored
