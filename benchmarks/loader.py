"""How long the training loop waits for its data: the whole train stage over a real Zarr cache, twice.

* ``realistic``: a 3-layer student of width 256 with 4,096 ids, 8 responses of 112 tokens a step: tens of
  milliseconds.
* ``tiny``: the quickstart's student (3 layers of 96, 64 ids), 32 responses of 28 tokens a step: a step is as short as
  it gets, so the loader has the least time.

A step's wait is what the loop itself records (``loader_wait_fraction``). The first step of a round has nothing to load
behind and is left out of the fraction; it is given apart.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from benchmarks.training_world import Shape, StepClock, make_world, train_job
from eopd.stages.train.run import run as train

REALISTIC = Shape(vocab=4_096, teacher_layers=4)
TINY = Shape(
    vocab=64,
    hidden=96,
    heads=3,
    key_value_heads=3,
    head_dim=32,
    mlp=256,
    teacher_layers=4,
    prompt_tokens=12,
    response_tokens=28,
    batch_responses=32,
)


def waits(given: Shape) -> dict[str, Any]:
    """Share of a round's steps spent waiting, and what a step took."""
    with make_world(given) as where:
        job = train_job(where, "loader", StepClock())
        train(job)
        lines = (job.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    seconds = [row["tokens"] / row["tokens_per_s"] for row in rows]
    waited = [row["loader_wait_fraction"] * spent for row, spent in zip(rows, seconds, strict=True)]
    return {
        "loader_wait_fraction": round(sum(waited[1:]) / sum(seconds[1:]), 5),
        "first_wait_seconds": round(waited[0], 5),
        "longest_wait_seconds": round(max(waited[1:]), 5),
        "step_seconds": round(median(seconds), 5),
        "tokens_per_s": round(given.tokens_per_step / median(seconds), 1),
        "settings": asdict(given),
    }


def measure(steps: int) -> dict[str, Any]:
    result = {name: waits(replace(shape, steps=steps)) for name, shape in (("realistic", REALISTIC), ("tiny", TINY))}
    return {"loader_wait_fraction": max(row["loader_wait_fraction"] for row in result.values()), "loader": result}
