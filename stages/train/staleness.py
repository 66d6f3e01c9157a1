"""Weights of responses that an older policy sampled. Fixed at the round's start.

Letters: S responses, T tokens of the round.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eopd.stages.train.settings import StalenessSettings


def response_weights(
    settings: StalenessSettings,
    age: int,
    moved: NDArray[np.float32],
    counted: NDArray[np.bool_],
    offsets: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Return weights [T], equal within a response: 2^(-age / half-life) times min(1, max_kl / KL).

    KL is the k1 estimate, the mean of ``moved`` over a response's counted tokens; where it is not positive, or nothing
    counts, nothing is taken off.

    Args:
        age: rounds by which the policy that sampled is older than the student.
        moved: log q_sampled - log q_student [T] of the tokens, nats.
        counted: tokens [T] of which that is known.
        offsets: [S+1] tokens of response s are [offsets[s], offsets[s+1]); none is empty.
    """
    lengths = np.diff(offsets)
    weights = np.ones(len(lengths))
    if settings.half_life_rounds is not None:
        weights *= 2.0 ** (-age / settings.half_life_rounds)
    if settings.max_kl is not None:
        total = np.add.reduceat(np.where(counted, moved.astype(np.float64), 0.0), offsets[:-1])
        kl = total / np.maximum(np.add.reduceat(counted.astype(np.int64), offsets[:-1]), 1)
        weights *= np.where(kl > settings.max_kl, settings.max_kl / np.maximum(kl, settings.max_kl), 1.0)
    return np.repeat(weights, lengths).astype(np.float32)
