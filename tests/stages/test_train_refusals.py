"""What is refused before a model is loaded, with the settings to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eopd.stages.train.run import run
from eopd.storage.errors import InputError
from tests.raises import raises
from tests.stages.train_case import make_world, train_job


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


CURRENT = {"advantage": "current", "ratio": "none"}


@pytest.mark.parametrize(
    ("objective", "truncated", "refused"),
    [
        ({"name": "opd"}, True, True),
        ({"name": "eopd"}, True, True),
        ({"name": "lightning_opd"}, True, True),
        ({"name": "reopold"}, True, True),
        ({"name": "opd"}, False, False),
        ({"name": "opd", **CURRENT}, True, False),
        ({"name": "eopd", "rkl": "topk"}, True, False),
        ({"name": "fkl"}, True, False),
        ({"name": "sft"}, True, False),
    ],
)
def test_a_ratio_needs_the_distribution_that_was_drawn_from(
    world: Path, objective: dict[str, Any], truncated: bool, refused: bool
) -> None:
    name = f"{'-'.join(map(str, objective.values()))}-{truncated}"
    job = train_job(world, name, objective=objective, truncated_rollouts=truncated, epochs=1)
    if not refused:
        run(job)
        assert job.output.is_complete()
        return
    with raises(InputError, setting="rollout.top_p"):
        run(job)
    assert not job.output.folder.joinpath("identity.json").exists()
    assert not job.progress_states.committed()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_is_not_replaced_by_the_cpu(world: Path) -> None:
    job = train_job(world, "cuda", device="cuda", epochs=1)
    with raises(InputError, setting="train.device", remedy="eopd doctor"):
        run(job)
    assert not job.output.is_complete()
