"""A step that is not finite: the run stops, and its folder holds what the step was a function of."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from eopd.stages.job import ModelRef
from eopd.stages.train.failures import TrainingStopped
from eopd.stages.train.run import run
from eopd.storage.teacher_cache import JointCache
from tests.stages.train_case import make_world, train_job


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


def broken_student(world: Path, folder: Path) -> ModelRef:
    shutil.copytree(world / "student", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelRef(str(folder), fingerprint="broken")


def test_infinite_weights_leave_a_reproduction(world: Path, tmp_path: Path) -> None:
    job = train_job(
        world, "infinite", student=broken_student(world, tmp_path / "student"), row_tokens=16, micro_batch_tokens=16
    )
    with pytest.raises(TrainingStopped, match="round 0, step 0: loss nan") as raised:
        run(job)
    folder = job.run_dir / "failures" / "round-0-step-0"
    assert raised.value.folder == folder
    assert str(raised.value).endswith(f"Reproduction: {folder}")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    values = json.loads((folder / "failure.json").read_text())
    assert (values["round"], values["step"], values["seed"]) == (0, 0, 7)
    assert values["settings"] == job.settings.model_dump(mode="json")
    assert values["figures"]["sums_over_tokens"]["loss"] == "nan"
    assert values["figures"]["not_finite"]["weights"] == ["model.model.layers.1.mlp.down_proj.weight"]
    assert len(values["figures"]["micro_batches_of_the_first_process"]) > 1
    assert values["weights"] == {
        "student": str(tmp_path / "student"),
        "fingerprint": "broken",
        "state_after_step": 0,
        "state": None,
    }

    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert tuple(row["name"] for row in rows) == raised.value.responses
    assert len(rows) == job.settings.batch_responses
    teacher = JointCache(job.scores).read([(row["part"], row["row"]) for row in rows])
    assert teacher.token_ids.tolist() == [token for row in rows for token in row["response_token_ids"]]
    assert all(row["prompt_token_ids"] == [5, 6, 7] for row in rows)


def test_the_state_to_start_from_is_named_and_a_second_failure_replaces_the_first(world: Path) -> None:
    """A learning rate so high that the second step's weights overflow."""
    job = train_job(world, "overflow")
    optimizer = job.settings.optimizer.model_copy(update={"lr": 1e30})  # more than a config may ask for
    job = replace(job, settings=job.settings.model_copy(update={"optimizer": optimizer}))
    for _ in range(2):
        with pytest.raises(TrainingStopped, match="round 0, step 1: "):
            run(job)
    folder = job.run_dir / "failures" / "round-0-step-1"
    values = json.loads((folder / "failure.json").read_text())
    assert values["weights"]["state_after_step"] == 1
    assert Path(values["weights"]["state"]).joinpath("weights.safetensors").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert not job.output.committed()


def test_a_run_that_is_fine_leaves_no_failure(world: Path) -> None:
    job = replace(train_job(world, "fine"), round=3)
    run(job)
    assert job.output.is_complete()
    assert not (job.run_dir / "failures").exists()
