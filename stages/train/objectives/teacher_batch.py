"""Teacher rows of one packed batch as padded tensors, with stop handling applied.

Built once a micro-batch from ``TeacherRows`` (numpy), read by the student head (which ids to evaluate) and by the
objectives (what the teacher says of them).

Letters: T tokens, N ids to evaluate (ragged), K' padded ids of a token, K = K' + 1 outcomes where stops are merged (the
merged outcome is column 0), else K = K'. V student vocabulary, E merged stop ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eopd.stages.models.transfer import on_device
from eopd.stages.train.objectives.layout import Layout, SupportPlan
from eopd.stages.train.stops import StopHandling, swap_stops
from eopd.storage.teacher_record import HeadRule, TeacherRows

Index = NDArray[np.int64]


@dataclass(frozen=True)
class TeacherBatch:
    """Fields marked [T, K] are padded: unused columns have log-prob ``LOG_ZERO`` and weight 0."""

    support_ids: Tensor  # [N] int64 ids to evaluate, merged stops not among them
    support_slots: Tensor  # [N] int64 place of each in [T, K'] flattened
    support_offsets: Index  # [T+1] on the CPU: token t's ids are [offsets[t], offsets[t+1])
    stop_columns: Tensor  # [E] int64 ids merged into outcome 0, those of the student's vocabulary
    width: int  # K'
    logprob: Tensor  # [T, K] teacher log-prob where known, else LOG_ZERO
    in_head: Tensor  # [T, K] bool
    in_extra: Tensor  # [T, K] bool: named by the caller (the student's own top ids)
    target: Tensor  # [T, K] weights of the unbiased forward KL: head probabilities and draws
    tail: Tensor  # [T] log mass outside the head
    known_tail: Tensor  # [T] log mass outside head and extra
    entropy: Tensor  # [T] full vocabulary, nats
    sampled: Tensor  # [T] log-prob of the sampled token
    sampled_column: Tensor  # [T] int64 its outcome
    is_scored: bool = True  # False: only tokens are known, and every statistic of the teacher is NaN

    @property
    def tokens(self) -> int:
        return len(self.support_offsets) - 1

    def slice(self, start: int, stop: int) -> TeacherBatch:
        """Return tokens [start, stop) without synchronising with the device."""
        low, high = int(self.support_offsets[start]), int(self.support_offsets[stop])
        names = (
            "logprob",
            "in_head",
            "in_extra",
            "target",
            "tail",
            "known_tail",
            "entropy",
            "sampled",
            "sampled_column",
        )
        return replace(
            self,
            support_ids=self.support_ids[low:high],
            support_slots=self.support_slots[low:high] - start * self.width,
            support_offsets=self.support_offsets[start : stop + 1] - low,
            **{name: getattr(self, name)[start:stop] for name in names},
        )

    def row_of_support(self) -> Tensor:
        """Return the row number [N] of each evaluated id."""
        return torch.div(self.support_slots, max(self.width, 1), rounding_mode="floor")

    @classmethod
    def build(
        cls,
        rows: TeacherRows,
        rule: HeadRule,
        stops: StopHandling,
        plan: SupportPlan,
        vocab_size: int,
        device: torch.device | str = "cpu",
        *,
        is_scored: bool = True,
    ) -> TeacherBatch:
        """Build the batch of ``rows``; ``rule`` is the coverage's (weight of a draw), ``vocab_size`` the student's.

        Ids outside the student's vocabulary fall to the tail. Raises ValueError when the rows lack what stop
        handling needs, or when a sampled token is outside the student's vocabulary.
        """
        bad = np.flatnonzero((rows.token_ids < 0) | (rows.token_ids >= vocab_size))
        if len(bad):
            raise ValueError(f"sampled token {rows.token_ids[bad[0]]} is outside the student's {vocab_size} ids")
        merged: tuple[int, ...] = ()
        if plan.stops:
            if plan.stop_logprobs:
                stops.require(rows)
            else:
                rows = stops.filled(rows)
            merged = stops.merged if any(i < vocab_size for i in stops.merged) else ()
            if stops.mode == "remap":
                rows = swap_stops(rows, stops)
        stop_logprobs = stops.stop_logprobs(rows) if merged else np.zeros((rows.tokens, 0))
        arrays = Layout(rows, rule, plan, vocab_size, merged, stop_logprobs).arrays()
        offsets, width = arrays.pop("support_offsets"), arrays.pop("width")
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return on_device(device, cls(support_offsets=offsets, width=int(width), is_scored=is_scored, **tensors))
