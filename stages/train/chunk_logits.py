"""Reading of a chunk of logits: the wanted ids apart, the rest as a sum.

Letters: C rows of a chunk, V vocabulary, K' columns of wanted ids, N wanted ids, E merged stops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eopd.stages.memory import GPU_GROUP_BYTES, GROUP_BYTES
from eopd.stages.train.objectives.base import SparseStudent, outcomes
from eopd.stages.train.objectives.layout import LOG_ZERO
from eopd.stages.train.objectives.teacher_batch import TeacherBatch


@dataclass(frozen=True)
class Rest:
    """The workspace after ``take_rest``: exp(logit - largest), and sums of it, float64 [C]."""

    largest: Tensor
    total: Tensor  # sum of exp(logit - largest)
    moment: Tensor  # sum of exp(logit - largest) * (logit - largest)

    @property
    def log_mass(self) -> Tensor:
        return self.largest + self.total.log()


@dataclass(frozen=True)
class Taken:
    """The parts of a chunk's logits that remain once the workspace holds exp(logit - largest)."""

    places: Tensor  # [N] of the wanted ids in the workspace, flattened
    z: Tensor  # [C, K'] logits at them, float64; LOG_ZERO where a column is unused
    z_stops: Tensor  # [C, E] logits of merged stops
    log_rest: Tensor  # [C] log-sum-exp of all others
    rest: Rest


def take(logits: Tensor, teacher: TeacherBatch) -> Taken:
    """Read the wanted ids out of ``logits`` [C, V], which become exp(logit - largest) with 0 in those places."""
    places = teacher.row_of_support() * logits.shape[1] + teacher.support_ids
    flat = logits.view(-1)
    z = torch.full((len(logits), teacher.width), LOG_ZERO, dtype=torch.float64, device=logits.device)
    z.view(-1)[teacher.support_slots] = flat[places].double()
    z_stops = logits[:, teacher.stop_columns].double()
    flat[places] = LOG_ZERO
    logits[:, teacher.stop_columns] = LOG_ZERO
    rest = take_rest(logits)
    return Taken(places, z, z_stops, rest.log_mass, rest)


def sparse_student(taken: Taken, teacher: TeacherBatch) -> SparseStudent:
    logprob, log_rest = outcomes(taken.z, taken.z_stops, taken.log_rest)
    sampled = logprob.gather(1, teacher.sampled_column[:, None])[:, 0]
    return SparseStudent(logprob, log_rest, sampled, entropy_of(logprob.detach(), log_rest.detach(), taken.rest))


def group_rows(logits: Tensor) -> int:
    group = GPU_GROUP_BYTES if logits.is_cuda else GROUP_BYTES
    return max(1, group // (logits.shape[1] * logits.element_size()))


def take_rest(logits: Tensor) -> Rest:
    """Turn ``logits`` [C, V], with wanted ids set to LOG_ZERO, into exp(logit - largest) in place."""
    rows, vocab = logits.shape
    group = group_rows(logits)
    largest = logits.new_empty(rows)
    total, moment = torch.empty_like(largest), torch.empty_like(largest)
    spare = logits.new_empty(min(group, rows), vocab)
    for start in range(0, rows, group):
        part = logits[start : start + group]
        shifted = spare[: len(part)]
        torch.amax(part, dim=1, out=largest[start : start + group])
        torch.sub(part, largest[start : start + group, None], out=shifted)
        torch.exp(shifted, out=part)
        torch.sum(part, dim=1, out=total[start : start + group])
        torch.mul(part, shifted, out=shifted)
        torch.sum(shifted, dim=1, out=moment[start : start + group])
    return Rest(largest.double(), total.double(), moment.double())


def entropy_of(logprob: Tensor, log_rest: Tensor, rest: Rest) -> Tensor:
    """Return the entropy [C] of outcomes [C, K] and the rest's sums."""
    inside = -(logprob.exp() * logprob).sum(dim=1)
    mean_log = log_rest + rest.moment / rest.total - rest.total.log()  # mean of log q under q within the rest
    return inside - log_rest.exp() * mean_log
