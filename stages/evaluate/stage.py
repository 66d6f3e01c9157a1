"""The stages of `eopd evaluate`: verified samples of every benchmark, and the figures computed from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from eopd.stages.experiment import Experiment
from eopd.stages.experiment_settings import ExperimentSettings
from eopd.stages.memory import Memory, sampling
from eopd.stages.stage import (
    Job,
    JobContext,
    Measured,
    Models,
    PlanView,
    Size,
    Stage,
    SummaryJob,
    SummaryStage,
    policy_input,
    policy_key,
    sampled_size,
)
from eopd.stages.verifiers.registry import RULES

PROBLEM_BYTES = 256  # a problem's row in a summary, before compression
SUMMARISED = ("resamples", "confidence")
"""Settings that only the summary reads."""


def is_evaluated(settings: ExperimentSettings, round_: int) -> bool:
    """True if the student at the start of ``round_`` is evaluated: each `every`-th, the first and the last."""
    evaluate = settings.evaluate
    return evaluate is not None and (round_ % evaluate.every == 0 or round_ == settings.rounds)


def evaluated_modes(settings: ExperimentSettings) -> Sequence[str]:
    """Return the names of an evaluation's jobs of one round: ``""`` for `evaluate` itself, then the other modes."""
    return ("", *(settings.evaluate.mode_names[1:] if settings.evaluate else ()))


class EvaluateStage(Stage):
    """The samples of one mode, graded."""

    name = command = "evaluate"
    kind = "evaluations"
    size_settings = "evaluate.samples, evaluate.max_new_tokens or the benchmarks' limit"
    engine = "sampling"

    def plan(self, plan: PlanView, round_: int) -> Job | None:
        settings, facts = plan.experiment.settings, plan.experiment.facts
        evaluate = settings.evaluate
        if evaluate is None or not is_evaluated(settings, round_):
            return None
        evaluate = evaluate.in_mode(plan.variant)
        policy = plan.policy(round_)
        output = self.identity(
            parts=sum(math.ceil(benchmark.count / evaluate.rows_per_part) for benchmark in facts.benchmarks),
            settings={
                "evaluate": {name: value for name, value in evaluate.semantic().items() if name not in SUMMARISED},
                "seed": settings.seed,
                "stop_ids": list(facts.stop_ids),
                "rules": {one.verifier: RULES[one.verifier] for one in evaluate.benchmarks},
            },
            inputs={
                "policy": policy_key(plan.experiment, policy),
                "tokenizer": facts.student.tokenizer_fingerprint,
                **{f"benchmark {benchmark.name}": benchmark.fingerprint for benchmark in facts.benchmarks},
            },
        )
        return Job(self, round_, output, policy_input(policy))

    def variants(self, experiment: Experiment) -> Sequence[str]:
        return evaluated_modes(experiment.settings)

    def gpus(self, settings: ExperimentSettings) -> int:
        return settings.evaluate.engine_options.tensor_parallel if settings.evaluate else 1

    def memory(self, settings: ExperimentSettings, models: Models, gpu_bytes: int) -> Memory | None:
        evaluate = settings.evaluate
        if evaluate is None:
            return None
        longest = evaluate.max_prompt_tokens + (evaluate.max_new_tokens or settings.rollout.max_new_tokens)
        student, options = settings.student.dtype, evaluate.engine_options
        return sampling(models.student, student, evaluate.engine, options, longest=longest, gpu_bytes=gpu_bytes)

    def forecast(self, job: Job, experiment: Experiment, inputs: Mapping[str, Size], measured: Measured) -> Size:
        evaluate = experiment.settings.evaluate
        assert evaluate is not None
        responses = evaluate.samples * sum(benchmark.count for benchmark in experiment.facts.benchmarks)
        return sampled_size(responses, evaluate.parameters(()).max_new_tokens, measured)

    def run(self, context: JobContext) -> None:
        from eopd.stages.evaluate.run import EvaluateJob, run

        assert context.settings.evaluate is not None
        run(
            EvaluateJob(
                output=context.output,
                parts=context.parts,
                settings=context.settings.evaluate.in_mode(context.job.variant),
                progress=context.progress,
                log_dir=context.log_dir,
                policy=context.student,
                stop_ids=context.experiment.facts.stop_ids,
                seed=context.settings.seed,
                engines=context.engines,
            )
        )


class EvaluationSummaryStage(SummaryStage):
    """Avg@k, Pass@k, lengths and diversity of one evaluation, with intervals."""

    name = "evaluation_summary"
    kind = "evaluation_summaries"
    command = source = "evaluate"
    role = "evaluation"

    def variants(self, experiment: Experiment) -> Sequence[str]:
        return evaluated_modes(experiment.settings)

    def forecast(self, job: Job, experiment: Experiment, inputs: Mapping[str, Size], measured: Measured) -> Size:
        problems = sum(benchmark.count for benchmark in experiment.facts.benchmarks)
        return Size(0, measured.bytes // measured.parts if measured.parts else PROBLEM_BYTES * problems)

    def summarise(self, job: SummaryJob) -> None:
        from eopd.stages.evaluate.run import summarise

        summarise(job)
