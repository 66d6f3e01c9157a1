"""The stage of `eopd score`: the teacher's statistics of every response token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace

from eopd.stages.experiment import Experiment
from eopd.stages.experiment_settings import ExperimentSettings
from eopd.stages.memory import Memory, reading
from eopd.stages.models.settings import CaptureSettings
from eopd.stages.score.settings import HeadSettings
from eopd.stages.stage import (
    Input,
    Job,
    JobContext,
    Measured,
    Models,
    PlanView,
    Size,
    Stage,
    read_size,
    teacher_input,
    teacher_key,
)
from eopd.storage.codec import most_bytes
from eopd.storage.files import canonical_json, sha256_text
from eopd.storage.identity import KEY_LENGTH, Identity

CAPTURED_ENTRIES = 32
"""Entries of a token in captures, about: a forecast reads none."""


def token_bytes(head: HeadSettings, vocabulary: int) -> float:
    """Estimate the bytes of one scored token; ``storage.codec`` has a bound for any teacher.

    Heads that follow the entropy: a model that is hardly ever sure takes 48.0, 74.9 and 130.6 at k_max 16, 32 and 64
    with 11 bits an id, and 59.3 at k_max 16 with 15.6 (`python -m benchmarks.cache --only real`, plain text). Fixed
    heads: uniform ids.
    """
    if head.full_head_above < 0:
        return 15.0 + 2.9 * head.k_max + 3.0 * head.n_draws
    bits = math.log2(max(vocabulary, 2)) - 11.0
    return 20.0 + (1.75 + 0.175 * bits) * head.k_max + 3.0 * head.n_draws


class ScoreStage(Stage):
    name = command = "score"
    kind = "scores"
    by_teacher = True
    size_settings = "rollout.samples_per_prompt, rollout.max_new_tokens, score.head.k_max or rounds"

    def plan(self, plan: PlanView, round_: int) -> Job | None:
        settings, facts = plan.experiment.settings, plan.experiment.facts
        rollouts, topk = plan.output("rollout", round_), plan.output("student_topk", round_)
        verdicts = plan.output("judge", round_) if settings.score.teacher_prompt.judged else None
        if rollouts is None or not self._is_read(settings):
            return None
        if settings.score.teacher_prompt.judged and verdicts is None and not settings.rollouts_carry_verdicts:
            return None
        if settings.teacher.capture is not None:
            return self._of_capture(plan.experiment, settings.teacher.capture, rollouts, round_)
        teacher = plan.teacher(round_)
        identity = self.identity(
            parts=rollouts.parts,
            settings={
                **settings.score.identity(),
                "temperature": settings.score.resolve_temperature(settings.rollout.temperature),
                "stop_ids": list(facts.stop_ids),
                **self._values_shown(settings),
                **self._prompts_answered(plan.experiment),
            },
            inputs={
                "rollouts": rollouts.key,
                "teacher": teacher_key(plan.experiment, teacher),
                "tokenizer": facts.teacher.tokenizer_fingerprint,
                **({"verdicts": verdicts.key} if verdicts is not None else {}),
            },
        )
        output = replace(identity, coverage={**settings.score.coverage(), "extra": topk.key if topk else None})
        inputs = {"rollouts": Input(rollouts, by_part=True), **teacher_input(teacher)}
        if verdicts is not None:
            inputs["verdicts"] = Input(verdicts, by_part=True)
        if topk is not None:
            inputs["student_topk"] = Input(topk, by_part=True)
        return Job(self, round_, output, inputs)

    def _of_capture(self, experiment: Experiment, capture: CaptureSettings, rollouts: Identity, round_: int) -> Job:
        """Return the job that takes the scores of responses from a capture."""
        identity = self.identity(
            parts=rollouts.parts,
            settings={"temperature": experiment.settings.rollout.temperature},
            inputs={"rollouts": rollouts.key, "capture": experiment.facts.teacher.fingerprint},
        )
        coverage = {
            "head": asdict(capture.rule()),
            "extra": None,
            "entropy": False,
            "sampled": False,
            "vocab_size": capture.vocab_size or 0,
        }
        return Job(self, round_, replace(identity, coverage=coverage), {"rollouts": Input(rollouts, by_part=True)})

    @staticmethod
    def _values_shown(settings: ExperimentSettings) -> dict[str, object]:
        """Return the settings that decide the texts of placeholders, besides the rollouts, which know the prompt
        source."""
        reads = settings.score.teacher_prompt
        shown: dict[str, object] = {}
        if "solution" in reads.used:
            shown["solution"] = settings.prompts.columns.solution
        if reads.shuffled:
            shown["shuffle_seed"] = settings.seed
        return shown

    @staticmethod
    def _prompts_answered(experiment: Experiment) -> dict[str, object]:
        """Return a digest of the rows of the teacher's prompts, if it does not answer for all."""
        rows = experiment.teachers_prompts
        if rows is None or len(rows) == experiment.facts.prompt_count:
            return {}
        return {"prompts": sha256_text(canonical_json(sorted(rows)))[:KEY_LENGTH]}

    @staticmethod
    def _is_read(settings: ExperimentSettings) -> bool:
        """False for supervised training on fixed responses, for which nothing reads the scores.

        On the student's own responses they are made for the report, and stay in the checkpoints' keys.
        """
        return settings.train.objective.reads_teacher or settings.rollout.source in ("student", "prefix")

    def memory(self, settings: ExperimentSettings, models: Models, gpu_bytes: int) -> Memory | None:
        if settings.teacher.capture is not None:
            return None
        longest = settings.prompts.max_prompt_tokens + settings.rollout.max_new_tokens
        score, dtype = (
            settings.score,
            settings.teacher.dtype if settings.score.dtype == "auto" else settings.score.dtype,
        )
        return reading(
            models.teacher,
            dtype,
            score.engine,
            score.engine_options,
            tokens=score.batch_tokens,
            row_tokens=score.row_tokens,
            longest=longest,
            gpu_bytes=gpu_bytes,
        )

    def gpus(self, settings: ExperimentSettings) -> int:
        return 0 if settings.teacher.capture is not None else settings.score.engine_options.tensor_parallel

    def forecast(self, job: Job, experiment: Experiment, inputs: Mapping[str, Size], measured: Measured) -> Size:
        settings, vocabulary = experiment.settings, experiment.teacher_vocabulary
        if settings.teacher.capture is not None:
            head = HeadSettings(k_max=max(settings.teacher.capture.top_k, CAPTURED_ENTRIES), full_head_above=-1)
            return read_size(inputs["rollouts"], token_bytes(head, vocabulary), measured)
        scored = read_size(inputs["rollouts"], token_bytes(settings.score.head, vocabulary), measured)
        if experiment.teachers_prompts is not None and not measured.tokens:
            share = len(experiment.teachers_prompts) / experiment.facts.prompt_count
            scored = replace(scored, tokens=round(scored.tokens * share), bytes=round(scored.bytes * share))
        size = replace(scored, tokens=scored.tokens * (1 + settings.score.teacher_prompt.copies))
        if measured.tokens:
            return size
        bound = most_bytes(
            settings.score.head.rule(),
            stops=len(experiment.facts.stop_ids),
            vocabulary=vocabulary,
            extra_k=settings.rollout.student_topk,
            tokens=scored.tokens,
            responses=experiment.prompts_per_round * settings.rollout.samples_per_prompt,
            parts=job.output.parts,
        )
        return replace(size, most_bytes=bound)

    def run(self, context: JobContext) -> None:
        if context.settings.teacher.capture is not None:
            self._run_capture(context, context.settings.teacher.capture)
            return
        from eopd.stages.score.responses import ScoreJob
        from eopd.stages.score.run import run

        facts = context.experiment.facts
        run(
            ScoreJob(
                output=context.output,
                parts=context.parts,
                settings=context.settings.score,
                progress=context.progress,
                log_dir=context.log_dir,
                rollouts=context.inputs["rollouts"],
                teacher=context.teacher,
                student_tokenizer=str(facts.student.tokenizer_folder),
                stop_ids=facts.stop_ids,
                rollout_temperature=context.settings.rollout.temperature,
                student_topk=context.inputs.get("student_topk"),
                prompts=context.settings.prompts,
                verdicts=context.inputs.get("verdicts"),
                prompt_rows=context.experiment.teachers_prompts,
                seed=context.settings.seed,
                engines=context.engines,
            )
        )

    @staticmethod
    def _run_capture(context: JobContext, capture: CaptureSettings) -> None:
        from eopd.stages.score.captured import CapturedJob, run

        facts = context.experiment.facts
        run(
            CapturedJob(
                output=context.output,
                parts=context.parts,
                progress=context.progress,
                rollouts=context.inputs["rollouts"],
                capture=capture,
                fingerprint=facts.teacher.fingerprint,
                tokenizer=str(facts.student.tokenizer_folder),
                temperature=context.settings.rollout.temperature,
            )
        )
