"""Weights of the loss by the position of a token in its response.

Letters: S responses, T tokens of the round.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from eopd.stages.train.settings import WeightSettings


def position_weights(settings: WeightSettings, offsets: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return a weight for each token [T]; tokens of response s are [offsets[s], offsets[s+1])."""
    return np.concatenate([_of_one(settings, int(length)) for length in np.diff(offsets)])


def _of_one(settings: WeightSettings, length: int) -> NDArray[np.float32]:
    if settings.kind == "head":
        assert settings.fraction is not None
        counted = math.ceil(round(settings.fraction * length, 9))  # 0.07 * 100 is a little more than 7
        return (np.arange(length) < counted).astype(np.float32)
    assert settings.start is not None
    assert settings.end is not None
    return np.linspace(settings.start, settings.end, length).astype(np.float32)
