"""Requests for statistics of hidden states, and the error for logits that are not finite. Letters: T tokens, X* extra
ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eopd.stages.score.draws import UInt64


class NotFinite(ValueError):
    """The teacher's logits of a token are NaN or infinite. ``row`` counts within the call's T tokens."""

    def __init__(self, row: int) -> None:
        super().__init__(f"the teacher's logits of row {row} are NaN or infinite")
        self.row = row


@dataclass(frozen=True)
class TokenBatch:
    """A request for statistics of T hidden states."""

    sampled_ids: NDArray[np.int64]  # [T] token whose log-prob and rank are wanted
    keys: UInt64  # [T] identity of each row, for its draws (draws.row_keys)
    extra_counts: NDArray[np.int64] | None = None  # [T] extra ids of each token; None: no extra ids
    extra_ids: NDArray[np.int64] | None = None  # [X*]

    def chunks(self, rows: int) -> Iterator[tuple[int, TokenBatch]]:
        """Yield (first row, request for it and the ``rows`` - 1 rows after it), and so on to the end."""
        ends = None if self.extra_counts is None else np.cumsum(self.extra_counts)
        for start in range(0, len(self.keys), rows):
            stop = min(start + rows, len(self.keys))
            sampled, keys = self.sampled_ids[start:stop], self.keys[start:stop]
            if ends is None or self.extra_counts is None or self.extra_ids is None:
                yield start, TokenBatch(sampled, keys)
                continue
            extra = slice(ends[start - 1] if start else 0, ends[stop - 1])
            yield start, TokenBatch(sampled, keys, self.extra_counts[start:stop], self.extra_ids[extra])
