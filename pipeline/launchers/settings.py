"""Settings of launchers, resources and fault handling. None of them enters an artifact's key."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from eopd.stages.settings import COUNT, DAY, PROCESSES, THREADS, Settings, setting
from eopd.storage.errors import InputError


class FaultSettings(Settings):
    attempts: int = setting(3, "Failures after which a part counts as poisoned.", keyed=False, ge=1, le=1000)
    losses: int = setting(
        10,
        "Workers that may be lost over one part (killed, node gone) without any progress, before a further loss "
        "counts as a failure of it.",
        keyed=False,
        ge=1,
        le=COUNT,
    )
    backoff_seconds: float = setting(
        2.0, "Wait before the second attempt; doubled before each further one.", keyed=False, ge=0.0, le=DAY
    )
    backoff_limit_seconds: float = setting(300.0, "The longest such wait.", keyed=False, ge=0.0, le=DAY)
    poisoned: Literal["stop", "set_aside"] = setting(
        "stop",
        "A part that failed `attempts` times, or was refused alone. stop: everything that can be done without it is "
        "done, then the run ends. set_aside: it is committed empty, by name, and the run goes on without it.",
        keyed=False,
    )
    full_poll_seconds: float = setting(
        5.0, "How often the free space is looked at while a full disk holds the run up.", keyed=False, gt=0.0, le=DAY
    )


class RayResources(Settings):
    """Resources of one task on Ray."""

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
    """The Ray cluster, and the resources of its tasks."""

    address: str = setting(
        "auto",
        "auto: the cluster this machine belongs to. ray://HOST:10001: one to be reached from outside. local: one of "
        "this machine alone, started for the run.",
        keyed=False,
    )
    guide: RayResources = setting(RayResources, "Resources of guide tasks, in which the teacher samples.", keyed=False)
    rollout: RayResources = setting(RayResources, "Resources of rollout tasks.", keyed=False)
    score: RayResources = setting(RayResources, "Resources of score tasks.", keyed=False)
    train: RayResources = setting(RayResources, "Resources of training, on each of its nodes.", keyed=False)
    evaluate: RayResources = setting(RayResources, "Resources of evaluate tasks.", keyed=False)
    align: RayResources = setting(RayResources, "Resources of align tasks.", keyed=False)
    judge: RayResources = setting(RayResources, "Resources of judge tasks.", keyed=False)
    route: RayResources = setting(RayResources, "Resources of route tasks.", keyed=False)
    attribute: RayResources = setting(RayResources, "Resources of attribute tasks.", keyed=False)
    resources: RayResources = setting(
        RayResources, "Resources of tasks of any other command, such as that of a stage of your own.", keyed=False
    )
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

    def group(self, command: str) -> str:
        """Name of the settings here that hold the resources of a command's tasks."""
        return command if isinstance(getattr(self, command, None), RayResources) else "resources"

    def of(self, command: str) -> RayResources:
        """Resources of a task of one command's stages."""
        resources: RayResources = getattr(self, self.group(command))
        return resources


class SlurmResources(Settings):
    """Resources of one Slurm task. What is null is taken from `resources`, then from the cluster's defaults."""

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
        """Return ``general`` with the fields that are set here replaced."""
        return general.model_copy(update=self.model_dump(exclude_none=True))


class SlurmSettings(Settings):
    resources: SlurmResources = setting(SlurmResources, "Resources of tasks of all other stages.", keyed=False)
    guide: SlurmResources = setting(SlurmResources, "Resources of guide tasks.", keyed=False)
    rollout: SlurmResources = setting(SlurmResources, "Resources of rollout tasks.", keyed=False)
    score: SlurmResources = setting(SlurmResources, "Resources of score tasks.", keyed=False)
    train: SlurmResources = setting(SlurmResources, "Resources of training.", keyed=False)
    evaluate: SlurmResources = setting(SlurmResources, "Resources of evaluate tasks.", keyed=False)
    align: SlurmResources = setting(SlurmResources, "Resources of align tasks.", keyed=False)
    judge: SlurmResources = setting(SlurmResources, "Resources of judge tasks.", keyed=False)
    route: SlurmResources = setting(SlurmResources, "Resources of route tasks.", keyed=False)
    attribute: SlurmResources = setting(SlurmResources, "Resources of attribute tasks.", keyed=False)
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

    def of(self, command: str) -> SlurmResources:
        """Resources of a task of one command's stages."""
        own = getattr(self, command, None)
        return own.over(self.resources) if isinstance(own, SlurmResources) else self.resources


class LauncherSettings(Settings):
    kind: Literal["inline", "local", "ray", "slurm"] = setting(
        "local",
        "inline: every stage in this process. local: worker processes, one a GPU (kept between tasks: `warm`). ray: "
        "tasks on a Ray cluster. slurm: job arrays on a Slurm cluster.",
        keyed=False,
    )
    gpus: list[Annotated[int, Field(ge=0, le=PROCESSES)]] | None = setting(
        None, "local: numbers of the GPUs to use, one job on each. Null: all that are visible.", keyed=False
    )
    workers: int = setting(1, "local, without GPUs: how many tasks run at once.", keyed=False, ge=1, le=PROCESSES)
    warm: bool = setting(
        True,
        "Workers stay up between tasks, with what they imported and the engines they opened; a new student's weights "
        "are taken in place and probed. False: a fresh process (inline: a fresh engine) for every task.",
        keyed=False,
    )
    faults: FaultSettings = setting(FaultSettings, "How failures are handled.", keyed=False)
    ray: RaySettings = setting(RaySettings, "Settings of the ray launcher.", keyed=False)
    slurm: SlurmSettings = setting(SlurmSettings, "Settings of the slurm launcher.", keyed=False)

    @model_validator(mode="after")
    def _slurm_takes(self) -> LauncherSettings:
        """Refuse settings that Slurm would ignore, since it restarts lost tasks and delays the queue itself."""
        ignored = ("losses", "backoff_seconds", "backoff_limit_seconds", "full_poll_seconds")
        for name in ignored if self.kind == "slurm" else ():
            if getattr(self.faults, name) != FaultSettings.model_fields[name].default:
                raise InputError(
                    f"launcher.faults.{name} has no effect with launcher.kind: slurm, whose own queue decides when a "
                    "lost task runs again",
                    setting=f"launcher.faults.{name}",
                    remedy="leave it out",
                )
        return self
