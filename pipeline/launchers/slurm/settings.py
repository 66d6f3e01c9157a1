"""What Slurm is asked for. Nothing of it enters an artifact's key."""

from __future__ import annotations

from typing import Self

from eopd.stages.settings import COUNT, DAY, PROCESSES, THREADS, Settings, setting


class SlurmResources(Settings):
    """Of one task. What is not set here is left to the settings of all stages, then to the cluster's defaults."""

    partition: str | None = setting(None, "Partition (--partition).", keyed=False)
    account: str | None = setting(None, "Account (--account).", keyed=False)
    time: str | None = setting(
        None,
        "--time, such as 04:00:00. A task that runs into it commits the part in hand and queues again: give it room "
        "for a few parts, or for training from one resumable state to the next.",
        keyed=False,
    )
    cpus: int | None = setting(None, "--cpus-per-task.", keyed=False, ge=1, le=THREADS)
    memory: str | None = setting(None, "--mem, of a node, such as 64G.", keyed=False)
    gpus: int | None = setting(None, "GPUs of a node (--gres=gpu:N).", keyed=False, ge=0, le=PROCESSES)
    nodes: int | None = setting(
        None,
        "train only: machines that train together, `train.processes` processes on each.",
        keyed=False,
        ge=1,
        le=PROCESSES,
    )
    extra: tuple[str, ...] | None = setting(
        None, "Further sbatch options as they are, such as --qos=high or --gres=gpu:a100:4.", keyed=False
    )

    def over(self, general: Self) -> Self:
        """``general`` with what is set here in its place."""
        return general.model_copy(update=self.model_dump(exclude_none=True))


class SlurmSettings(Settings):
    resources: SlurmResources = setting(SlurmResources, "Resources of tasks whose stage says nothing.", keyed=False)
    rollout: SlurmResources = setting(SlurmResources, "Resources of rollout tasks.", keyed=False)
    score: SlurmResources = setting(SlurmResources, "Resources of score tasks.", keyed=False)
    train: SlurmResources = setting(SlurmResources, "Resources of training.", keyed=False)
    evaluate: SlurmResources = setting(SlurmResources, "Resources of evaluate tasks.", keyed=False)
    align: SlurmResources = setting(SlurmResources, "Resources of align tasks.", keyed=False)
    parts_per_task: int = setting(
        1,
        "Parts that one array task does one after the other: the model is loaded once for all of them.",
        keyed=False,
        ge=1,
        le=COUNT,
    )
    tasks_at_once: int | None = setting(
        None, "Tasks of one array that may run at once. Null: any number.", keyed=False, ge=1, le=COUNT
    )
    array_size: int = setting(
        1000, "Largest array; the cluster's MaxArraySize is one more (1001 by default).", keyed=False, ge=1, le=COUNT
    )
    seconds_before_limit: int = setting(
        120,
        "How long before its time limit a task is told to commit the part in hand and to queue again; longer than "
        "a part takes.",
        keyed=False,
        ge=1,
        le=65535,
    )
    setup: tuple[str, ...] = setting(
        (), "Lines of shell before the work: `module load ...`, `export HF_HOME=...`.", keyed=False
    )
    python: str | None = setting(
        None, "Interpreter of the tasks. Null: the one that submits, which they must see.", keyed=False
    )
    wait: bool = setting(
        True, "Follow the jobs to their end. False: return once they are submitted; the same command follows them.",
        keyed=False,
    )  # fmt: skip
    poll_seconds: float = setting(
        10.0, "How often Slurm and the store are looked at meanwhile.", keyed=False, gt=0, le=DAY
    )

    def of(self, stage: str) -> SlurmResources:
        """What a task of ``stage`` asks for."""
        own: SlurmResources = getattr(self, stage)
        return own.over(self.resources)
