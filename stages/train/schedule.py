"""Learning rate and training order as pure functions, so that resuming needs no state for either."""

from __future__ import annotations

import math

import numpy as np

from eopd.stages.train.settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """Return the learning rate of 0-based optimiser ``step`` of ``total_steps`` (over all rounds if they carry
    over)."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    span = max(1, total_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else 1 - progress
    return settings.lr * (settings.final + (1 - settings.final) * falling)


def steps_per_round(responses: int, batch_responses: int, epochs: int) -> int:
    return epochs * math.ceil(responses / batch_responses)


def batch_of_step(responses: int, batch_responses: int, step: int, *, seed: int, round_: int) -> tuple[int, list[int]]:
    """Return (epoch, response numbers) of 0-based ``step`` within a round, from the arguments alone."""
    per_epoch = math.ceil(responses / batch_responses)
    epoch, within = divmod(step, per_epoch)
    order = np.random.default_rng([seed, round_, epoch]).permutation(responses)
    return epoch, order[within * batch_responses : (within + 1) * batch_responses].tolist()
