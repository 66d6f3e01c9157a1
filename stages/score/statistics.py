"""The statistics head: hidden states in, exact statistics of the teacher's distribution out (docs/format.md).

    head = StatisticsHead(lm_head, HeadRule(), temperature=1.0, stop_ids=(2,))
    statistics = head(hidden, TokenBatch(sampled_ids, keys))

No tensor of [T, V] exists: a chunk of rows at a time, so memory does not grow with T. Everything is float32 or
better whatever the model's dtype. Letters: T tokens, C rows of a chunk, V vocabulary, D hidden size, K head
entries, E stop ids, X* extra ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from eopd.stages.models.lm_head import LMHead
from eopd.stages.models.threads import OneThreadEach
from eopd.stages.score.block_rows import BlockRows
from eopd.stages.score.token_batch import NotFinite, TokenBatch
from eopd.stages.score.token_statistics import TokenStatistics, concatenate, empty
from eopd.stages.score.whole_rows import LEAST_ROWS, MOST_IDS, WholeRows
from eopd.storage.teacher_record import HeadRule


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
        self._whole: WholeRows | None = None
        self._blocks: BlockRows | None = None
        self._threads = OneThreadEach()
        if self._on_cpu and head.vocab_size <= MOST_IDS:
            self._whole = WholeRows(self.head, rule, temperature, stop_ids, chunk_rows)
        else:
            self._blocks = BlockRows(self.head, rule, temperature, stop_ids, chunk_rows, block)

    @torch.inference_mode()
    def __call__(self, hidden: Tensor, batch: TokenBatch) -> TokenStatistics:
        """Statistics of T tokens from hidden [T, D], on the head's device.

        Ids that the teacher's vocabulary lacks have probability 0: log-prob LOGPROB_FLOOR and rank V.

        Raises:
            NotFinite: logits of a row are NaN or infinite.
        """
        assert hidden.shape[0] == len(batch.sampled_ids) == len(batch.keys)
        hidden = self._taken(hidden)
        if self._whole is not None:
            most = self._whole.rows
            chunks = _chunks(hidden, batch, self._threads.even_size(len(hidden), min(LEAST_ROWS, most), most))
            pieces = self._threads.map(partial(_statistics, self._whole), chunks)
        else:
            assert self._blocks is not None
            pieces = [_statistics(self._blocks, chunk) for chunk in _chunks(hidden, batch, self._blocks.rows)]
        return concatenate(pieces) if pieces else empty(len(self.stop_ids))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[T, V] float32 at temperature 1, of a few tokens: the product that their statistics are made from."""
        hidden = self._taken(hidden)
        found = torch.empty(len(hidden), self.head.vocab_size, device=hidden.device)
        self.head.logits_into(found, hidden, slice(0, self.head.vocab_size), 1.0)
        return found

    def _taken(self, hidden: Tensor) -> Tensor:
        weight = self.head.weight
        return hidden.to(device=weight.device, dtype=torch.float32 if self._on_cpu else weight.dtype)


Chunk = tuple[int, Tensor, TokenBatch]  # its first row, hidden [C, D], what is asked


def _chunks(hidden: Tensor, batch: TokenBatch, rows: int) -> Iterator[Chunk]:
    for start, part in batch.chunks(rows):
        yield start, hidden[start : start + rows], part


def _statistics(rows: WholeRows | BlockRows, chunk: Chunk) -> TokenStatistics:
    start, hidden, batch = chunk
    try:
        return rows(hidden, batch)
    except NotFinite as error:
        raise NotFinite(start + error.row) from None
