"""What Ray is asked for. Nothing of it enters an artifact's key."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from eopd.stages.settings import COUNT, PROCESSES, THREADS, Settings, setting


class RayResources(Settings):
    """Of one task."""

    cpus: float = setting(1.0, "CPUs; also the threads that OpenMP uses.", keyed=False, ge=0, le=THREADS)
    gpus: float | None = setting(
        None,
        "GPUs. Null: as many as the engine's `tensor_parallel` or `train.processes`, where the cluster has any.",
        keyed=False,
        ge=0,
        le=PROCESSES,
    )
    memory_gib: float | None = setting(None, "Main memory that Ray sets aside.", keyed=False, gt=0, le=100_000.0)
    custom: dict[str, Annotated[float, Field(ge=0, le=COUNT)]] = setting(
        {}, "Resources of your own naming, such as {a100: 1}.", keyed=False
    )
    nodes: int = setting(
        1,
        "train only: machines that train together, `train.processes` processes on each.",
        keyed=False,
        ge=1,
        le=PROCESSES,
    )


class RaySettings(Settings):
    address: str = setting(
        "auto",
        "auto: the cluster this machine belongs to. ray://HOST:10001: one to be reached from outside. local: one of "
        "this machine alone, started for the run.",
        keyed=False,
    )
    rollout: RayResources = setting(RayResources, "Resources of rollout tasks.", keyed=False)
    score: RayResources = setting(RayResources, "Resources of score tasks.", keyed=False)
    train: RayResources = setting(RayResources, "Resources of training, on each of its nodes.", keyed=False)
    evaluate: RayResources = setting(RayResources, "Resources of evaluate tasks.", keyed=False)
    align: RayResources = setting(RayResources, "Resources of align tasks.", keyed=False)
    workers: int | None = setting(
        None,
        "Tasks in flight at once. Null: as many as the nodes hold now. Where nodes come by autoscaling: as many as "
        "they may become.",
        keyed=False,
        ge=1,
        le=PROCESSES,
    )
    runtime_env: dict[str, Any] = setting(
        {}, "Ray's runtime environment, such as {env_vars: {HF_HOME: /shared/hf}}.", keyed=False
    )
