"""Settings of an experiment: what enters the keys of its artifacts, and what must go together."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import ValidationInfo, field_validator, model_validator

from eopd.stages.attribute.settings import AttributeSettings
from eopd.stages.evaluate.settings import EvaluateSettings
from eopd.stages.judge.settings import JudgeSettings
from eopd.stages.models.prompts import Columns, PromptSettings, VerifierName
from eopd.stages.models.settings import ModelSettings, StudentSettings, TeacherSettings
from eopd.stages.models.teacher_prompts import SIBLING
from eopd.stages.rollout.settings import RolloutSettings
from eopd.stages.score.settings import ScoreSettings
from eopd.stages.settings import ROUNDS, SEED, Settings, setting
from eopd.stages.train.settings import TrainedTokens, TrainSettings
from eopd.storage.errors import InputError


class ExperimentSettings(Settings):
    seed: int = setting(0, "Seed of prompt order, sampling and training order.", ge=0, le=SEED)
    rounds: int = setting(1, "Rounds of rollout, score, train.", ge=1, le=ROUNDS)
    refresh: int = setting(
        1,
        "Renew the sampling policy every this many rounds (1: each round; 0: never, the first student samples).",
        ge=0,
        le=ROUNDS,
    )
    lag: int = setting(
        0, "Rounds by which the sampling policy is late; with 1, a round's rollouts overlap training.", ge=0, le=ROUNDS
    )
    student: StudentSettings = setting(..., "The model that learns.")
    teacher: TeacherSettings = setting(..., "The model it learns from.")
    prompts: PromptSettings = setting(..., "Sources and rendering of the student's prompts.")
    rollout: RolloutSettings = setting(RolloutSettings, "How the student samples.")
    score: ScoreSettings = setting(ScoreSettings, "The teacher's statistics of every token.")
    judge: JudgeSettings = setting(JudgeSettings, "How rollouts are judged, if `train.select.verdict` asks for it.")
    train: TrainSettings = setting(TrainSettings, "Objective and optimisation.")
    evaluate: EvaluateSettings | None = setting(None, "How students are evaluated. None: they are not.")
    attribute: AttributeSettings | None = setting(
        None, "Attribution of evaluated samples to documents. None: there is none.", keyed=False
    )

    @model_validator(mode="before")
    @classmethod
    def _teachers_by_prompt(cls, data: Any) -> Any:
        """Read `teachers`, which is short for `teacher.by_prompt`."""
        if not isinstance(data, dict) or "teachers" not in data:
            return data
        others = {name: value for name, value in data.items() if name != "teachers"}
        if data["teachers"] is None:
            return others
        if data.get("teacher") is not None:
            raise InputError("teacher and teachers are both set", setting="teachers", remedy="set one of them to null")
        return {**others, "teacher": {"by_prompt": data["teachers"]}}

    @property
    def teachers(self) -> dict[str, TeacherSettings]:
        """The teachers by name; a single one has none (``""``)."""
        if self.teacher.by_prompt is None:
            return {"": self.teacher}
        return {name: TeacherSettings(**model.model_dump()) for name, model in self.teacher.by_prompt.items()}

    @property
    def models(self) -> dict[str, ModelSettings]:
        """The student and the teachers by the setting that names each: `student`, `teacher` or `teachers.NAME`."""
        teachers = {f"teachers.{name}" if name else "teacher": model for name, model in self.teachers.items()}
        return {"student": self.student, **teachers}

    @field_validator("evaluate")
    @classmethod
    def _evaluate_as_trained(cls, evaluate: EvaluateSettings | None, info: ValidationInfo) -> EvaluateSettings | None:
        """Fill null settings of evaluation from training: a base model trained on plain prompts is evaluated on plain
        prompts."""
        if evaluate is None or not {"prompts", "rollout"} <= info.data.keys():  # one of them was refused
            return evaluate
        return evaluate.following(info.data["prompts"], info.data["rollout"].max_new_tokens)

    @model_validator(mode="after")
    def _score_as_sampled(self) -> ExperimentSettings:
        self.score.resolve_temperature(self.rollout.temperature)
        return self

    @model_validator(mode="after")
    def _attribution_finds_its_inputs(self) -> ExperimentSettings:
        asked, evaluate = self.attribute, self.evaluate
        if asked is None:
            return self
        if evaluate is None:
            raise InputError(
                "attribute reads evaluated samples, and evaluate is null",
                setting="evaluate",
                remedy="name evaluate.benchmarks",
            )
        names = [benchmark.name for benchmark in evaluate.benchmarks]
        for name, query in asked.queries.items():
            if query.benchmark not in names:
                raise InputError(
                    f"attribute.queries.{name}.benchmark is {query.benchmark}, and evaluate.benchmarks has "
                    f"{', '.join(names)}",
                    setting=f"attribute.queries.{name}.benchmark",
                )
        for round_ in (self.rounds if one == "last" else one for one in asked.rounds):
            if round_ > self.rounds:
                raise InputError(
                    f"attribute.rounds names {round_}, and the run has the students 0 to {self.rounds}",
                    setting="attribute.rounds",
                )
            if round_ % evaluate.every and round_ != self.rounds:
                raise InputError(
                    f"attribute.rounds names {round_}, whose student is not evaluated: evaluate.every is "
                    f"{evaluate.every}",
                    setting="attribute.rounds",
                )
            if asked.rollouts is not None and not asked.rollouts.round <= min(round_, self.rounds - 1):
                raise InputError(
                    f"attribute.rollouts.round is {asked.rollouts.round}, and attribute.rounds names {round_}",
                    setting="attribute.rollouts.round",
                    remedy=f"take rollouts of an earlier round, or of the same one, among 0 to {self.rounds - 1}",
                )
        return self

    @property
    def reads_verdicts(self) -> bool:
        """True if a stage reads verdicts on the rollouts."""
        return self.selects_by_verdict or bool(self.score.teacher_prompt.judged)

    @property
    def selects_by_verdict(self) -> bool:
        """True if training reads verdicts on the rollouts."""
        return self.train.select.verdict != "any"

    @property
    def rollouts_carry_verdicts(self) -> bool:
        """True if responses are judged while they are sampled."""
        return self.rollout.attempts is not None or self.rollout.source == "revise"

    @property
    def judged_for(self) -> str:
        """The setting that asks for verdicts on rollouts, with its value; empty if there is none."""
        if self.rollout.attempts is not None:
            return f"rollout.attempts.until is {self.rollout.attempts.until}"
        if self.rollout.source == "revise":
            return "rollout.source is revise"
        if self.selects_by_verdict:
            return f"train.select.verdict is {self.train.select.verdict}"
        judged = self.score.teacher_prompt.judged
        return f"score.teacher_prompt shows {{{{{judged[0]}}}}}" if judged else ""

    @model_validator(mode="after")
    def _verdicts_can_be_had(self) -> ExperimentSettings:
        if not self.judged_for:
            return self
        if self.prompts.verifier is None:
            raise InputError(
                f"{self.judged_for}, but no verifier judges the prompts",
                setting="prompts.verifier",
                remedy=f"set prompts.verifier to {', '.join(get_args(VerifierName))}",
            )
        if self.prompts.columns.answer is None:
            raise InputError(
                f"{self.judged_for}, but the prompts have no reference answers",
                setting="prompts.columns.answer",
                remedy="name their column in prompts.columns.answer",
            )
        judged = self.score.teacher_prompt.judged
        if SIBLING in judged and self.rollout.samples_per_prompt == 1:
            raise InputError(
                "score.teacher_prompt shows {{right_sibling}}, and rollout.samples_per_prompt is 1: no response has "
                "a sibling",
                setting="rollout.samples_per_prompt",
            )
        if judged and self.evaluate is not None and self.evaluate.alignment is not None:
            raise InputError(
                f"score.teacher_prompt shows {{{{{judged[0]}}}}}, which depends on verdicts on rollouts; "
                "evaluate.alignment reads other responses",
                setting="evaluate.alignment",
                remedy="leave it out",
            )
        return self

    @model_validator(mode="after")
    def _the_student_can_learn_from_itself(self) -> ExperimentSettings:
        if self.teacher.student == "latest" and (self.teacher.renewed or 1) == 1 and self.teacher_is_the_reader:
            raise InputError(
                "teacher.student is latest, renewed each round, and score.teacher_prompt shows it what the student "
                "reads: every log-ratio is 0 at the start of each round, so there is nothing to learn",
                setting="teacher.student",
                remedy="Show the teacher more ({{answer}} or another placeholder), or set teacher.renewed or "
                "teacher.student: initial",
            )
        return self

    @property
    def teacher_is_the_reader(self) -> bool:
        """True if a self teacher that has the student's weights says just what the student says."""
        prompts, reads = self.prompts, self.score.teacher_prompt
        if self.score.resolve_temperature(self.rollout.temperature) != self.rollout.temperature or reads.opening:
            return False
        own = (prompts.template, prompts.template_arguments, prompts.system, prompts.suffix)
        rendered = (reads.template, reads.arguments, reads.system, reads.suffix)
        return reads.kind == "same" or (reads.kind == "template" and rendered == own)

    @property
    def default_tokens(self) -> TrainedTokens:
        """The value of `train.tokens` if it is unset."""
        return "own" if self.rollout.writer_is_the_student else "all"

    @property
    def trained_tokens(self) -> TrainedTokens:
        """The tokens that are trained on; all of the student's own responses are `own`."""
        return self.default_tokens if self.rollout.source == "student" else self.train.tokens or self.default_tokens

    @property
    def has_prefixes(self) -> bool:
        """True if the loss on tokens that the teacher wrote is `prefix_beta` log(p/q), and not the objective's."""
        return self.rollout.source == "prefix" and self.trained_tokens == "own"

    @model_validator(mode="after")
    def _tokens_are_there(self) -> ExperimentSettings:
        source, tokens, objective = self.rollout.source, self.train.tokens, self.train.objective
        if tokens == "after_text" and source != "revise":
            raise InputError(
                f"train.tokens is after_text, and with rollout.source: {source} a response holds no text of "
                "rollout.revise.phrases",
                setting="train.tokens",
                remedy="set it to null, or set rollout.source: revise",
            )
        if tokens == "own" and source in ("teacher", "data"):
            raise InputError(
                f"train.tokens is own, and with rollout.source: {source} the student writes none",
                setting="train.tokens",
                remedy="set it to null",
            )
        if tokens == "all" and source != "student" and objective.weighs_samples:
            raise InputError(
                f"train.tokens is all, and train.objective.name={objective.name} weighs tokens as the student's own "
                f"samples, which with rollout.source: {source} not all are",
                setting="train.tokens",
                remedy="set it to own, or take sft, fkl, rkl_topk, jsd or rs_kd",
            )
        return self

    @model_validator(mode="after")
    def _responses_fit_the_objective(self) -> ExperimentSettings:
        source, objective = self.rollout.source, self.train.objective
        if source == "data" and self.prompts.columns.response is None:
            raise InputError(
                "rollout.source is data, and prompts.columns.response names no column that holds the responses",
                setting="prompts.columns.response",
            )
        off_policy = not self.rollout.writer_is_the_student
        if off_policy and objective.weighs_samples:
            raise InputError(
                f"rollout.source is {source}, and train.objective.name={objective.name} weighs tokens as the "
                "student's own samples, which these are not",
                setting="train.objective.name",
                remedy="take sft, fkl, rkl_topk, jsd or rs_kd, or opd or eopd with rkl: topk",
            )
        ignored = [name for name in ("staleness", "max_staleness") if getattr(self.train, name) is not None]
        if off_policy and ignored:
            raise InputError(
                f"train.{ignored[0]} has no effect with rollout.source: {source}, whose responses are no samples of "
                "an earlier student",
                setting=f"train.{ignored[0]}",
                remedy="remove it",
            )
        if source in ("teacher", "data") and self.rollout.student_topk:
            raise InputError(
                f"rollout.student_topk is {self.rollout.student_topk}, and with rollout.source: {source} responses "
                "do not depend on the student, whose own top tokens would make them do so",
                setting="rollout.student_topk",
                remedy="set it to 0",
            )
        beta, unset = objective.prefix_beta, type(objective).model_fields["prefix_beta"].default
        if not self.has_prefixes and beta != unset:
            raise InputError(
                f"train.objective.prefix_beta={beta:g} has no effect with rollout.source: {source}: it weighs tokens "
                "that the teacher wrote at the beginning of a response",
                setting="train.objective.prefix_beta",
                remedy="set rollout.source: prefix, train.tokens: null",
            )
        if source in ("teacher", "prefix") and self.teacher.student is not None:
            raise InputError(
                f"rollout.source is {source}, and teacher.student is {self.teacher.student}: the student would be "
                "its own guide",
                setting="teacher.student",
                remedy="set rollout.source: student, or name a teacher",
            )
        if source == "prefix":
            self._prefixes_have_an_end()
        reads = self.score.teacher_prompt
        if source in ("teacher", "prefix") and ("response" in reads.used or reads.judged or reads.shuffled):
            raise InputError(
                f"rollout.source is {source}: the teacher writes under score.teacher_prompt, which may then hold "
                f"neither {{{{response}}}}, {{{{verdict}}}} nor {{{{right_sibling}}}}, as there are none yet, nor "
                "shuffled values",
                setting="score.teacher_prompt",
            )
        return self

    @model_validator(mode="after")
    def _a_capture_has_what_is_read(self) -> ExperimentSettings:
        if self.teacher.capture is None:
            return self
        if self.rollout.source != "data":
            raise InputError(
                "teacher.capture holds log-probs of its own sequences alone, and rollout.source is "
                f"{self.rollout.source}",
                setting="rollout.source",
                remedy="set rollout.source: data",
            )
        if self.evaluate is not None and self.evaluate.alignment is not None:
            raise InputError(
                "evaluate.alignment reads a teacher, and teacher.capture is none",
                setting="evaluate.alignment",
                remedy="set it to null",
            )
        ignored = [name for name in ("teacher_prompt", "head") if not self._is_default("score", name)]
        if ignored:
            raise InputError(
                f"{' and '.join(f'score.{name}' for name in ignored)} has no effect with teacher.capture, whose "
                "contexts and lists are as they were captured",
                setting=f"score.{ignored[0]}",
                remedy="remove it",
            )
        return self

    def _is_default(self, group: str, name: str) -> bool:
        settings = getattr(self, group)
        return bool(getattr(settings, name) == type(settings).model_fields[name].get_default(call_default_factory=True))

    def _prefixes_have_an_end(self) -> None:
        prefix, longest = self.rollout.prefix, self.rollout.max_new_tokens
        if self.rounds == 1 and prefix.over == "rounds" and prefix.start is None:
            raise InputError(
                "rollout.prefix.over is rounds, and with rounds: 1 every response would be the teacher's",
                setting="rollout.prefix.over",
                remedy="set rollout.prefix.over: responses, rollout.prefix.start, or more rounds",
            )
        if max(prefix.start or 0, prefix.end) > longest:
            raise InputError(
                f"rollout.prefix.start and end may be rollout.max_new_tokens = {longest} at most, got {prefix.start} "
                f"and {prefix.end}",
                setting="rollout.prefix.start",
            )
        if prefix.start is not None and prefix.start <= prefix.end:
            raise InputError(
                f"rollout.prefix.start = {prefix.start} must be more than rollout.prefix.end = {prefix.end}",
                setting="rollout.prefix.start",
            )

    @model_validator(mode="after")
    def _each_prompt_finds_its_teacher(self) -> ExperimentSettings:
        named, column = self.teacher.by_prompt, self.prompts.columns.teacher
        if named is None:
            if column is not None:
                raise InputError(
                    f"prompts.columns.teacher is {column}, and there are no teachers to choose from",
                    setting="prompts.columns.teacher",
                    remedy="name them in teachers, or remove it",
                )
            return self
        if column is None:
            raise InputError(
                f"teachers names {', '.join(named)}, and nothing says whose each prompt is",
                setting="prompts.columns.teacher",
                remedy="name a column in prompts.columns.teacher",
            )
        if self.rollout.source in ("teacher", "prefix"):
            raise InputError(
                f"rollout.source is {self.rollout.source}, which is for one teacher, and teachers names "
                f"{', '.join(named)}",
                setting="rollout.source",
                remedy="set rollout.source to student, data, mixed or revise",
            )
        if self.evaluate is not None and self.evaluate.alignment is not None:
            raise InputError(
                f"evaluate.alignment compares the student with one teacher, and teachers names {', '.join(named)}",
                setting="evaluate.alignment",
                remedy="leave it out",
            )
        return self

    @model_validator(mode="after")
    def _the_teacher_finds_its_column(self) -> ExperimentSettings:
        if self.score.teacher_prompt.kind != "column":
            return self
        missing = [] if self.prompts.columns.teacher_prompt is not None else ["prompts"]
        if self.evaluate is not None and self.evaluate.alignment is not None:
            for number, benchmark in enumerate(self.evaluate.benchmarks):
                if benchmark.columns.teacher_prompt is None:
                    missing.append(f"evaluate.benchmarks.{number}")
        if missing:
            raise InputError(
                "score.teacher_prompt.kind is column, and no column of that kind is named in "
                f"{', '.join(f'{where}.columns.teacher_prompt' for where in missing)}",
                setting=f"{missing[0]}.columns.teacher_prompt",
            )
        return self

    @model_validator(mode="after")
    def _placeholders_find_their_columns(self) -> ExperimentSettings:
        reads = self.score.teacher_prompt
        sources: dict[str, Columns] = {"prompts": self.prompts.columns}
        if self.evaluate is not None and self.evaluate.alignment is not None:
            for number, benchmark in enumerate(self.evaluate.benchmarks):
                sources[f"evaluate.benchmarks.{number}"] = benchmark.columns
        if self.rollout.source == "mixed":
            self._the_expert_can_read()
        for name in reads.values_needed:
            missing = [
                f"{where}.columns.{name}" for where, columns in sources.items() if getattr(columns, name) is None
            ]
            if missing:
                raise InputError(
                    f"score.teacher_prompt shows {{{{{name}}}}} to the teacher, and no column is named in "
                    f"{', '.join(missing)}",
                    setting=missing[0],
                )
        if reads.shuffled and self.rollout.rows_per_part == 1:
            raise InputError(
                "score.teacher_prompt.shuffled exchanges answers among the prompts of a part, and "
                "rollout.rows_per_part is 1",
                setting="rollout.rows_per_part",
                remedy="raise it",
            )
        return self

    def _the_expert_can_read(self) -> None:
        expert = self.rollout.mixed.expert
        for name in expert.values_needed:
            if getattr(self.prompts.columns, name) is None:
                raise InputError(
                    f"rollout.mixed.expert shows {{{{{name}}}}}, and no column is named in prompts.columns.{name}",
                    setting=f"prompts.columns.{name}",
                )
        if expert.system is not None and self.prompts.template == "plain":
            raise InputError(
                "rollout.mixed.expert.system belongs to prompts.template: chat",
                setting="rollout.mixed.expert.system",
                remedy="with plain, use expert.suffix",
            )
