"""The statistics head: hidden states in, exact statistics of the teacher's distribution out (docs/format.md).

    head = StatisticsHead(lm_head, HeadRule(), temperature=1.0, stop_ids=(2,))
    statistics = head(hidden, TokenBatch(sampled_ids, keys))

No [T, V] tensor exists: rows are processed in chunks, so memory does not grow with T. Everything is float32 or better
whatever the model's dtype. Letters: T tokens, C rows of a chunk, V vocabulary, D hidden size, K head entries, E stop
ids, X* extra ids.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eopd.stages.memory import score_rows
from eopd.stages.models.lm_head import LMHead
from eopd.stages.models.transfer import copied_at_once
from eopd.stages.score.token_statistics import (
    GROUP,
    LogitBlocks,
    NotFinite,
    TokenBatch,
    TokenStatistics,
    UInt64,
    concatenate,
    empty,
    ids_at,
    systematic_points,
    uniforms,
)
from eopd.storage.teacher_record import LOGPROB_FLOOR, HeadRule

# -- block rows -------------------------------------------------------------------------------------------------------

# Row statistics computed block by block of the vocabulary, for any vocabulary and device.
#
# Letters: T tokens, C rows of a chunk, V vocabulary, D hidden size, K head entries, E stop ids, X* extra ids.


CPU_BLOCK_BYTES = 4 << 20


class BlockRows:
    """``rows(hidden, batch)`` gives the statistics of one chunk of at most ``rows.rows`` rows.

    Buffers are reused between chunks. ``chunk_rows`` and ``block`` are by memory and cache where None.
    """

    def __init__(
        self,
        head: LMHead,
        rule: HeadRule,
        temperature: float,
        stop_ids: tuple[int, ...],
        chunk_rows: int | None = None,
        block: int | None = None,
    ) -> None:
        device = head.weight.device
        self.head, self.rule = head, rule
        self.rows, block = _layout(head.vocab_size, device.type == "cpu", chunk_rows, block)
        self._blocks = LogitBlocks(head, temperature, self.rows, block)
        self._stops = torch.tensor(stop_ids, dtype=torch.int64, device=device)

    def __call__(self, hidden: Tensor, batch: TokenBatch) -> TokenStatistics:
        """Compute the statistics of hidden [C, D]. Raises NotFinite."""
        blocks, device = self._blocks, hidden.device
        blocks.compute(hidden)
        bad = (~torch.isfinite(blocks.entropy)).nonzero()
        if len(bad):
            raise NotFinite(int(bad[0]))
        sampled = torch.as_tensor(batch.sampled_ids, device=device)
        rows = torch.arange(blocks.count, device=device)
        sampled_logit = self._logits_at(rows, sampled)
        stops = self._logprobs(self._logits_at(rows[:, None], self._stops[None, :]), blocks.lse[:, None])
        extra_counts, extra_ids, extra = self._extra(batch)
        values, ids = blocks.top(min(self.rule.k_max, self.head.vocab_size))
        logprobs = values.double() - blocks.lse[:, None]
        kept = self._kept(logprobs)
        rank = self._rank(sampled_logit, sampled, values, ids)
        # what follows takes the head out of the blocks
        drawn_first = self._full_draws(batch.keys) if self.rule.draws == "full" else None
        head_rows, places = kept.nonzero(as_tuple=True)
        head_ids = ids[head_rows, places]
        tail, group_mass = self._tail(head_rows, head_ids)
        draw_counts, draw_ids = drawn_first or self._draws_beyond(batch.keys, tail, group_mass)
        floor = LOGPROB_FLOOR
        arrays = _arrays(
            entropy=blocks.entropy.clamp(min=0.0).float(),
            sampled_logprob=self._logprobs(sampled_logit, blocks.lse),
            sampled_rank=rank.int(),
            stop_logprobs=stops,
            tail_logmass=(tail / blocks.total).log().clamp(min=floor, max=0.0).float(),
            head_counts=kept.sum(1),
            head_ids=head_ids.int(),
            head_logprobs=logprobs[head_rows, places].clamp(min=floor, max=0.0).float(),
            draw_counts=draw_counts,
            draw_ids=draw_ids.int(),
            extra_logprobs=extra,
        )
        return TokenStatistics(
            token_ids=batch.sampled_ids.astype(np.int32),
            extra_counts=extra_counts,
            extra_ids=extra_ids.astype(np.int32),
            **arrays,
        )

    def _logits_at(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return logits at (row, id), broadcast; -inf for ids beyond the vocabulary."""
        known = ids < self.head.vocab_size
        logits = self._blocks.at(rows, ids.clamp(max=self.head.vocab_size - 1))
        return torch.where(known, logits, -math.inf)

    def _logprobs(self, logits: Tensor, lse: Tensor) -> Tensor:
        return (logits.double() - lse).clamp_(min=LOGPROB_FLOOR, max=0.0).float()

    def _kept(self, logprobs: Tensor) -> Tensor:
        """Return which of the top entries are in the head, a prefix of each row: [C, K]."""
        kept = logprobs >= math.log(self.rule.min_prob)
        kept[:, 0] = True
        return kept | (self._blocks.entropy > self.rule.full_head_above)[:, None]

    def _rank(self, logit: Tensor, ids: Tensor, top_values: Tensor, top_ids: Tensor) -> Tensor:
        """Return how many ids are more probable than the sampled one: [C]."""
        blocks, vocabulary = self._blocks, self.head.vocab_size
        among = top_ids == ids[:, None]
        rank = (top_values > logit[:, None]).sum(1)
        beyond = (~among.any(1) & (rank == top_ids.shape[1])).nonzero()[:, 0]
        if len(beyond):
            rank[beyond] = blocks.count_above(beyond, logit[beyond])
        return torch.where(ids < vocabulary, rank, vocabulary)

    def _extra(self, batch: TokenBatch) -> tuple[NDArray[np.int64], NDArray[np.int64], Tensor]:
        device = self.head.weight.device
        if batch.extra_counts is None or batch.extra_ids is None:
            return np.zeros(self._blocks.count, np.int64), np.zeros(0, np.int64), torch.zeros(0, device=device)
        rows = torch.repeat_interleave(torch.as_tensor(batch.extra_counts, device=device))
        logits = self._logits_at(rows, torch.as_tensor(batch.extra_ids, device=device))
        return batch.extra_counts, batch.extra_ids, self._logprobs(logits, self._blocks.lse[rows])

    def _tail(self, rows: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
        """Blank the head (ids ``taken`` of ``rows``), and return the mass of the rest [C], and by group [C, G].

        Both float64, in units of exp(z - m).

        Summed from the rest's own logits: 1 minus the head's mass would be rounding noise where the teacher is sure.
        """
        blocks = self._blocks
        mass = blocks.group_sum.double()
        blocks.blank(rows, taken)
        touched = torch.zeros_like(mass, dtype=torch.bool)
        touched[rows, taken // GROUP] = True
        rows, groups = touched.nonzero(as_tuple=True)
        left = blocks.in_groups(rows, groups).sub_(blocks.maximum[rows, None]).exp_()
        mass[rows, groups] = left.sum(1, dtype=torch.float64)
        return mass.sum(1), mass

    def _draws_beyond(self, keys: UInt64, tail: Tensor, group_mass: Tensor) -> tuple[Tensor, Tensor]:
        if self.rule.draws == "none":
            nothing = torch.zeros(len(tail), dtype=torch.int64, device=tail.device)
            return nothing, nothing[:0]
        uniform = torch.as_tensor(uniforms(keys, 1)[:, 0], device=tail.device)
        points, counts = systematic_points(uniform, tail, self.rule.min_prob * self._blocks.total)
        return counts, ids_at(self._blocks, group_mass, points, counts)

    def _full_draws(self, keys: UInt64) -> tuple[Tensor, Tensor]:
        """Make ``n_draws`` independent draws with replacement from the whole distribution."""
        mass = self._blocks.group_sum.double()
        points = torch.as_tensor(uniforms(keys, self.rule.n_draws), device=mass.device) * mass.sum(1)[:, None]
        counts = torch.full((len(mass),), self.rule.n_draws, device=mass.device)
        return counts, ids_at(self._blocks, mass, points, counts)


def _layout(vocabulary: int, on_cpu: bool, chunk_rows: int | None, block: int | None) -> tuple[int, int]:
    """Return rows per chunk and columns per block. On a CPU a chunk's block fits the cache; a GPU takes whole rows."""
    padded = -(-vocabulary // GROUP) * GROUP
    if chunk_rows is None:
        chunk_rows = score_rows(vocabulary, on_gpu=not on_cpu)
    if block is None:
        block = max(512, CPU_BLOCK_BYTES // (4 * chunk_rows)) if on_cpu else padded
    assert chunk_rows > 0
    return chunk_rows, min(-(-block // GROUP) * GROUP, padded)


def _arrays(**tensors: Tensor) -> dict[str, NDArray[Any]]:
    """Return tensors as arrays, from a GPU in one copy."""
    values = list(tensors.values())
    if values[0].device.type != "cpu":
        values = copied_at_once(values, "cpu")
    return {name: value.numpy() for name, value in zip(tensors, values, strict=True)}


# -- the statistics head ----------------------------------------------------------------------------------------------


class StatisticsHead:
    """Statistics of a teacher's next-token distributions at one temperature.

    Args:
        head: the LM head. On a CPU low-precision weights are turned into float32 once, here.
        temperature: logits are divided by it; positive.
        stop_ids: ids whose log-probs every token gets, ascending.
        chunk_rows, block: how many rows are worked on at once, and columns of a large vocabulary (None: by memory and
            cache).
    """

    def __init__(
        self,
        head: LMHead,
        rule: HeadRule,
        *,
        temperature: float = 1.0,
        stop_ids: tuple[int, ...] = (),
        chunk_rows: int | None = None,
        block: int | None = None,
    ) -> None:
        if not temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self._on_cpu = head.weight.device.type == "cpu"
        self.head = head.float() if self._on_cpu else head
        self.stop_ids = stop_ids
        self._rows = BlockRows(self.head, rule, temperature, stop_ids, chunk_rows, block)

    @torch.inference_mode()
    def __call__(self, hidden: Tensor, batch: TokenBatch) -> TokenStatistics:
        """Compute statistics of T tokens from hidden [T, D], on the head's device.

        Ids that the teacher's vocabulary lacks have probability 0: log-prob LOGPROB_FLOOR and rank V.

        Raises:
            NotFinite: logits of a row are NaN or infinite.
        """
        assert hidden.shape[0] == len(batch.sampled_ids) == len(batch.keys)
        hidden = self._taken(hidden)
        chunks = batch.chunks(self._rows.rows)
        pieces = [self._statistics(start, hidden, part) for start, part in chunks]
        return concatenate(pieces) if pieces else empty(len(self.stop_ids))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [T, V] float32 at temperature 1 of a few tokens: the product that their statistics are made
        from."""
        hidden = self._taken(hidden)
        logits = torch.empty(len(hidden), self.head.vocab_size, device=hidden.device)
        self.head.logits_into(logits, hidden, slice(0, self.head.vocab_size), 1.0)
        return logits

    def _taken(self, hidden: Tensor) -> Tensor:
        weight = self.head.weight
        return hidden.to(device=weight.device, dtype=torch.float32 if self._on_cpu else weight.dtype)

    def _statistics(self, start: int, hidden: Tensor, batch: TokenBatch) -> TokenStatistics:
        """Compute the statistics of the chunk of rows that begins at ``start``."""
        try:
            return self._rows(hidden[start : start + len(batch.sampled_ids)], batch)
        except NotFinite as error:
            raise NotFinite(start + error.row) from None
