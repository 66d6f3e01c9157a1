"""A user's objective, named by its file in the settings, trains as one of the family does."""

from __future__ import annotations

from pathlib import Path

from eopd.stages.train.job import TrainJob
from eopd.stages.train.run import run
from eopd.storage.paths import WEIGHTS
from tests.stages.train_case import make_world, part_bytes, read_rows, train_job

OWN = Path(__file__).with_name("made_up_objective.py")


def own_job(folder: Path, limit: float) -> TrainJob:
    objective = {"name": f"{OWN}:sure_only", "options": {"limit": limit}}
    return train_job(folder, f"own-{limit}", objective=objective)


def test_a_file_of_ones_own_through_the_loop(tmp_path: Path) -> None:
    make_world(tmp_path)
    family, own = train_job(tmp_path, "family", objective={"name": "fkl", "k": 16}), own_job(tmp_path, 1e9)
    run(family)
    run(own)
    assert [row["loss"] for row in read_rows(own)] == [row["loss"] for row in read_rows(family)]
    weights = "model.safetensors"
    assert part_bytes(own.output, WEIGHTS)[weights] == part_bytes(family.output, WEIGHTS)[weights]
    assert all(row["gate_fraction"] == 1.0 for row in read_rows(own))
    gated = own_job(tmp_path, read_rows(own)[0]["teacher_entropy"])
    run(gated)
    assert 0.0 < read_rows(gated)[0]["gate_fraction"] < 1.0
    assert own.settings.semantic() != gated.settings.semantic()
