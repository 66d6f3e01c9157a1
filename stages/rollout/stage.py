"""The stages of `eopd guide` and `eopd rollout`: the teacher's responses, a round's, and the student's top tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eopd.stages.experiment import Experiment
from eopd.stages.experiment_settings import ExperimentSettings
from eopd.stages.memory import Memory, sampling
from eopd.stages.models.prompts import draw_prompts
from eopd.stages.rollout.segments import Prefixes, prefixes_of
from eopd.stages.rollout.settings import RolloutSettings
from eopd.stages.stage import (
    Input,
    Job,
    JobContext,
    Measured,
    Models,
    PlanView,
    Size,
    Stage,
    policy_input,
    policy_key,
    read_size,
    sampled_size,
    teacher_input,
)
from eopd.stages.verifiers.registry import RULES
from eopd.storage.files import canonical_json, sha256_text
from eopd.storage.identity import KEY_LENGTH, Identity

TOPK_ENTRY_BYTES = 4.0  # id and log-prob
COINS = 1  # version of how the coins of mixed responses are drawn


def drawn_rows(experiment: Experiment, round_: int) -> list[list[int]]:
    """Return the rows of the prompt source that a round samples, per part."""
    settings = experiment.settings
    per_round = experiment.prompts_per_round
    rows = draw_prompts(experiment.facts.prompt_count, per_round, round_, settings.seed)
    step = settings.rollout.rows_per_part
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def prefixes_at(experiment: Experiment, round_: int) -> Prefixes | None:
    """Return the teacher's part of a round's responses; None if it has none."""
    settings = experiment.settings
    responses = experiment.prompts_per_round * settings.rollout.samples_per_prompt
    return prefixes_of(settings.rollout, settings.rounds, round_, responses)


def judged_by(settings: ExperimentSettings) -> dict[str, Any]:
    """Return the settings that decide the verdicts in rollouts, as part of a key."""
    if not settings.rollouts_carry_verdicts:
        return {}
    verifier = settings.prompts.verifier
    assert verifier is not None, "settings that judge without a verifier are refused"
    return {"judge": {**settings.judge.semantic(), "verifier": verifier, "rules": RULES[verifier]}}


def pieces_of(settings: ExperimentSettings) -> dict[str, Any]:
    """Return the part of a key that decides who writes which token of mixed or revised responses."""
    rollout = settings.rollout
    if rollout.source == "revise":
        return {"revise": {**rollout.revise.semantic(), "first_tokens": rollout.revised_from}}
    if rollout.source != "mixed":
        return {}
    needs_solution = "solution" in settings.rollout.mixed.expert.values_needed
    return {
        "mixed": settings.rollout.mixed.semantic(),
        "coins": COINS,
        **({"solution": settings.prompts.columns.solution} if needs_solution else {}),
    }


class _Sampling(Stage):
    """A stage that makes rollouts."""

    kind = "rollouts"
    engine = "sampling"

    def _made(self, experiment: Experiment, round_: int, settings: dict[str, Any], inputs: dict[str, str]) -> Identity:
        """Return the identity of a round's responses, with the fields that all sources share."""
        parts = drawn_rows(experiment, round_)
        return self.identity(
            parts=len(parts),
            settings={
                **settings,
                "prompts": experiment.settings.prompts.semantic(),
                "drawn": sha256_text(canonical_json(parts))[:KEY_LENGTH],
                "stop_ids": list(experiment.facts.stop_ids),
            },
            inputs={
                **inputs,
                "tokenizer": experiment.facts.student.tokenizer_fingerprint,
                "prompts": experiment.facts.prompts_fingerprint,
            },
        )

    def _by_the_teacher(self, experiment: Experiment, round_: int) -> Identity:
        """Plan the teacher's responses, which depend on no objective, schedule or student, so that experiments share
        them."""
        settings, teacher = experiment.settings, experiment.facts.teacher
        reads = settings.score.teacher_prompt
        judged = judged_by(settings) if self.name != "guide" else {}
        return self._made(
            experiment,
            round_,
            {
                "source": "teacher",
                "rollout": settings.rollout.guided().semantic(),
                "teacher_prompt": reads.semantic(),
                **({"solution": settings.prompts.columns.solution} if "solution" in reads.used else {}),
                "seed": experiment.sampling_seed(round_),
                **judged,
            },
            {"policy": teacher.fingerprint, "teacher_tokenizer": teacher.tokenizer_fingerprint},
        )

    def gpus(self, settings: ExperimentSettings) -> int:
        return self._settings(settings).engine_options.tensor_parallel

    def forecast(self, job: Job, experiment: Experiment, inputs: Mapping[str, Size], measured: Measured) -> Size:
        rollout = self._settings(experiment.settings)
        responses = experiment.prompts_per_round * rollout.samples_per_prompt
        return sampled_size(responses, rollout.max_new_tokens, measured)

    def memory(self, settings: ExperimentSettings, models: Models, gpu_bytes: int) -> Memory | None:
        rollout, by_teacher = self._settings(settings), self._is_by_the_teacher(settings)
        if rollout.source == "data" or (self.name == "guide" and rollout.source != "prefix"):
            return None
        return sampling(
            models.teacher if by_teacher else models.student,
            settings.teacher.dtype if by_teacher else settings.student.dtype,
            rollout.engine_kind,
            rollout.engine_options,
            longest=settings.prompts.max_prompt_tokens + rollout.max_new_tokens,
            gpu_bytes=gpu_bytes,
            contexts=2 if rollout.source == "mixed" else 1,
        )

    def _settings(self, settings: ExperimentSettings) -> RolloutSettings:
        """Return the settings by which this stage samples."""
        return settings.rollout.guided() if self._is_by_the_teacher(settings) else settings.rollout

    def _is_by_the_teacher(self, settings: ExperimentSettings) -> bool:
        """True if the teacher is the model that samples."""
        return self.name == "guide" or settings.rollout.source == "teacher"

    def run(self, context: JobContext) -> None:
        from eopd.stages.rollout.run import RolloutJob, run

        experiment, settings = context.experiment, context.settings
        by_teacher = self._is_by_the_teacher(settings)
        if settings.rollout.source == "data":
            policy = experiment.first_student  # none is planned; its tokenizer is read
        else:
            policy = context.teacher if by_teacher else context.student
        run(
            RolloutJob(
                output=context.output,
                parts=context.parts,
                settings=self._settings(settings),
                progress=context.progress,
                log_dir=context.log_dir,
                policy=policy,
                student=experiment.first_student,
                prompts=settings.prompts,
                prompt_indices=drawn_rows(experiment, context.job.round),
                stop_ids=experiment.facts.ordered_stop_ids,
                seed=experiment.sampling_seed(context.job.round),
                teacher_prompt=settings.score.teacher_prompt if by_teacher else None,
                guide=context.inputs.get("guide"),
                prefixes=prefixes_at(experiment, context.job.round),
                judge=settings.judge if self.name != "guide" and settings.rollouts_carry_verdicts else None,
                engines=context.engines,
            )
        )


class GuideStage(_Sampling):
    """The teacher's own responses; those of `rollout.source: prefix` begin with a part of them."""

    name = command = "guide"
    size_settings = "rollout.guide.samples, rollout.prompts_per_round, rollout.guide.max_new_tokens or rounds"

    def plan(self, plan: PlanView, round_: int) -> Job | None:
        experiment = plan.experiment
        if round_ >= experiment.settings.rounds or prefixes_at(experiment, round_) is None:
            return None
        return Job(self, round_, self._by_the_teacher(experiment, round_), teacher_input(plan.teacher(round_)))


class RolloutStage(_Sampling):
    """The responses of a round."""

    name = command = "rollout"
    size_settings = "rollout.samples_per_prompt, rollout.prompts_per_round, rollout.max_new_tokens or rounds"

    def plan(self, plan: PlanView, round_: int) -> Job | None:
        experiment, settings = plan.experiment, plan.experiment.settings
        if round_ >= settings.rounds:
            return None
        if settings.rollout.source == "data":  # no policy: all students share it
            kept = {
                "source": "data",
                "rollout": {"max_new_tokens": settings.rollout.max_new_tokens},
                "end": list(experiment.facts.student.stop_ids[:1]),
            }
            return Job(self, round_, self._made(experiment, round_, kept, {}))
        if settings.rollout.source == "teacher":
            return Job(self, round_, self._by_the_teacher(experiment, round_), teacher_input(plan.teacher(round_)))
        policy = plan.policy(experiment.sampling_round(round_))
        sampled: dict[str, Any] = {
            "rollout": settings.rollout.semantic(),
            "seed": experiment.sampling_seed(round_),
            **judged_by(settings),
            **pieces_of(settings),
        }
        keys, inputs = {"policy": policy_key(experiment, policy)}, policy_input(policy)
        prefixes, guide = prefixes_at(experiment, round_), plan.output("guide", round_)
        if prefixes is not None:
            assert guide is not None, round_
            sampled["prefix"] = prefixes.identity()
            keys["guide"] = guide.key
            inputs["guide"] = Input(guide, by_part=True)
        return Job(self, round_, self._made(experiment, round_, sampled, keys), inputs)

    def gpus(self, settings: ExperimentSettings) -> int:
        return 0 if settings.rollout.source == "data" else super().gpus(settings)


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
