"""LoRA and averaged weights on two processes, DDP and FSDP2 over gloo: as on one."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eopd.stages.train.job import OPTIMIZER, WEIGHTS, TrainJob
from eopd.stages.train.run import run
from tests.stages.train_case import make_world, read_rows, train_job

KINDS = {"lora": {"lora": {"rank": 4, "alpha": 8.0}, "optimizer": {"lr": 1e-2}}, "ema": {"ema": 0.75}}
FILES = {"lora": (WEIGHTS, "model.safetensors"), "ema": (OPTIMIZER, "ema/model.safetensors")}
SHARDINGS = ("none", "fsdp")


def job_of(folder: Path, kind: str, sharding: str, processes: int) -> TrainJob:
    return train_job(folder, f"{kind}-{sharding}-{processes}", sharding=sharding, **KINDS[kind])


def _one_of_two(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    for kind in KINDS:
        for sharding in SHARDINGS:
            run(job_of(Path(folder), kind, sharding, 2))
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(180)
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    make_world(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_one_of_two, (port, str(tmp_path)), nprocs=2)
    for kind, (part, file) in FILES.items():
        single = job_of(tmp_path, kind, "none", 1)
        run(single)
        for sharding in SHARDINGS:
            two = job_of(tmp_path, kind, sharding, 2)
            for ours, theirs in zip(read_rows(single), read_rows(two), strict=True):
                expected = pytest.approx((ours["loss"], ours["grad_norm"]), rel=1e-5)
                assert (theirs["loss"], theirs["grad_norm"]) == expected, (kind, sharding)
            saved = [load_file(job.output.part_folder(part) / file) for job in (single, two)]
            for name, value in saved[0].items():
                assert torch.allclose(value, saved[1][name], atol=1e-5), (kind, sharding, name)
