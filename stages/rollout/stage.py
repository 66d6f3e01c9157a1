"""The stages of `eopd rollout`: the student's responses and, if asked for, its own most probable tokens."""

from __future__ import annotations

from collections.abc import Mapping

from eopd.stages.experiment import Experiment, ExperimentSettings
from eopd.stages.models.prompts import draw_prompts
from eopd.stages.stage import (
    Input,
    Job,
    JobContext,
    Measured,
    PlanView,
    Size,
    Stage,
    policy_input,
    policy_key,
    read_size,
    sampled_size,
)
from eopd.storage.files import canonical_json, sha256_text
from eopd.storage.identity import KEY_LENGTH

TOPK_ENTRY_BYTES = 4.0  # id and log-prob


def drawn_rows(experiment: Experiment, round_: int) -> list[list[int]]:
    """Rows of the prompt source that a round samples, per part."""
    settings = experiment.settings
    per_round = experiment.prompts_per_round
    rows = draw_prompts(experiment.facts.prompt_count, per_round, round_, settings.seed)
    step = settings.rollout.rows_per_part
    return [rows[start : start + step] for start in range(0, len(rows), step)]


class RolloutStage(Stage):
    name = command = "rollout"
    kind = "rollouts"
    size_settings = "rollout.samples_per_prompt, rollout.prompts_per_round, rollout.max_new_tokens or rounds"
    engine = "sampling"

    def plan(self, plan: PlanView, round_: int) -> Job | None:
        experiment, settings = plan.experiment, plan.experiment.settings
        if round_ >= settings.rounds:
            return None
        policy = plan.policy(experiment.sampling_round(round_))
        parts = drawn_rows(experiment, round_)
        output = self.identity(
            parts=len(parts),
            settings={
                "rollout": settings.rollout.semantic(),
                "prompts": settings.prompts.semantic(),
                "drawn": sha256_text(canonical_json(parts))[:KEY_LENGTH],
                "seed": experiment.sampling_seed(round_),
                "stop_ids": list(experiment.facts.stop_ids),
            },
            inputs={
                "policy": policy_key(experiment, policy),
                "tokenizer": experiment.facts.student.tokenizer_fingerprint,
                "prompts": experiment.facts.prompts_fingerprint,
            },
        )
        return Job(self, round_, output, policy_input(policy))

    def gpus(self, settings: ExperimentSettings) -> int:
        return settings.rollout.engine_options.tensor_parallel

    def forecast(self, job: Job, experiment: Experiment, inputs: Mapping[str, Size], measured: Measured) -> Size:
        rollout = experiment.settings.rollout
        responses = experiment.prompts_per_round * rollout.samples_per_prompt
        return sampled_size(responses, rollout.max_new_tokens, measured)

    def run(self, context: JobContext) -> None:
        from eopd.stages.rollout.run import RolloutJob, run

        experiment, settings = context.experiment, context.settings
        run(
            RolloutJob(
                output=context.output,
                parts=context.parts,
                settings=settings.rollout,
                progress=context.progress,
                log_dir=context.log_dir,
                policy=context.student,
                prompts=settings.prompts,
                prompt_indices=drawn_rows(experiment, context.job.round),
                stop_ids=experiment.facts.stop_ids,
                seed=experiment.sampling_seed(context.job.round),
                engines=context.engines,
            )
        )


class StudentTopkStage(Stage):
    """The student's own top-k at every sampled position, by part of the rollouts."""

    name = "student_topk"
    kind = "student_topk"
    size_settings = "rollout.student_topk, rollout.samples_per_prompt or rounds"
    command = "rollout"

    def plan(self, plan: PlanView, round_: int) -> Job | None:
        k = plan.experiment.settings.rollout.student_topk
        rollouts = plan.output("rollout", round_)
        if rollouts is None or not k:
            return None
        output = self.identity(parts=rollouts.parts, settings={"k": k}, inputs={"rollouts": rollouts.key})
        policy = plan.policy(plan.experiment.sampling_round(round_))
        return Job(self, round_, output, {"rollouts": Input(rollouts, by_part=True), **policy_input(policy)})

    def gpus(self, settings: ExperimentSettings) -> int:
        return 1

    def forecast(self, job: Job, experiment: Experiment, inputs: Mapping[str, Size], measured: Measured) -> Size:
        return read_size(inputs["rollouts"], TOPK_ENTRY_BYTES * experiment.settings.rollout.student_topk, measured)

    def run(self, context: JobContext) -> None:
        from eopd.stages.rollout.student_topk import StudentTopkJob, run

        run(
            StudentTopkJob(
                output=context.output,
                parts=context.parts,
                rollouts=context.inputs["rollouts"],
                policy=context.student,
                settings=context.settings.rollout,
                progress=context.progress,
                engines=context.engines,
            )
        )
