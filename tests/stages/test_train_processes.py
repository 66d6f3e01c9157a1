"""Training on two processes, DDP and FSDP2 over gloo: as on one."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard

from eopd.stages.job import ModelRef
from eopd.stages.train.job import TrainJob
from eopd.stages.train.optimizer import Ema, make_optimizer, optimizer_tensors
from eopd.stages.train.parallel import gather_weights
from eopd.stages.train.run import run
from eopd.stages.train.settings import OptimizerSettings
from eopd.storage.paths import OPTIMIZER, WEIGHTS
from tests.bounds import forward_rounding
from tests.stages.train_case import make_world, read_rows, train_job

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 4, "alpha": 8.0}, "optimizer": {"lr": 1e-2}},
    "ema": {"ema": 0.75},
    "short": {"batch_responses": 7, "epochs": 1},  # the last step has one response: none for the second process
    "small": {"micro_batch_tokens": 32},  # several micro-batches a step
}
FILES = {
    "lora": [(WEIGHTS, "model.safetensors")],
    "ema": [(OPTIMIZER, "ema/model.safetensors")],
    "short": [(WEIGHTS, "model.safetensors")],
    "small": [(WEIGHTS, "model.safetensors")],
}
SHARDINGS = ("none", "fsdp")


def job_of(folder: Path, kind: str, sharding: str, processes: int) -> TrainJob:
    return train_job(folder, f"{kind}-{sharding}-{processes}", sharding=sharding, **KINDS[kind])


def rounds_of(folder: Path, sharding: str, processes: int) -> Iterator[TrainJob]:
    """Two rounds, the second with the first one's model and moments; each is to be run before the next is asked for."""
    first = train_job(folder, f"first-{sharding}-{processes}", sharding=sharding)
    yield first
    student = ModelRef(str(first.output.part_folder(WEIGHTS)), fingerprint="second")
    changes = {"previous": first.output, "student": student, "round": 1, "first_step": 4, "total_steps": 8}
    yield train_job(folder, f"second-{sharding}-{processes}", sharding=sharding, **changes)


def run_rounds(folder: Path, sharding: str, processes: int) -> TrainJob:
    for job in rounds_of(folder, sharding, processes):
        run(job)
    return job


def _one_of_two(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    for sharding in SHARDINGS:
        for kind in KINDS:
            run(job_of(Path(folder), kind, sharding, 2))
        run_rounds(Path(folder), sharding, 2)
    _gather(rank, Path(folder))
    torch.distributed.destroy_process_group()


def _gather(rank: int, folder: Path) -> None:
    """What a process holds of a sharded layer's weights and moments once they are gathered."""
    layer = fully_shard(seeded_layer())
    optimizer = make_optimizer(layer, OptimizerSettings())
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    result = gather_weights(layer) | optimizer_tensors(layer, optimizer) | Ema(layer, 0.5).tensors()
    torch.save(result, folder / f"gathered-{rank}.pt")


def seeded_layer() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything above, trained by two processes."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_one_of_two, (port, str(folder)), nprocs=2)
    return folder


def check_equal(single: TrainJob, two: TrainJob, files: list[tuple[int, str]]) -> None:
    """Equal but for the order of sums, which adds its rounding of both trainings in every step.

    Adam divides a gradient by its own size, so that elements within rounding of 0 move by either sign: a share of them
    as large as the relative rounding, and so its square root of the update's norm.
    """
    rows = list(zip(read_rows(single), read_rows(two), strict=True))
    error = len(rows) * 2 * forward_rounding(1.0)
    for ours, theirs in rows:
        assert (theirs["loss"], theirs["grad_norm"]) == pytest.approx((ours["loss"], ours["grad_norm"]), rel=error)
    start = load_file(Path(single.student.path) / "model.safetensors")
    for part, file in files:
        saved = [load_file(job.output.part_folder(part) / file) for job in (single, two)]
        assert saved[0].keys() == saved[1].keys()
        for name, value in saved[0].items():
            change = value - start.get(name, 0.0)
            assert (value - saved[1][name]).norm() <= math.sqrt(error) * change.norm(), name


@pytest.mark.timeout(180)
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_does(world: Path, kind: str, sharding: str) -> None:
    single = job_of(world, kind, "none", 1)
    run(single)
    check_equal(single, job_of(world, kind, sharding, 2), FILES[kind])


@pytest.mark.timeout(180)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_moments_carry_over_on_two_processes(world: Path, sharding: str) -> None:
    single = run_rounds(world, "none", 1)
    *_, two = rounds_of(world, sharding, 2)
    check_equal(single, two, [(WEIGHTS, "model.safetensors"), (OPTIMIZER, "optimizer.safetensors")])


def test_only_the_main_process_holds_what_is_gathered(world: Path) -> None:
    main, other = (torch.load(world / f"gathered-{rank}.pt") for rank in range(2))
    assert other == {}
    names = {f"{kind}{name}" for kind in ("", "exp_avg.", "exp_avg_sq.") for name in ("weight", "bias")}
    assert main.keys() == names | {"step"}
    layer = seeded_layer()
    optimizer = make_optimizer(layer, OptimizerSettings())
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    for name, value in layer.state_dict().items():
        assert torch.equal(main[name], value)
