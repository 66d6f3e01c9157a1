"""Statistics of rows that fit the processor's cache whole: vocabularies of a few thousand ids, on a CPU.

The same statistics as from ``LogitBlocks``. Torch does the matrix product and the exponentials, compiled loops
(``row_loops``) what follows, row by row; threads of Python's own take a chunk of rows each, with no barrier between
them, and neither torch nor the loops hold the interpreter's lock.

Letters: C rows of a chunk, V vocabulary, D hidden size, E stop ids, K* entries of all heads, X* extra ids.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eopd.stages.models.lm_head import LMHead
from eopd.stages.score import row_loops
from eopd.stages.score.draws import UInt64, uniforms
from eopd.stages.score.row_loops import Float32, Float64, Int32, Int64
from eopd.stages.score.token_batch import NotFinite, TokenBatch
from eopd.stages.score.token_statistics import TokenStatistics
from eopd.storage.teacher_record import LOGPROB_FLOOR, HeadRule

MOST_IDS = 4096
"""Up to this vocabulary whole rows are worked on; beyond it blocks of columns (``LogitBlocks``)."""
CHUNK_BYTES = 4 << 20
LEAST_ROWS = 256
"""Chunks with fewer rows would spend their time between the loops."""


class Buffers(threading.local):
    """Each thread's own, [rows, V], for chunk after chunk: what a thread frees goes back to the system, and comes again
    page fault by page fault, which takes longer than the matrix product."""

    def __init__(self, rows: int, vocabulary: int) -> None:
        self.logits, self.mass = torch.empty(rows, vocabulary), torch.empty(rows, vocabulary)


class WholeRows:
    """``rows(hidden, batch)`` gives the statistics of one chunk of at most ``rows.rows`` rows.

    Safe to call from several threads at once. ``chunk_rows`` is by cache where None.
    """

    def __init__(
        self,
        head: LMHead,  # float32, on the CPU
        rule: HeadRule,
        temperature: float,
        stop_ids: tuple[int, ...],
        chunk_rows: int | None = None,
    ) -> None:
        self.head, self.rule, self.temperature = head, rule, temperature
        self.rows = chunk_rows or max(16, CHUNK_BYTES // (4 * head.vocab_size))
        self._stop_ids = np.asarray(stop_ids, np.int64)
        self._buffers = Buffers(self.rows, head.vocab_size)

    def __call__(self, hidden: Tensor, batch: TokenBatch) -> TokenStatistics:
        """Of hidden [C, D]. Raises NotFinite."""
        logits, mass = self._relative(hidden)
        total, moment = row_loops.sums(logits, mass)
        lse = np.log(total)
        entropy = lse - moment / total
        bad = np.flatnonzero(~np.isfinite(entropy))
        if len(bad):
            raise NotFinite(int(bad[0]))
        sampled = self._at(logits, np.arange(len(logits)), batch.sampled_ids)
        extra_counts, extra_ids, extra = self._extra(logits, lse, batch)
        head_counts, head_ids, head_logprobs = self._heads(logits, lse, entropy)
        # what follows takes the head out of ``mass``
        drawn_first = self._full_draws(batch.keys, mass) if self.rule.draws == "full" else None
        tail = row_loops.take_out(mass, head_counts, head_ids)
        draw_counts, draw_ids = drawn_first or self._draws_beyond(batch.keys, mass, tail, total)
        with np.errstate(divide="ignore"):
            tail_logmass = np.log(tail / total)
        return TokenStatistics(
            token_ids=batch.sampled_ids.astype(np.int32),
            entropy=np.maximum(entropy, 0.0).astype(np.float32),
            sampled_logprob=_floored(sampled - lse),
            sampled_rank=row_loops.above(logits, sampled.astype(np.float32)),
            stop_logprobs=self._stops(logits, lse),
            tail_logmass=_floored(tail_logmass),
            head_counts=head_counts,
            head_ids=head_ids,
            head_logprobs=_floored(head_logprobs),
            draw_counts=draw_counts,
            draw_ids=draw_ids,
            extra_counts=extra_counts,
            extra_ids=extra_ids,
            extra_logprobs=extra,
        )

    def _relative(self, hidden: Tensor) -> tuple[Float32, Float32]:
        """Logits [C, V] at the temperature less the largest of their row, and their exponentials."""
        assert len(hidden) <= self.rows
        logits, mass = self._buffers.logits[: len(hidden)], self._buffers.mass[: len(hidden)]
        self.head.logits_into(logits, hidden, slice(0, self.head.vocab_size), self.temperature)
        logits -= logits.amax(1, keepdim=True)
        torch.exp(logits, out=mass)
        return logits.numpy(), mass.numpy()

    def _at(self, logits: Float32, rows: Int64, ids: Int64) -> Float64:
        """Logits at (row, id) pairs; -inf for ids that the vocabulary lacks."""
        vocabulary = self.head.vocab_size
        found = logits[rows, np.minimum(ids, vocabulary - 1)].astype(np.float64)
        return np.where(ids < vocabulary, found, -np.inf)

    def _stops(self, logits: Float32, lse: Float64) -> Float32:
        """[C, E]"""
        rows = np.arange(len(logits))[:, None]
        return _floored(self._at(logits, rows, self._stop_ids) - lse[:, None])

    def _extra(self, logits: Float32, lse: Float64, batch: TokenBatch) -> tuple[Int64, Int32, Float32]:
        if batch.extra_counts is None or batch.extra_ids is None:
            return np.zeros(len(logits), np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
        rows = np.repeat(np.arange(len(logits)), batch.extra_counts)
        logprobs = _floored(self._at(logits, rows, batch.extra_ids) - lse[rows])
        return batch.extra_counts, batch.extra_ids.astype(np.int32), logprobs

    def _heads(self, logits: Float32, lse: Float64, entropy: Float64) -> tuple[Int64, Int32, Float64]:
        """Sizes [C], ids [K*] and log-probs [K*]; of each row the most probable first."""
        k, least = min(self.rule.k_max, self.head.vocab_size), math.log(self.rule.min_prob)
        bounds = _lowest_from(least, lse)
        # as many reach a bound as exceed the number just below it
        counts = row_loops.above(logits, np.nextafter(bounds, np.float32(-np.inf))).clip(1, k).astype(np.int64)
        counts[entropy > self.rule.full_head_above] = k
        guesses = np.minimum(bounds, -1.0).view(np.uint32).astype(np.int64)
        entries = row_loops.largest(logits, counts, guesses, k)
        entries.sort(axis=1)
        return counts, *row_loops.heads(entries, counts, lse)

    def _draws_beyond(self, keys: UInt64, mass: Float32, tail: Float64, total: Float64) -> tuple[Int64, Int32]:
        """Systematic draws (``draws.py``) from what ``mass`` still holds."""
        if self.rule.draws == "none":
            return np.zeros(len(mass), np.int64), np.zeros(0, np.int32)
        uniform, weight = uniforms(keys, 1)[:, 0], self.rule.min_prob * total
        counts = np.maximum(np.ceil(tail / weight - uniform), 0.0).astype(np.int64)
        return counts, row_loops.systematic(mass, tail, weight, uniform, counts)

    def _full_draws(self, keys: UInt64, mass: Float32) -> tuple[Int64, Int32]:
        """``n_draws`` independent draws with replacement from the whole distribution."""
        number = self.rule.n_draws
        return np.full(len(mass), number), row_loops.independent(mass, uniforms(keys, number)).reshape(-1)


def _lowest_from(least: float, lse: Float64) -> Float32:
    """[C] the lowest logit whose log-prob is at least ``least`` (nats), which is that of ``logit - lse``."""
    bounds = (lse + least).astype(np.float32)
    return np.where(bounds - lse >= least, bounds, np.nextafter(bounds, np.float32(np.inf)))


def _floored(logprobs: NDArray[Any]) -> Float32:
    floored: Float32 = np.clip(logprobs, LOGPROB_FLOOR, 0.0).astype(np.float32)
    return floored
