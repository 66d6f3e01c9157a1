"""The stages of `eopd align`: teacher and student compared on an evaluation's samples, and figures by entropy bin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import cast

from eopd.stages.engines.sampling import EngineKind
from eopd.stages.experiment import Experiment
from eopd.stages.experiment_settings import ExperimentSettings
from eopd.stages.memory import Memory, reading
from eopd.stages.stage import (
    Input,
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
    read_size,
    teacher_input,
    teacher_key,
)

ALIGNED_ROW_BYTES = 20.0  # sums of one response in one bin of entropy
SUMMARY_BYTES = 65536
COMPARED_BYTES = 64 * 2**20  # of one model's logits in a chunk (``divergence.CHUNK_VALUES``)


class AlignStage(Stage):
    name = command = "align"
    kind = "alignments"
    size_settings = "evaluate.alignment.samples"

    def plan(self, plan: PlanView, round_: int) -> Job | None:
        settings, facts = plan.experiment.settings, plan.experiment.facts
        own, first = plan.output("evaluate", round_), plan.output("evaluate", 0)
        if settings.evaluate is None or settings.evaluate.alignment is None or own is None or first is None:
            return None
        alignment = settings.evaluate.alignment
        evaluations = {whose: {"own": own, "first": first}[whose] for whose in alignment.responses}
        policy, teacher = plan.policy(round_), plan.teacher(round_)
        output = self.identity(
            parts=sum(evaluation.parts for evaluation in evaluations.values()),
            settings={
                "alignment": alignment.semantic(),
                "teacher_prompt": settings.score.teacher_prompt.semantic(),
                "stop_ids": list(facts.stop_ids),
                **self._values_shown(settings),
            },
            inputs={
                **{f"{whose} evaluation": evaluation.key for whose, evaluation in evaluations.items()},
                "student": policy_key(plan.experiment, policy),
                "student_tokenizer": facts.student.tokenizer_fingerprint,
                "teacher": teacher_key(plan.experiment, teacher),
                "teacher_tokenizer": facts.teacher.tokenizer_fingerprint,
            },
        )
        inputs: dict[str, Input] = {whose: Input(evaluation) for whose, evaluation in evaluations.items()}
        return Job(self, round_, output, {**inputs, **policy_input(policy), **teacher_input(teacher)})

    @staticmethod
    def _values_shown(settings: ExperimentSettings) -> dict[str, object]:
        """Return the settings that decide the texts of placeholders, besides the evaluations, which know the
        benchmarks."""
        reads, evaluate = settings.score.teacher_prompt, settings.evaluate
        shown: dict[str, object] = {}
        if "solution" in reads.used and evaluate is not None:
            shown["solutions"] = [benchmark.columns.solution for benchmark in evaluate.benchmarks]
        if reads.shuffled:
            shown["shuffle_seed"] = settings.seed
        return shown

    def memory(self, settings: ExperimentSettings, models: Models, gpu_bytes: int) -> Memory | None:
        evaluate = settings.evaluate
        if evaluate is None or evaluate.alignment is None:
            return None
        alignment = evaluate.alignment
        longest = evaluate.max_prompt_tokens + (evaluate.max_new_tokens or settings.rollout.max_new_tokens)
        both = (
            (models.teacher, settings.teacher.dtype, alignment.teacher_engine, alignment.teacher_engine_options),
            (models.student, settings.student.dtype, "transformers", alignment.engine_options),
        )
        parts: Counter[str] = Counter()
        for size, dtype, kind, options in both:
            memory = reading(
                size,
                dtype,
                cast("EngineKind", kind),
                options,
                tokens=alignment.batch_tokens,
                row_tokens=2048,
                longest=longest,
                gpu_bytes=gpu_bytes,
                statistics=False,
            )
            parts |= Counter({name: memory.parts.get(name, 0) for name in ("activations", "context")})  # in turn
            parts += Counter({name: memory.parts[name] for name in ("weights", "hidden states")})
            parts["heads in float32"] += 4 * size.embedding
        parts["logits"] = 6 * COMPARED_BYTES
        return Memory(parts)

    def gpus(self, settings: ExperimentSettings) -> int:
        alignment = settings.evaluate.alignment if settings.evaluate else None
        both = (alignment.engine_options, alignment.teacher_engine_options) if alignment else ()
        return max((options.tensor_parallel for options in both), default=1)  # the two models share the devices

    def forecast(self, job: Job, experiment: Experiment, inputs: Mapping[str, Size], measured: Measured) -> Size:
        evaluate = experiment.settings.evaluate
        assert evaluate is not None
        assert evaluate.alignment is not None
        sampled = [size for role, size in inputs.items() if role not in ("policy", "teacher")]
        share = evaluate.alignment.samples / evaluate.samples * self._problems_read(experiment)
        tokens = round(sum(size.tokens for size in sampled) * share)
        read = Size(tokens, at_most=any(size.at_most for size in sampled))
        bins = len(evaluate.alignment.bins) + 2
        return read_size(read, ALIGNED_ROW_BYTES * bins / evaluate.parameters(()).max_new_tokens, measured)

    @staticmethod
    def _problems_read(experiment: Experiment) -> float:
        """Return the share of all problems that an alignment reads."""
        evaluate = experiment.settings.evaluate
        limit = evaluate.alignment.limit if evaluate and evaluate.alignment else None
        problems = [benchmark.count for benchmark in experiment.facts.benchmarks]
        read = problems if limit is None else [min(limit, count) for count in problems]
        return sum(read) / sum(problems)

    def run(self, context: JobContext) -> None:
        from eopd.stages.align.run import AlignmentJob, run

        settings = context.settings
        assert settings.evaluate is not None
        assert settings.evaluate.alignment is not None
        run(
            AlignmentJob(
                output=context.output,
                parts=context.parts,
                settings=settings.evaluate,
                progress=context.progress,
                log_dir=context.log_dir,
                sources=tuple((whose, context.inputs[whose]) for whose in settings.evaluate.alignment.responses),
                student=context.student,
                teacher=context.teacher,
                teacher_prompt=settings.score.teacher_prompt,
                stop_ids=context.experiment.facts.stop_ids,
                seed=settings.seed,
                engines=context.engines,
            )
        )


class AlignmentSummaryStage(SummaryStage):
    """Divergences by teacher-entropy bin, with intervals."""

    name = "alignment_summary"
    kind = "alignment_summaries"
    command = source = "align"
    role = "alignments"

    def forecast(self, job: Job, experiment: Experiment, inputs: Mapping[str, Size], measured: Measured) -> Size:
        return Size(0, measured.bytes // measured.parts if measured.parts else SUMMARY_BYTES)

    def summarise(self, job: SummaryJob) -> None:
        from eopd.stages.align.run import summarise

        summarise(job)
