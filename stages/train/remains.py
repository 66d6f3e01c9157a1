"""What stays of a checkpoint that is pruned (``eopd.pipeline.pruning``): the names of files that may go, by part."""

from __future__ import annotations

from eopd.stages.train.job import ADAPTER_FOLDER, METRICS_FILE, OPTIMIZER_FILE, ROUND_START_FILE, TRAINING_FILE


def weights(name: str) -> bool:
    """Of the weights part: everything but the figures of its steps, which reports read."""
    return name not in (METRICS_FILE, TRAINING_FILE)


def moments(name: str) -> bool:
    """Of the optimiser part while the weights stay: what only the next round's training reads."""
    return name in (OPTIMIZER_FILE, ROUND_START_FILE)


def outlived(name: str) -> bool:
    """Of the optimiser part when the weights go: averaged weights too; an adapter is small and stays."""
    return not name.startswith(f"{ADAPTER_FOLDER}/")
