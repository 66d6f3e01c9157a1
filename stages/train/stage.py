"""The stage of `eopd train`: one round of optimisation on stored rollouts and scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.stages.experiment import Experiment
from eopd.stages.experiment_settings import ExperimentSettings
from eopd.stages.memory import Memory, training
from eopd.stages.models.weight_files import read_tensors
from eopd.stages.stage import Input, Job, JobContext, Measured, Models, PlanView, Size, Stage, policy_input, policy_key
from eopd.stages.train.settings import LoraSettings, TrainSettings
from eopd.storage.identity import Identity
from eopd.storage.paths import CHECKPOINTS, OPTIMIZER, WEIGHTS

if TYPE_CHECKING:
    from eopd.stages.train.job import TrainJob


# -- footprint --------------------------------------------------------------------------------------------------------

# The size of a checkpoint before any exists, from the shapes of the student's tensors.
#
# Nothing here loads a model: shapes are in the headers of its safetensors files. Sizes are bytes.


Shapes = Mapping[str, tuple[int, ...]]

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MOMENTS = 2  # of AdamW: means of the gradient and of its square
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_out")


@dataclass(frozen=True)
class CheckpointBytes:
    """Bytes of one round's checkpoint, by part, and of a resumable state while the round trains."""

    weights: int
    optimizer: int
    state: int


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model folder, by the headers of its weights. Raises ValueError
    (``weight_files``)."""
    return {name: tensor.shape for name, tensor in read_tensors(folder).items()}


def parameter_count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def adapter_count(shapes: Shapes, lora: LoraSettings) -> int:
    """Count the parameters of the low-rank adapters: rank * (in + out) of every matrix that gets one."""
    sizes = 0
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if len(shape) != 2 or any(part in EMBEDDINGS for part in layer.split(".")):
            continue
        if lora.target_modules == "all-linear" or layer.endswith(lora.target_modules):
            sizes += lora.rank * (shape[0] + shape[1])
    return sizes


def checkpoint_bytes(shapes: Shapes, train: TrainSettings) -> CheckpointBytes:
    """Return the bytes of a checkpoint's two parts and of a resumable state, without tokenizer files and stored
    log-probs."""
    size = BYTES[train.param_dtype]
    weights = parameter_count(shapes) * size
    trained = weights if train.lora is None else adapter_count(shapes, train.lora) * size
    average = 0 if train.ema is None else parameter_count(shapes) * BYTES["float32"]
    moments = MOMENTS * trained
    adapter = 0 if train.lora is None else trained
    return CheckpointBytes(weights, moments + average + adapter, trained + moments + average)


# -- the stage --------------------------------------------------------------------------------------------------------

PROGRESS_PARTS = 10**9  # resumable states are numbered by optimiser step, whose number is unbounded


_shapes = cache(read_shapes)


def student_bytes(experiment: Experiment) -> CheckpointBytes:
    """Return sizes of a checkpoint of this experiment's student."""
    return checkpoint_bytes(_shapes(experiment.facts.student.folder), experiment.settings.train)


def schedule_rounds(settings: ExperimentSettings) -> int:
    """Count the rounds that the learning rate's schedule spans."""
    return settings.rounds if settings.train.optimizer.carry_over else 1


class TrainStage(Stage):
    name = command = "train"
    kind = CHECKPOINTS
    size_settings = "train.keep_checkpoints, train.keep_optimizer_states or rounds"
    divisible = False
    spans_nodes = True

    def plan(self, plan: PlanView, round_: int) -> Job | None:
        experiment, settings = plan.experiment, plan.experiment.settings
        rollouts, scores = plan.output("rollout", round_), plan.by_teacher("score", round_)
        if rollouts is None:
            return None
        policy, verdicts = plan.policy(round_), plan.output("judge", round_)
        if settings.selects_by_verdict and verdicts is None and not settings.rollouts_carry_verdicts:
            return None
        read = {"rollouts": rollouts}
        read.update({scores_role(teacher): identity for teacher, identity in scores.items()})
        if settings.selects_by_verdict and verdicts is not None:
            read["verdicts"] = verdicts
        train = settings.train.semantic()
        if settings.has_prefixes:
            train["prefix_beta"] = settings.train.objective.prefix_beta
        if settings.trained_tokens != settings.default_tokens:
            train["tokens"] = settings.trained_tokens
        output = self.identity(
            parts=2,
            settings={
                "train": train,
                "seed": settings.seed,
                "round": round_,
                **self._schedule(experiment),
                "stop_ids": list(experiment.facts.ordered_stop_ids),
                **self._main_stops(experiment),
            },
            inputs={
                "student": policy_key(experiment, policy),
                "tokenizer": experiment.facts.student.tokenizer_fingerprint,
                **{role: identity.key for role, identity in read.items()},
            },
        )
        carries_state = round_ > 0 and settings.train.optimizer.carry_over and settings.train.lora is None
        of_policy = (WEIGHTS, OPTIMIZER) if carries_state else (WEIGHTS,)
        inputs = {role: Input(identity) for role, identity in read.items()}
        return Job(self, round_, output, {**inputs, **policy_input(policy, *of_policy)})

    @staticmethod
    def _schedule(experiment: Experiment) -> dict[str, int | None]:
        """Return the steps that the learning rate's schedule spans; None for a constant rate, which depends on no span.

        With a selection the number of steps follows from the inputs, and the schedule spans a number of rounds.
        """
        optimizer = experiment.settings.train.optimizer
        rounds = schedule_rounds(experiment.settings)
        if not experiment.settings.train.select.is_everything:
            return {"schedule_rounds": None if optimizer.schedule == "constant" else rounds}
        return {"total_steps": None if optimizer.schedule == "constant" else experiment.most_steps(0) * rounds}

    @staticmethod
    def _main_stops(experiment: Experiment) -> dict[str, list[int]]:
        """Return each model's main stop id, which enters the key under `stops: remap`; other modes depend on the
        union."""
        if experiment.settings.train.objective.stops != "remap":
            return {}
        facts = experiment.facts
        return {"stops": [*facts.student.stop_ids[:1], *facts.teacher_stop_ids[:1]]}

    def gpus(self, settings: ExperimentSettings) -> int:
        return settings.train.processes

    def memory(self, settings: ExperimentSettings, models: Models, gpu_bytes: int) -> Memory:
        longest = settings.prompts.max_prompt_tokens + settings.rollout.max_new_tokens
        return training(models.student, settings.train, longest=longest, gpu_bytes=gpu_bytes)

    def processes(self, settings: ExperimentSettings) -> int:
        return settings.train.processes

    def forecast(self, job: Job, experiment: Experiment, inputs: Mapping[str, Size], measured: Measured) -> Size:
        read, checkpoint = inputs["rollouts"], student_bytes(experiment)
        tokens = round(read.tokens * experiment.most_epochs(job.round))
        at_most = read.at_most or experiment.settings.selects_by_verdict
        return Size(tokens, checkpoint.weights + checkpoint.optimizer, at_most)

    def scratch(self, job: Job) -> Identity:
        return Identity("progress", 1, PROGRESS_PARTS, inputs={"checkpoint": job.output.key})

    def run(self, context: JobContext) -> None:
        from eopd.stages.train.run import run

        run(train_job(context))


def scores_role(teacher: str) -> str:
    """Return the role of a teacher's scores among the inputs of training."""
    return f"scores.{teacher}" if teacher else "scores"


def train_job(context: JobContext) -> TrainJob:
    """Return the train stage's inputs for a planned job."""
    from eopd.stages.train.job import Selection, TrainJob

    experiment, settings = context.experiment, context.settings
    round_, steps = context.job.round, experiment.most_steps(context.job.round)
    carries = settings.train.optimizer.carry_over
    selection, steps_before = None, None
    if not settings.train.select.is_everything:
        verdicts = context.inputs.get("verdicts")
        selection = Selection(settings.train.select, experiment.facts.selected_prompts, verdicts)
        steps_before = sum(map(experiment.most_steps, range(round_)))
    assert context.scratch is not None
    return TrainJob(
        output=context.output,
        progress_states=context.scratch,
        student=context.student,
        previous=context.inputs.get("policy") if round_ > 0 else None,
        rollouts=context.inputs["rollouts"],
        scores=tuple(
            context.inputs[role] for role in map(scores_role, experiment.facts.teacher_models) if role in context.inputs
        ),
        source=settings.rollout.source,
        tokens=settings.trained_tokens,
        settings=settings.train,
        round=round_,
        age=round_ - experiment.sampling_round(round_) if settings.rollout.writer_is_the_student else 0,
        total_steps=steps * schedule_rounds(settings),
        first_step=steps * round_ if carries else 0,
        seed=settings.seed,
        temperature=settings.rollout.temperature,
        truncated_rollouts=settings.rollout.parameters(()).truncates,
        student_stop_ids=experiment.facts.student.stop_ids,
        teacher_stop_ids=experiment.facts.teacher_stop_ids,
        progress=context.progress,
        run_dir=context.run_dir,
        selection=selection,
        schedule_rounds=schedule_rounds(settings),
        steps_before=steps_before,
        engines=context.engines,
    )
