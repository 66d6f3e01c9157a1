"""`reopold` (arXiv 2603.11137): the policy gradient with floored advantages, on tokens where the student is unsure."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from eopd.stages.train.objectives.base import Objective, SparseStudent, StepContext, TeacherBatch, TokenLoss
from eopd.stages.train.objectives.eopd import round_start_fields
from eopd.stages.train.objectives.layout import SupportPlan
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.objectives.terms import above, log_ratio_advantage, policy_gradient
from eopd.stages.train.objectives.tropd import hashed_uniform
from eopd.storage.coverage import SampledNeed, StopsNeed

EQUAL_ENTROPY = 1e-4
"""Entropies of the same state that were computed in other batches differ by rounding, of less than this (nats)."""


def advantage_floor(settings: ObjectiveSettings) -> float:
    """Return the smallest advantage in nats: log(lambda) / (1 - lambda), or log(lambda / (1 - lambda)) of a second
    source."""
    weight = settings.floor_lambda
    if settings.floor_form == "mixture":
        return math.log(weight) / (1.0 - weight)
    return math.log(weight / (1.0 - weight))


def above_quantile(entropy: NDArray[np.float32], quantile: float) -> NDArray[np.bool_]:
    """Return the tokens [T] of a round above a quantile of their entropies: as many as ``entropy > np.quantile(...)``
    selects from distinct ones.

    Entropies next to the quantile that are equal but for rounding are ordered by a hash of their place in the round,
    so that neither packing nor the number of processes decides which of them are taken. They end, on either side, at
    the first gap that no rounding makes, or after ``EQUAL_ENTROPY``.
    """
    count = len(entropy)
    if count == 0:
        return np.zeros(0, dtype=bool)
    order = np.argsort(entropy, kind="stable")
    ordered = entropy[order].astype(np.float64)
    last = min(int(quantile * (count - 1)), count - 1)  # the highest rank that is not taken
    low, high = np.searchsorted(ordered, [ordered[last] - EQUAL_ENTROPY, ordered[last] + EQUAL_ENTROPY])
    gaps = np.diff(ordered[low:high]) > EQUAL_ENTROPY / 10
    below, beyond = np.flatnonzero(gaps[: last - low]), np.flatnonzero(gaps[last - low :])
    start = low + int(below[-1]) + 1 if len(below) else int(low)
    stop = last + int(beyond[0]) + 1 if len(beyond) else int(high)
    tied = np.sort(order[start:stop])
    drawn = hashed_uniform(torch.from_numpy(tied), seed=0, epoch=0).numpy()
    order[start:stop] = tied[np.argsort(drawn, kind="stable")]
    taken = np.zeros(count, dtype=bool)
    taken[order[last + 1 :]] = True
    return taken


def reopold(settings: ObjectiveSettings) -> Objective:
    """1[H_q > quantile over the round] times L_OPD with max(A, floor); H_q is the student's at the round's start."""

    def token_loss(student: SparseStudent, teacher: TeacherBatch, context: StepContext) -> TokenLoss:
        if context.unsure is not None:
            kept = context.unsure.double()
        else:
            entropy = context.require("student_entropy_round", settings.name)
            if context.entropy_threshold is None:
                raise ValueError("objective 'reopold' needs context.entropy_threshold, which was not given")
            kept = above(entropy.double(), context.entropy_threshold)
        q_old = context.require("q_old", settings.name) if round_start_fields(settings) else None
        raw = log_ratio_advantage(settings.advantage, teacher.sampled, student.sampled, q_old)
        floor = advantage_floor(settings)
        term = policy_gradient(
            student.sampled, raw.clamp(min=floor), settings.ratio, q_old, settings.clip_eps, settings.truncate_at
        )
        parts = {"loss_rkl": kept * term.loss, "gate": kept, "floored": (raw < floor).double(), "ratio": term.ratio}
        return TokenLoss(kept * term.loss, {**parts, "ratio_squared": term.ratio**2, "clipped": term.clipped})

    fields = round_start_fields(settings) | {"student_entropy_round", "entropy_threshold"}
    return Objective(settings, (SampledNeed(), StopsNeed()), SupportPlan(head_k=settings.k), token_loss, fields)
