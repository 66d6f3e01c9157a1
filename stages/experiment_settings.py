"""Settings of an experiment: what enters the keys of its artifacts, and what must go together."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from eopd.stages.attribute.settings import AttributeSettings
from eopd.stages.evaluate.settings import EvaluateSettings
from eopd.stages.judge.settings import JudgeSettings
from eopd.stages.models.prompts import Columns, PromptSettings, VerifierName
from eopd.stages.models.teacher_prompts import SIBLING
from eopd.stages.rollout.settings import RolloutSettings
from eopd.stages.score.settings import CaptureSettings, ScoreSettings
from eopd.stages.settings import ROUNDS, SEED, Settings, setting
from eopd.stages.train.settings import TrainedTokens, TrainSettings

TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=40)]
"""The name of one of several teachers, as it stands in the prompts' column."""


class ModelSettings(Settings):
    path: str | None = setting(
        None, "Folder of a causal LM in Hugging Face format, a GGUF file, or a hub id.", keyed=False
    )
    run: str | None = setting(
        None,
        "In place of `path`: another run, by its name below `runs` or by its config. The model is a student of that "
        "run, in the same store; its key is known before it is trained.",
        keyed=False,
    )
    round: int | None = setting(
        None,
        "With `run`: which of its students, as `eopd student` counts them. None: the last.",
        keyed=False,
        ge=1,
        le=ROUNDS,
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Precision of the weights when sampling or scoring; auto is the checkpoint's own."
    )
    revision: str | None = setting(None, "Hub commit or tag. Only a commit pins the weights.", keyed=False)
    tokenizer: str | None = setting(None, "Folder or hub id of the tokenizer if it is not in `path`.", keyed=False)
    trust_remote_code: bool = setting(False, "Run Python code that comes with the checkpoint. Off unless you trust it.")

    @model_validator(mode="after")
    def _one_model_is_named(self) -> ModelSettings:
        ways = [name for name in ("path", "run", "student", "capture", "by_prompt") if name in type(self).model_fields]
        named = [name for name in ways if getattr(self, name) is not None]
        if len(named) != 1:
            cure = "; set the others to null" if named else ""
            raise ValueError(f"name the model by one of {', '.join(ways)}; got {' and '.join(named) or 'none'}{cure}")
        others = {
            "path": ("round", "renewed"),
            "run": ("renewed",),
            "student": ("round",),
            "capture": ("round", "renewed"),
            "by_prompt": ("round", "renewed"),
        }[named[0]]
        if named[0] != "path":
            others += ("dtype", "revision", "tokenizer", "trust_remote_code")
        fields = type(self).model_fields
        ignored = [name for name in others if name in fields and getattr(self, name) != fields[name].default]
        if ignored:
            raise ValueError(f"{', '.join(ignored)} has no effect on a model that is named by {named[0]}")
        return self


class StudentSettings(ModelSettings):
    sft_teacher: str | None = setting(
        None,
        "Model (folder or hub id) that wrote the student's supervised data, if known. lightning_opd assumes that it is "
        "the teacher and warns otherwise.",
        keyed=False,
    )


class TeacherSettings(ModelSettings):
    student: Literal["initial", "latest"] | None = setting(
        None,
        "In place of `path`: the run's own student. initial: as it was before training; latest: at the start of the "
        "round, or of the last round that renews the teacher.",
    )
    renewed: int | None = setting(
        None, "With student: latest: renew the teacher every this many rounds. None: each round.", ge=1, le=ROUNDS
    )

    capture: CaptureSettings | None = setting(
        None,
        "In place of `path`: the top-k log-probs of a teacher, captured by another tool, for responses that come with "
        "the prompts (`rollout.source: data`). The name of the file is short for `capture.path`.",
    )

    by_prompt: dict[TeacherName, ModelSettings] | None = setting(
        None,
        "In place of `path`: several teachers by name, of which `prompts.columns.teacher` names one for each prompt. "
        "Each has score artifacts of its own, and a round trains on all of them. The setting `teachers` is short for "
        "it.",
        keyed=False,
        min_length=1,
    )

    @property
    def has_own_model(self) -> bool:
        """False if the teacher is the run's student, or a capture."""
        return self.student is None and self.capture is None

    @model_validator(mode="after")
    def _the_initial_student_stays(self) -> TeacherSettings:
        if self.student == "initial" and self.renewed is not None:
            raise ValueError("renewed has no effect with student: initial, which stays as it is; set student: latest")
        return self


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
            raise ValueError("teacher and teachers are both set; set one of them to null")
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
            raise ValueError("attribute reads evaluated samples, and evaluate is null: name evaluate.benchmarks")
        names = [benchmark.name for benchmark in evaluate.benchmarks]
        for name, query in asked.queries.items():
            if query.benchmark not in names:
                raise ValueError(
                    f"attribute.queries.{name}.benchmark is {query.benchmark}, and evaluate.benchmarks has "
                    f"{', '.join(names)}"
                )
        for round_ in (self.rounds if one == "last" else one for one in asked.rounds):
            if round_ > self.rounds:
                raise ValueError(f"attribute.rounds names {round_}, and the run has the students 0 to {self.rounds}")
            if round_ % evaluate.every and round_ != self.rounds:
                raise ValueError(
                    f"attribute.rounds names {round_}, whose student is not evaluated: evaluate.every is "
                    f"{evaluate.every}"
                )
            if asked.rollouts is not None and not asked.rollouts.round <= min(round_, self.rounds - 1):
                raise ValueError(
                    f"attribute.rollouts.round is {asked.rollouts.round}, and attribute.rounds names {round_}: take "
                    f"rollouts of an earlier round, or of the same one, among 0 to {self.rounds - 1}"
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
            raise ValueError(
                f"{self.judged_for}, but no verifier judges the prompts: set prompts.verifier to "
                f"{', '.join(get_args(VerifierName))}"
            )
        if self.prompts.columns.answer is None:
            raise ValueError(
                f"{self.judged_for}, but the prompts have no reference answers: name their column in "
                "prompts.columns.answer"
            )
        judged = self.score.teacher_prompt.judged
        if SIBLING in judged and self.rollout.samples_per_prompt == 1:
            raise ValueError(
                "score.teacher_prompt shows {{right_sibling}}, and rollout.samples_per_prompt is 1: no response has a "
                "sibling"
            )
        if judged and self.evaluate is not None and self.evaluate.alignment is not None:
            raise ValueError(
                f"score.teacher_prompt shows {{{{{judged[0]}}}}}, which depends on verdicts on rollouts; "
                "evaluate.alignment reads other responses: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _the_student_can_learn_from_itself(self) -> ExperimentSettings:
        if self.teacher.student == "latest" and (self.teacher.renewed or 1) == 1 and self.teacher_is_the_reader:
            raise ValueError(
                "teacher.student is latest, renewed each round, and score.teacher_prompt shows it what the student "
                "reads: every log-ratio is 0 at the start of each round, so there is nothing to learn. Show the "
                "teacher more ({{answer}} or another placeholder), or set teacher.renewed or teacher.student: initial"
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
            raise ValueError(
                f"train.tokens is after_text, and with rollout.source: {source} a response holds no text of "
                "rollout.revise.phrases; set it to null, or set rollout.source: revise"
            )
        if tokens == "own" and source in ("teacher", "data"):
            raise ValueError(
                f"train.tokens is own, and with rollout.source: {source} the student writes none; set it to null"
            )
        if tokens == "all" and source != "student" and objective.weighs_samples:
            raise ValueError(
                f"train.tokens is all, and train.objective.name={objective.name} weighs tokens as the student's own "
                f"samples, which with rollout.source: {source} not all are; set it to own, or take sft, fkl, rkl_topk, "
                "jsd or rs_kd"
            )
        return self

    @model_validator(mode="after")
    def _responses_fit_the_objective(self) -> ExperimentSettings:
        source, objective = self.rollout.source, self.train.objective
        if source == "data" and self.prompts.columns.response is None:
            raise ValueError(
                "rollout.source is data, and prompts.columns.response names no column that holds the responses"
            )
        off_policy = not self.rollout.writer_is_the_student
        if off_policy and objective.weighs_samples:
            raise ValueError(
                f"rollout.source is {source}, and train.objective.name={objective.name} weighs tokens as the student's "
                "own samples, which these are not; take sft, fkl, rkl_topk, jsd or rs_kd, or opd or eopd with rkl: topk"
            )
        ignored = [name for name in ("staleness", "max_staleness") if getattr(self.train, name) is not None]
        if off_policy and ignored:
            raise ValueError(
                f"train.{ignored[0]} has no effect with rollout.source: {source}, whose responses are no samples of an "
                "earlier student; remove it"
            )
        if source in ("teacher", "data") and self.rollout.student_topk:
            raise ValueError(
                f"rollout.student_topk is {self.rollout.student_topk}, and with rollout.source: {source} responses do "
                "not depend on the student, whose own top tokens would make them do so; set it to 0"
            )
        beta, unset = objective.prefix_beta, type(objective).model_fields["prefix_beta"].default
        if not self.has_prefixes and beta != unset:
            raise ValueError(
                f"train.objective.prefix_beta={beta:g} has no effect with rollout.source: {source}: it weighs tokens "
                "that the teacher wrote at the beginning of a response; set rollout.source: prefix, train.tokens: null"
            )
        if source in ("teacher", "prefix") and self.teacher.student is not None:
            raise ValueError(
                f"rollout.source is {source}, and teacher.student is {self.teacher.student}: the student would be its "
                "own guide; set rollout.source: student, or name a teacher"
            )
        if source == "prefix":
            self._prefixes_have_an_end()
        reads = self.score.teacher_prompt
        if source in ("teacher", "prefix") and ("response" in reads.used or reads.judged or reads.shuffled):
            raise ValueError(
                f"rollout.source is {source}: the teacher writes under score.teacher_prompt, which may then hold "
                "neither {{response}}, {{verdict}} nor {{right_sibling}}, as there are none yet, nor shuffled values"
            )
        return self

    @model_validator(mode="after")
    def _a_capture_has_what_is_read(self) -> ExperimentSettings:
        if self.teacher.capture is None:
            return self
        if self.rollout.source != "data":
            raise ValueError(
                f"teacher.capture holds log-probs of its own sequences alone, and rollout.source is "
                f"{self.rollout.source}; set rollout.source: data"
            )
        if self.evaluate is not None and self.evaluate.alignment is not None:
            raise ValueError("evaluate.alignment reads a teacher, and teacher.capture is none; set it to null")
        ignored = [name for name in ("teacher_prompt", "head") if not self._is_default("score", name)]
        if ignored:
            raise ValueError(
                f"{' and '.join(f'score.{name}' for name in ignored)} has no effect with teacher.capture, whose "
                "contexts and lists are as they were captured; remove it"
            )
        return self

    def _is_default(self, group: str, name: str) -> bool:
        settings = getattr(self, group)
        return bool(getattr(settings, name) == type(settings).model_fields[name].get_default(call_default_factory=True))

    def _prefixes_have_an_end(self) -> None:
        prefix, longest = self.rollout.prefix, self.rollout.max_new_tokens
        if self.rounds == 1 and prefix.over == "rounds" and prefix.start is None:
            raise ValueError(
                "rollout.prefix.over is rounds, and with rounds: 1 every response would be the teacher's; set "
                "rollout.prefix.over: responses, rollout.prefix.start, or more rounds"
            )
        if max(prefix.start or 0, prefix.end) > longest:
            raise ValueError(
                f"rollout.prefix.start and end may be rollout.max_new_tokens = {longest} at most, got "
                f"{prefix.start} and {prefix.end}"
            )
        if prefix.start is not None and prefix.start <= prefix.end:
            raise ValueError(
                f"rollout.prefix.start = {prefix.start} must be more than rollout.prefix.end = {prefix.end}"
            )

    @model_validator(mode="after")
    def _each_prompt_finds_its_teacher(self) -> ExperimentSettings:
        named, column = self.teacher.by_prompt, self.prompts.columns.teacher
        if named is None:
            if column is not None:
                raise ValueError(
                    f"prompts.columns.teacher is {column}, and there are no teachers to choose from: name them in "
                    "teachers, or remove it"
                )
            return self
        if column is None:
            raise ValueError(
                f"teachers names {', '.join(named)}, and nothing says whose each prompt is: name a column in "
                "prompts.columns.teacher"
            )
        if self.rollout.source in ("teacher", "prefix"):
            raise ValueError(
                f"rollout.source is {self.rollout.source}, which is for one teacher, and teachers names "
                f"{', '.join(named)}: set rollout.source to student, data, mixed or revise"
            )
        if self.evaluate is not None and self.evaluate.alignment is not None:
            raise ValueError(
                "evaluate.alignment compares the student with one teacher, and teachers names "
                f"{', '.join(named)}: leave it out"
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
            raise ValueError(
                "score.teacher_prompt.kind is column, and no column of that kind is named in "
                f"{', '.join(f'{where}.columns.teacher_prompt' for where in missing)}"
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
                raise ValueError(
                    f"score.teacher_prompt shows {{{{{name}}}}} to the teacher, and no column is named in "
                    f"{', '.join(missing)}"
                )
        if reads.shuffled and self.rollout.rows_per_part == 1:
            raise ValueError(
                "score.teacher_prompt.shuffled exchanges answers among the prompts of a part, and "
                "rollout.rows_per_part is 1: raise it"
            )
        return self

    def _the_expert_can_read(self) -> None:
        expert = self.rollout.mixed.expert
        for name in expert.values_needed:
            if getattr(self.prompts.columns, name) is None:
                raise ValueError(
                    f"rollout.mixed.expert shows {{{{{name}}}}}, and no column is named in prompts.columns.{name}"
                )
        if expert.system is not None and self.prompts.template == "plain":
            raise ValueError(
                "rollout.mixed.expert.system belongs to prompts.template: chat; with plain, use expert.suffix"
            )
