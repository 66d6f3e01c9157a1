"""How much a response counts that an older policy sampled. Decided once, at the round's start.

Letters: S responses, T tokens of the round.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eopd.stages.train.settings import StalenessSettings


def response_weights(
    settings: StalenessSettings,
    age: int,
    sampled: NDArray[np.float32],
    student: NDArray[np.float32],
    offsets: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Weights [T], equal within a response: 2^(-age / half-life) times min(1, max_kl / KL).

    KL is the k1 estimate, the mean over a response's tokens of log q_sampled - log q_student (nats); where it is not
    positive nothing is taken off.

    Args:
        age: rounds by which the policy that sampled is older than the student.
        sampled, student: log-probs [T] of the tokens under the two, nats.
        offsets: [S+1] tokens of response s are [offsets[s], offsets[s+1]); none is empty.
    """
    counts = np.diff(offsets)
    weights = np.ones(len(counts))
    if settings.half_life_rounds is not None:
        weights *= 2.0 ** (-age / settings.half_life_rounds)
    if settings.max_kl is not None:
        kl = np.add.reduceat(sampled.astype(np.float64) - student, offsets[:-1]) / counts
        weights *= np.where(kl > settings.max_kl, settings.max_kl / np.maximum(kl, settings.max_kl), 1.0)
    return np.repeat(weights, counts).astype(np.float32)
