"""Stages: inputs, output, resources and execution of each kind of job. Imports no torch.

Every stage is one object in ``stages.table.STAGES``. The plan asks each for its job of every round; launchers ask for
its resources; a worker calls ``run``. A stage that is added there is planned, started, resumed, shown and collected
like the others.

Terms: a **job** makes one artifact (or what is missing of it); a **task** is some parts of a job, done by one worker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from eopd.stages.evaluate.settings import EvaluateSettings
from eopd.stages.experiment import Experiment, ModelFacts
from eopd.stages.experiment_settings import ExperimentSettings
from eopd.stages.job import ModelRef, Progress
from eopd.stages.memory import Memory, ModelSize
from eopd.stages.models.model_config import resolve_dtype
from eopd.stages.models.settings import ModelSettings
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import InputError
from eopd.storage.identity import Identity
from eopd.storage.paths import CHECKPOINTS, WEIGHTS

if TYPE_CHECKING:
    from eopd.stages.engines.kept import Engines

SAMPLED_TOKEN_BYTES = 12.0  # id, log-prob and text of a sampled token in Parquet, before compression


@dataclass(frozen=True)
class Input:
    """An artifact that a job reads."""

    identity: Identity
    parts: tuple[int, ...] | None = None  # the parts it reads; None: all
    by_part: bool = False  # part i of the output is made from part i alone

    def needed(self) -> set[int]:
        return set(range(self.identity.parts)) if self.parts is None else set(self.parts)


@dataclass(frozen=True)
class Job:
    """One artifact to make in one round, and its inputs."""

    stage: Stage
    round: int
    output: Identity
    inputs: Mapping[str, Input] = field(default_factory=dict)  # by role
    variant: str = ""  # which of the stage's jobs of a round, where there are several (``Stage.variants``)

    @property
    def name(self) -> str:
        return f"{self.stage.name} {self.round}" + (f" ({self.variant})" if self.variant else "")

    @property
    def teacher(self) -> str:
        """Return the name of the teacher whose job this is, if there are several."""
        return self.variant if self.stage.by_teacher else ""

    @property
    def log_stem(self) -> str:
        """The common beginning of the names of its logs: rollout-0, score-1, score-1.math."""
        return f"{self.stage.name}-{self.round}" + (f".{self.variant}" if self.variant else "")

    @property
    def key(self) -> tuple[str, str]:
        """Kind and key of the output: jobs of several runs with equal keys are one job."""
        return self.output.kind, self.output.key

    @property
    def is_prunable(self) -> bool:
        """True if old outputs of this kind give up their data (``pipeline.retention``)."""
        return self.output.kind == CHECKPOINTS

    @property
    def scratch(self) -> Identity | None:
        """Resumable states on the way to the output; dropped once it is complete."""
        return self.stage.scratch(self)


class PlanView(Protocol):
    """View of the plan for a stage while the plan is being made."""

    experiment: Experiment
    variant: str  # the job that is asked for, of a stage with several in a round

    def output(self, stage: str, round_: int, variant: str = "") -> Identity | None:
        """Return the output of a job that was planned before; None if there is no such job."""

    def by_teacher(self, stage: str, round_: int) -> Mapping[str, Identity]:
        """Return the outputs of a stage's jobs of a round by teacher; ``""`` if there is one teacher."""

    def policy(self, round_: int) -> Identity | None:
        """Return the checkpoint that is the student at the start of ``round_``; None: the external student."""

    def teacher(self, round_: int) -> Identity | None:
        """The checkpoint that is the teacher of ``round_``; None: the external teacher."""


@dataclass(frozen=True)
class JobContext:
    """Context of a job that is run: where to read, write and report."""

    experiment: Experiment
    job: Job
    parts: Sequence[int]  # of the output
    output: Artifact
    inputs: Mapping[str, Artifact]  # by role
    scratch: Artifact | None
    progress: Progress
    log_dir: Path
    run_dir: Path
    engines: Engines

    @property
    def settings(self) -> ExperimentSettings:
        return self.experiment.settings

    @property
    def student(self) -> ModelRef:
        """Return the student that this job reads: its `policy` input, or the external student."""
        return student_at(self.experiment, self.inputs.get("policy"))

    @property
    def teacher(self) -> ModelRef:
        """The teacher that this job reads: its `teacher` input, or the external teacher."""
        return teacher_at(self.experiment, self.inputs.get("teacher"))


@dataclass(frozen=True)
class Measured:
    """Sums over the committed parts that were read."""

    parts: int = 0
    responses: int = 0
    tokens: int = 0
    bytes: int = 0
    tokens_read: int = 0  # more than tokens where a model reads a response more than once

    def __add__(self, other: Measured) -> Measured:
        return Measured(
            self.parts + other.parts,
            self.responses + other.responses,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.tokens_read + other.tokens_read,
        )


@dataclass(frozen=True)
class Size:
    """Size of a whole job."""

    tokens: int = 0  # sampled or read
    bytes: int = 0  # of its output, about
    at_most: bool = False  # nothing alike was measured: tokens are an upper bound
    most_bytes: int | None = None  # what its output cannot exceed, if that is known


@dataclass(frozen=True)
class Models:
    """Shapes of the two models."""

    student: ModelSize
    teacher: ModelSize


class Stage(ABC):
    """One kind of job."""

    name: ClassVar[str]  # of its jobs: "score 3"
    kind: ClassVar[str]  # of its artifacts
    version: ClassVar[int] = 1  # enters keys; raise it when equal settings give other bytes
    command: ClassVar[str]  # the `eopd` command, and the launcher's resources, that it belongs to
    divisible: ClassVar[bool] = True  # parts can be done, and given up, separately
    needs_gpu: ClassVar[bool] = True  # a task uses one where there is one; ``gpus`` may say how many
    spans_nodes: ClassVar[bool] = False  # processes on several nodes may do one task together
    size_settings: ClassVar[str] = "rounds"  # settings that its output's size depends on, for messages
    planned_by: ClassVar[str] = ""  # the setting without which no plan has it; empty: every plan has it
    by_teacher: ClassVar[bool] = False  # each of several teachers has a job of its own
    engine: ClassVar[str] = ""  # stages of one name share a loaded engine when one worker does both

    @abstractmethod
    def plan(self, plan: PlanView, round_: int) -> Job | None:
        """Plan the job of a round (0 to ``rounds``; the last one has no training), or return None if there is none.

        Of a stage with several ``variants``, the job that is ``plan.variant``; of one that is ``by_teacher``,
        ``plan.experiment`` has that teacher.
        """

    def variants(self, experiment: Experiment) -> Sequence[str]:
        """Return the names of its jobs of one round: of each teacher or mode where there are several, else ``""``."""
        return tuple(experiment.facts.teacher_models) if self.by_teacher else ("",)

    @abstractmethod
    def run(self, context: JobContext) -> None:
        """Do the missing parts of ``context.parts``. Heavy modules are imported here."""

    def gpus(self, settings: ExperimentSettings) -> int:
        """Return the GPUs that one task uses at once; 0: none, whatever the machine has."""
        return int(self.needs_gpu)

    @abstractmethod
    def forecast(self, job: Job, experiment: Experiment, inputs: Mapping[str, Size], measured: Measured) -> Size:
        """Forecast the size of the job.

        Args:
            inputs: sizes of the inputs' jobs, by role.
            measured: sums over parts of this job, or else of other jobs of this stage; empty if there are none.
        """

    def lacks(self) -> InputError | None:
        """Return an error about a package that this stage alone needs and that is not installed; None: nothing."""
        return None

    def check(self, job: Job, experiment: Experiment) -> str | None:
        """Refuse, before any work, inputs from outside the store that a job cannot read. Raises ValueError.

        Returns:
            A warning, if there is something that people should know about the job.
        """
        return None

    def memory(self, settings: ExperimentSettings, models: Models, gpu_bytes: int) -> Memory | None:
        """Predict the peak memory of one process.

        Args:
            gpu_bytes: of its GPU; 0: a CPU.

        Returns:
            None if the stage holds no model, or no plan of these settings has it.
        """
        return None

    def processes(self, settings: ExperimentSettings) -> int:
        """Return the processes that do one task together; more than 1 are started by torchrun."""
        return 1

    def scratch(self, job: Job) -> Identity | None:
        return None

    def identity(self, parts: int, settings: Mapping[str, object], inputs: Mapping[str, str]) -> Identity:
        return Identity(kind=self.kind, version=self.version, parts=parts, settings=settings, inputs=inputs)


@dataclass(frozen=True)
class SummaryJob:
    """Summary of a complete artifact, in one part."""

    output: Artifact
    source: Artifact
    settings: EvaluateSettings
    progress: Progress


class SummaryStage(Stage):
    """Figures of one complete artifact of `eopd evaluate` or `eopd align`, with intervals."""

    divisible = False
    needs_gpu = False
    source: ClassVar[str]  # the stage that makes the artifact
    role: ClassVar[str]  # of the artifact among the inputs

    def plan(self, plan: PlanView, round_: int) -> Job | None:
        source, evaluate = plan.output(self.source, round_, plan.variant), plan.experiment.settings.evaluate
        if source is None or evaluate is None:
            return None
        settings = {"resamples": evaluate.resamples, "confidence": evaluate.confidence}
        output = self.identity(parts=1, settings=settings, inputs={self.role: source.key})
        return Job(self, round_, output, {self.role: Input(source)})

    def run(self, context: JobContext) -> None:
        assert context.settings.evaluate is not None
        source, evaluate = context.inputs[self.role], context.settings.evaluate.in_mode(context.job.variant)
        self.summarise(SummaryJob(context.output, source, evaluate, context.progress))

    @abstractmethod
    def summarise(self, job: SummaryJob) -> None:
        """Read all parts of the artifact and commit its figures."""


def sampled_size(responses: int, longest: int, measured: Measured) -> Size:
    """Return the size of sampled responses: as measured, or at most ``longest`` tokens each."""
    tokens = responses * longest
    if measured.responses:
        tokens = round(responses * measured.tokens / measured.responses)
    rate = measured.bytes / measured.tokens if measured.tokens else SAMPLED_TOKEN_BYTES
    return Size(tokens, round(tokens * rate), at_most=not measured.responses)


def read_size(read: Size, bytes_per_token: float, measured: Measured) -> Size:
    """Return the size of data stored for every token that is read."""
    rate = measured.bytes / measured.tokens if measured.tokens else bytes_per_token
    return Size(read.tokens, round(read.tokens * rate), at_most=read.at_most)


def student_at(experiment: Experiment, checkpoint: Artifact | None) -> ModelRef:
    """Return a trained student, or the external one if there is no checkpoint."""
    if checkpoint is None:
        assert experiment.facts.student.checkpoint is None, "the first student is a checkpoint"
        return experiment.first_student
    return _trained(checkpoint, experiment.student_model, experiment.facts.student)


def teacher_at(experiment: Experiment, checkpoint: Artifact | None) -> ModelRef:
    """A teacher that was trained, or the external one if there is no checkpoint."""
    if checkpoint is None:
        return experiment.teacher
    return _trained(checkpoint, experiment.teacher_model, experiment.facts.teacher)


def _trained(checkpoint: Artifact, origin: ModelSettings, facts: ModelFacts) -> ModelRef:
    """A checkpoint as a model; `auto` precision is that of the external model that it was trained from."""
    return ModelRef(
        path=str(checkpoint.part_folder(WEIGHTS)),
        dtype=resolve_dtype(facts.folder, origin.dtype),
        trust_remote_code=origin.trust_remote_code,
        fingerprint=checkpoint.key,
        tokenizer=str(facts.tokenizer_folder),
    )


def policy_key(experiment: Experiment, policy: Identity | None) -> str:
    """Return the value that represents the student in a key."""
    return experiment.facts.student.fingerprint if policy is None else policy.key


def teacher_key(experiment: Experiment, teacher: Identity | None) -> str:
    """Return the value that represents the teacher in a key."""
    return experiment.facts.teacher.fingerprint if teacher is None else teacher.key


def teacher_input(teacher: Identity | None) -> dict[str, Input]:
    """The `teacher` input of a job, if the teacher is a checkpoint."""
    return {} if teacher is None else {"teacher": Input(teacher, parts=(WEIGHTS,))}


def policy_input(policy: Identity | None, *parts: int) -> dict[str, Input]:
    """Return the `policy` input of a job, if the student is a checkpoint; it reads the weights by default."""
    return {} if policy is None else {"policy": Input(policy, parts=parts or (WEIGHTS,))}
