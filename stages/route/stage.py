"""The stages of `eopd route`: entropies of the first tokens of an evaluation's samples, and routing by them."""

from __future__ import annotations

from collections.abc import Mapping

from eopd.stages.evaluate.settings import EvaluateSettings
from eopd.stages.experiment import Experiment
from eopd.stages.experiment_settings import ExperimentSettings
from eopd.stages.memory import Memory, reading
from eopd.stages.route.settings import STANDARD, RouteSettings
from eopd.stages.stage import Input, Job, JobContext, Measured, Models, PlanView, Size, Stage, policy_input, read_size

ENTROPY_BYTES = 4.0  # a stored entropy
CHOICE_BYTES = 64.0  # a response's row of choices, compressed
PLANNED_BY = "evaluate.route"


class EntropiesStage(Stage):
    """The student's entropies at the first tokens of its evaluation samples, by part."""

    name = kind = "entropies"
    command = "route"
    size_settings = "evaluate.route.tokens or evaluate.samples"
    planned_by = PLANNED_BY

    def plan(self, plan: PlanView, round_: int) -> Job | None:
        asked, evaluation = _asked(plan.experiment.settings), plan.output("evaluate", round_)
        if asked is None or evaluation is None:
            return None
        output = self.identity(
            parts=evaluation.parts,
            settings={"tokens": asked[1].tokens},
            inputs={"evaluation": evaluation.key},  # which has the policy
        )
        inputs = {"evaluation": Input(evaluation, by_part=True), **policy_input(plan.policy(round_))}
        return Job(self, round_, output, inputs)

    def memory(self, settings: ExperimentSettings, models: Models, gpu_bytes: int) -> Memory | None:
        asked = _asked(settings)
        if asked is None:
            return None
        longest = asked[0].max_prompt_tokens + asked[1].tokens
        return reading(
            models.student,
            settings.student.dtype,
            "transformers",
            asked[0].engine_options,
            tokens=8192,
            row_tokens=2048,
            longest=longest,
            gpu_bytes=gpu_bytes,
        )

    def forecast(self, job: Job, experiment: Experiment, inputs: Mapping[str, Size], measured: Measured) -> Size:
        asked, sampled = _asked(experiment.settings), inputs["evaluation"]
        assert asked is not None
        tokens = min(sampled.tokens, _responses(experiment) * asked[1].tokens)
        return read_size(Size(tokens, at_most=True), ENTROPY_BYTES, measured)

    def run(self, context: JobContext) -> None:
        from eopd.stages.route.entropies import EntropiesJob, run

        assert context.settings.evaluate is not None
        run(
            EntropiesJob(
                output=context.output,
                parts=context.parts,
                evaluation=context.inputs["evaluation"],
                policy=context.student,
                settings=context.settings.evaluate,
                progress=context.progress,
                engines=context.engines,
            )
        )


class RouteStage(Stage):
    """A mode for each problem by the entropies of its first tokens, against other ways to choose one."""

    name = command = "route"
    kind = "routings"
    needs_gpu = False
    divisible = False
    planned_by = PLANNED_BY

    def plan(self, plan: PlanView, round_: int) -> Job | None:
        settings = plan.experiment.settings
        asked, entropies = _asked(settings), plan.output("entropies", round_)
        if asked is None or entropies is None:
            return None
        evaluate, route = asked
        made = {name: plan.output("evaluate", round_, _variant(name)) for name in evaluate.mode_names}
        evaluations = {name: evaluation for name, evaluation in made.items() if evaluation is not None}
        output = self.identity(
            parts=1,
            settings={
                "route": route.semantic(),
                "modes": evaluate.mode_names,
                "seed": settings.seed,
                "resamples": evaluate.resamples,
                "confidence": evaluate.confidence,
            },
            inputs={
                "entropies": entropies.key,
                **{f"evaluation {name}": evaluation.key for name, evaluation in evaluations.items()},
            },
        )
        inputs = {"entropies": Input(entropies)}
        inputs |= {_role(name): Input(evaluation) for name, evaluation in evaluations.items()}
        return Job(self, round_, output, inputs)

    def forecast(self, job: Job, experiment: Experiment, inputs: Mapping[str, Size], measured: Measured) -> Size:
        return Size(
            0, measured.bytes // measured.parts if measured.parts else round(CHOICE_BYTES * _responses(experiment))
        )

    def run(self, context: JobContext) -> None:
        from eopd.stages.route.run import RouteJob, run

        evaluate = context.settings.evaluate
        assert evaluate is not None
        run(
            RouteJob(
                output=context.output,
                evaluations={name: context.inputs[_role(name)] for name in evaluate.mode_names},
                entropies=context.inputs["entropies"],
                settings=evaluate,
                seed=context.settings.seed,
                progress=context.progress,
            )
        )


def _asked(settings: ExperimentSettings) -> tuple[EvaluateSettings, RouteSettings] | None:
    evaluate = settings.evaluate
    return None if evaluate is None or evaluate.route is None else (evaluate, evaluate.route)


def _variant(mode: str) -> str:
    return "" if mode == STANDARD else mode


def _role(mode: str) -> str:
    return f"evaluation {mode}"


def _responses(experiment: Experiment) -> int:
    evaluate = experiment.settings.evaluate
    return 0 if evaluate is None else evaluate.samples * sum(one.count for one in experiment.facts.benchmarks)
