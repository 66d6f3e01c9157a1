"""The stages of `eopd attribute`: scores of documents for each query set, and the table of bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eopd.stages.attribute.settings import BERGSON, AttributeSettings, check_model, lacking_bergson
from eopd.stages.experiment import Experiment
from eopd.stages.experiment_settings import ExperimentSettings
from eopd.stages.memory import Memory, training
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
)
from eopd.stages.train.settings import LoraSettings, TrainSettings
from eopd.storage.errors import InputError
from eopd.storage.identity import Identity

SCORE_BYTES = 24.0  # a document's row, compressed
BIN_BYTES = 300.0  # a bin of a query set in the table
FROZEN = LoraSettings(rank=1)
"""A model whose weights stand still is like one of which next to nothing is trained."""


class AttributeStage(Stage):
    """A score for every document, for the samples of one query set."""

    name = command = "attribute"
    kind = "attributions"
    divisible = False
    size_settings = "attribute.documents.limit or attribute.queries"
    planned_by = "attribute"

    def plan(self, plan: PlanView, round_: int) -> Job | None:
        experiment = plan.experiment
        settings, facts, asked = experiment.settings, experiment.facts, _asked(experiment.settings, round_)
        evaluation = plan.output("evaluate", round_)
        if asked is None or evaluation is None or plan.variant not in asked.queries:
            return None
        policy, rollouts = plan.policy(round_), _rollouts(plan, asked)
        keyed = {
            **asked.semantic(),
            "query": asked.queries[plan.variant].semantic(),
            "seed": settings.seed,
            "bergson": BERGSON,
            "normalisation": "unit",
            "preconditioner": "mixed",
        }
        if asked.documents is not None:
            keyed |= {"read_as": asked.documents.source(settings.prompts).semantic(), "stop_ids": _stop_ids(experiment)}
        output = self.identity(
            parts=1,
            settings=keyed,
            inputs={
                "policy": policy_key(experiment, policy),
                "tokenizer": facts.student.tokenizer_fingerprint,
                "evaluation": evaluation.key,
                **_documents(experiment, rollouts),
            },
        )
        inputs = {"evaluation": Input(evaluation), **policy_input(policy)}
        return Job(self, round_, output, inputs | ({} if rollouts is None else {"rollouts": Input(rollouts)}))

    def variants(self, experiment: Experiment) -> Sequence[str]:
        asked = experiment.settings.attribute
        return ("",) if asked is None else tuple(asked.queries)

    def lacks(self) -> InputError | None:
        return lacking_bergson()

    def check(self, job: Job, experiment: Experiment) -> str | None:
        from eopd.stages.attribute.documents import bins_of_file, check_bins

        asked = experiment.settings.attribute
        assert asked is not None
        check_model(experiment.facts.student.folder)
        bins = bins_of_file(asked, experiment.settings.prompts)
        if asked.documents is not None:  # how many rollouts a bin has depends on the draw
            check_bins(asked, bins)
        if was_trained_on_documents(experiment, job.round):
            return None
        return (
            f"warning: attribute: nothing here says that student {job.round} was trained on these documents; if it was "
            "not, a high score says that a document resembles the samples, not that they come from it"
        )

    def memory(self, settings: ExperimentSettings, models: Models, gpu_bytes: int) -> Memory | None:
        asked = settings.attribute
        if asked is None:
            return None
        batch = asked.token_batch
        frozen = TrainSettings(lora=FROZEN, micro_batch_tokens=batch, row_tokens=batch)
        return training(models.student, frozen, longest=batch, gpu_bytes=gpu_bytes, step_tokens=batch)

    def forecast(self, job: Job, experiment: Experiment, inputs: Mapping[str, Size], measured: Measured) -> Size:
        each = measured.bytes / measured.responses if measured.responses else SCORE_BYTES
        read = inputs["rollouts"].tokens if "rollouts" in inputs else measured.tokens
        return Size(read, round(each * _count(experiment)), at_most="rollouts" in inputs)

    def run(self, context: JobContext) -> None:
        from eopd.stages.attribute.run import AttributeJob, run

        settings = context.settings
        assert settings.attribute is not None
        assert settings.evaluate is not None
        run(
            AttributeJob(
                output=context.output,
                query=context.job.variant,
                settings=settings.attribute,
                evaluation=context.inputs["evaluation"],
                evaluate=settings.evaluate,
                rollouts=context.inputs.get("rollouts"),
                prompts=settings.prompts,
                stop_ids=context.experiment.facts.ordered_stop_ids,
                policy=context.student,
                seed=settings.seed,
                log=context.log_dir / f"{context.job.log_stem}.bergson.log",
                progress=context.progress,
                engines=context.engines,
            )
        )


class AttributionSummaryStage(Stage):
    """The bins of the documents by query set, and contrasts of query sets."""

    name = "attribution_summary"
    kind = "attribution_summaries"
    needs_gpu = False
    command = "attribute"
    divisible = False
    planned_by = "attribute"

    def plan(self, plan: PlanView, round_: int) -> Job | None:
        experiment = plan.experiment
        settings, asked = experiment.settings, _asked(experiment.settings, round_)
        if asked is None or settings.evaluate is None:
            return None
        made = {name: plan.output("attribute", round_, name) for name in asked.queries}
        scores = {name: output for name, output in made.items() if output is not None}
        rollouts = _rollouts(plan, asked)
        if len(scores) < len(made):
            return None
        inputs = {_role(name): Input(output) for name, output in scores.items()}
        output = self.identity(
            parts=1,
            settings={
                "bins": list(asked.bins),
                "contrasts": [list(pair) for pair in asked.contrasts],
                "permutations": asked.permutations,
                "seed": settings.seed,
                "resamples": settings.evaluate.resamples,
                "confidence": settings.evaluate.confidence,
            },
            inputs={
                **{role: input_.identity.key for role, input_ in inputs.items()},
                **({} if rollouts is None else {"prompts": experiment.facts.prompts_fingerprint}),
            },
        )
        return Job(self, round_, output, inputs | ({} if rollouts is None else {"rollouts": Input(rollouts)}))

    def forecast(self, job: Job, experiment: Experiment, inputs: Mapping[str, Size], measured: Measured) -> Size:
        asked = experiment.settings.attribute
        assert asked is not None
        bytes_ = measured.bytes // measured.parts if measured.parts else round(BIN_BYTES * 10 * len(asked.queries))
        return Size(0, bytes_)

    def run(self, context: JobContext) -> None:
        from eopd.stages.attribute.run import AttributionSummaryJob, summarise

        settings = context.settings
        assert settings.attribute is not None
        assert settings.evaluate is not None
        summarise(
            AttributionSummaryJob(
                output=context.output,
                scores={name: context.inputs[_role(name)] for name in settings.attribute.queries},
                settings=settings.attribute,
                evaluate=settings.evaluate,
                rollouts=context.inputs.get("rollouts"),
                prompts=settings.prompts,
                seed=settings.seed,
                progress=context.progress,
            )
        )


def was_trained_on_documents(experiment: Experiment, round_: int) -> bool:
    """True if the run trained the student at the start of ``round_`` on the documents that it is attributed to."""
    asked, facts = experiment.settings.attribute, experiment.facts
    assert asked is not None
    if asked.rollouts is not None:
        return asked.rollouts.round < round_
    assert asked.documents is not None
    own = facts.documents is not None and facts.documents.fingerprint == facts.prompts_fingerprint
    return round_ > 0 and own and experiment.settings.rollout.source == "data"


def _asked(settings: ExperimentSettings, round_: int) -> AttributeSettings | None:
    asked = settings.attribute
    return asked if asked is not None and asked.of_round(round_, settings.rounds) else None


def _rollouts(plan: PlanView, asked: AttributeSettings) -> Identity | None:
    return None if asked.rollouts is None else plan.output("rollout", asked.rollouts.round)


def _documents(experiment: Experiment, rollouts: Identity | None) -> dict[str, str]:
    if rollouts is not None:
        return {"rollouts": rollouts.key}
    assert experiment.facts.documents is not None
    return {"documents": experiment.facts.documents.fingerprint}


def _count(experiment: Experiment) -> int:
    documents = experiment.facts.documents
    if documents is not None:
        return documents.count
    return experiment.prompts_per_round * experiment.settings.rollout.samples_per_prompt


def _role(query: str) -> str:
    return f"query {query}"


def _stop_ids(experiment: Experiment) -> list[int]:
    return list(experiment.facts.ordered_stop_ids)
