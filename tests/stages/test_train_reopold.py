"""reopold through the loop: which of equal entropies it trains on is not decided by how they were rounded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eopd.stages.score.run import run as score
from eopd.stages.train.loop import Loop
from eopd.stages.train.run import run
from tests.stages.score_case import random_responses, rollouts, score_job
from tests.stages.tiny_models import save_teacher
from tests.stages.train_case import read_rows, train_job


def test_equal_entropies_are_split_alike_however_they_are_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the responses are the same one, as samples of a sure model are; a batch rounds by about 1e-6 nats."""
    save_teacher("qwen3", tmp_path / "teacher", seed=0)
    save_teacher("qwen3", tmp_path / "student", seed=1)
    rows = random_responses(5, seed=3, most=12)
    same = max(rows, key=lambda row: len(row["response_token_ids"]))
    rows = [same if number % 2 else rows[number // 2] for number in range(8)]
    score(score_job(tmp_path / "store", tmp_path / "teacher", rollouts(tmp_path / "store", [rows[:5], rows[5:]])))
    round_start = Loop.round_start

    def losses(quantile: float, seed: int) -> list[float]:
        def rounded(self: Loop, *given: Any) -> Any:
            start = round_start(self, *given)
            noise = np.random.default_rng(seed).uniform(-1e-6, 1e-6, start.entropy.shape).astype(np.float32)
            return replace(start, entropy=start.entropy + noise)

        monkeypatch.setattr(Loop, "round_start", rounded)
        given = {"objective": {"name": "reopold", "entropy_quantile": quantile}, "batch_responses": 8}
        job = train_job(tmp_path, f"{quantile} {seed}", **given, optimizer={"lr": 1e-12}, micro_batch_tokens=16 << seed)
        run(job)
        return [row["loss"] for row in read_rows(job)]

    for quantile in (0.2, 0.5, 0.8):
        assert losses(quantile, 0) == pytest.approx(losses(quantile, 1), abs=1e-6)
