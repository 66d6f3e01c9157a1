"""The statistics head: hidden states in, exact statistics of the teacher's distribution out (docs/format.md).

    head = StatisticsHead(lm_head, HeadRule(), temperature=1.0, stop_ids=(2,))
    statistics = head(hidden, TokenBatch(sampled_ids, keys))

No [T, V] tensor exists: rows are processed in chunks, so memory does not grow with T. Everything is float32 or better
whatever the model's dtype. Letters: T tokens, C rows of a chunk, V vocabulary, D hidden size, K head entries, E stop
ids, X* extra ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eopd.stages.models.lm_head import LMHead
from eopd.stages.score.block_rows import BlockRows
from eopd.stages.score.token_batch import NotFinite, TokenBatch
from eopd.stages.score.token_statistics import TokenStatistics, concatenate, empty
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
