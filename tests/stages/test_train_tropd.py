"""tropd through the loop: draws by (seed, round, response, position, epoch); what no rollout has is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eopd.stages.train.run import run
from eopd.stages.train.settings import TrainSettings
from tests.stages.train_case import make_world, read_rows, train_job

WHOLE = {"objective": {"name": "tropd", "k": 1}, "batch_responses": 8, "epochs": 2, "optimizer": {"lr": 1e-12}}


def losses(world: Path, name: str, **changes: Any) -> list[float]:
    """Of two epochs of one step over all responses, at weights that stay as they are: only the draws may differ."""
    job = train_job(world, name, **WHOLE, **changes)
    run(job)
    return [row["loss"] for row in read_rows(job)]


def test_draws_differ_by_round_epoch_and_seed_alone(tmp_path: Path) -> None:
    make_world(tmp_path)
    first = losses(tmp_path, "first")
    assert losses(tmp_path, "again", micro_batch_tokens=16) == pytest.approx(first, abs=1e-6)
    later, seeded = losses(tmp_path, "later", round=1), losses(tmp_path, "seeded", seed=8)
    assert len({round(loss, 4) for loss in (*first, *later, *seeded)}) == 6


def test_the_weight_of_prefixes_comes_back() -> None:
    again = TrainSettings.model_validate(TrainSettings.model_validate({"objective": {"name": "tropd"}}).model_dump())
    assert again.objective.prefix_beta == 0.001
