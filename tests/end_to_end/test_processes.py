"""Two processes train as one does: DDP and FSDP2 over gloo on the CPU."""

from __future__ import annotations

import json

import pytest

from tests.end_to_end.conftest import World, eopd


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_give_the_single_process_loss_curve(world: World, undisturbed: str, sharding: str) -> None:
    name = f"two-{sharding}"
    config = world.config(name, rounds=1, train={"processes": 2, "sharding": sharding, "epochs": 3})
    single = world.config("single", rounds=1, train={"epochs": 3})
    curves = []
    for run, path in (("single", single), (name, config)):
        eopd("run", path)
        rows = [json.loads(line) for line in (world.runs(run) / "metrics.jsonl").read_text().splitlines()]
        jobs = [json.loads(line) for line in (world.runs(run) / "jobs.jsonl").read_text().splitlines()]
        assert [job["stage"] for job in jobs].count("train") == 1  # noted once, whoever trained it together
        curves.append([(row["loss"], row["grad_norm"], row["tokens"]) for row in rows])
    assert len(curves[0]) == len(curves[1]) == 12
    for ours, theirs in zip(*curves, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-5)
