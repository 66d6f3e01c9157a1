"""The stage of `eopd judge`: a verdict on every response of a round's rollouts."""

from __future__ import annotations

from collections.abc import Mapping

from eopd.stages.experiment import Experiment
from eopd.stages.stage import Input, Job, JobContext, Measured, PlanView, Size, Stage
from eopd.stages.verifiers.registry import RULES

VERDICT_BYTES = 24.0  # a verdict's row in Parquet, compressed


class JudgeStage(Stage):
    """Verdicts on the responses of a round, part by part. Planned only if something reads them."""

    name = command = "judge"
    kind = "verdicts"
    needs_gpu = False
    size_settings = "rollout.samples_per_prompt, rollout.prompts_per_round or rounds"
    planned_by = "train.select.verdict: right or wrong; {{verdict}} or {{right_sibling}} in score.teacher_prompt"

    def plan(self, plan: PlanView, round_: int) -> Job | None:
        settings = plan.experiment.settings
        rollouts = plan.output("rollout", round_)
        if rollouts is None or not settings.reads_verdicts or settings.rollouts_carry_verdicts:
            return None
        verifier = settings.prompts.verifier
        assert verifier is not None, "settings that read verdicts without a verifier are refused"
        output = self.identity(
            parts=rollouts.parts,
            settings={**settings.judge.semantic(), "rules": {verifier: RULES[verifier]}},
            inputs={"rollouts": rollouts.key},
        )
        return Job(self, round_, output, {"rollouts": Input(rollouts, by_part=True)})

    def forecast(self, job: Job, experiment: Experiment, inputs: Mapping[str, Size], measured: Measured) -> Size:
        read = inputs["rollouts"]
        responses = experiment.prompts_per_round * experiment.settings.rollout.samples_per_prompt
        each = measured.bytes / measured.responses if measured.responses else VERDICT_BYTES
        return Size(read.tokens, round(responses * each), at_most=read.at_most)

    def run(self, context: JobContext) -> None:
        from eopd.stages.judge.run import JudgeJob, run

        verifier = context.settings.prompts.verifier
        assert verifier is not None
        run(
            JudgeJob(
                output=context.output,
                parts=context.parts,
                rollouts=context.inputs["rollouts"],
                settings=context.settings.judge,
                verifier=verifier,
                student=context.experiment.first_student,
                progress=context.progress,
            )
        )
