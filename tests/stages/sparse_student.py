"""A sparse student made from dense logits, differentiable: what the student head gives, without its chunking."""

from __future__ import annotations

import torch
from torch import Tensor

from eopd.stages.train.objectives.base import SparseStudent, TeacherBatch, outcomes
from eopd.stages.train.objectives.layout import LOG_ZERO


def student_at(logits: Tensor, batch: TeacherBatch) -> SparseStudent:
    """A sparse student from dense logits [T, V], differentiable."""
    z = torch.full((len(logits), batch.width), LOG_ZERO, dtype=torch.float64)
    rows = batch.row_of_support()
    z = z.flatten().index_put((batch.support_slots,), logits[rows, batch.support_ids]).view(z.shape)
    apart = torch.zeros_like(logits, dtype=torch.bool)
    apart[rows, batch.support_ids] = True
    apart[:, batch.stop_columns] = True
    rest = torch.where(apart, LOG_ZERO, logits).logsumexp(dim=1)
    logprob, log_rest = outcomes(z, logits[:, batch.stop_columns], rest)
    sampled = logprob.gather(1, batch.sampled_column[:, None])[:, 0]
    return SparseStudent(logprob, log_rest, sampled, torch.zeros(len(logits)))
