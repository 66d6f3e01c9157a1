"""Settings of the evaluate stage, and how its problems are cut into parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from eopd.stages.align.settings import AlignmentSettings
from eopd.stages.engines.sampling import EngineKind, EngineOptions, SamplingParameters
from eopd.stages.models.prompts import Columns, PromptSettings, VerifierName, count_prompts
from eopd.stages.route.settings import STANDARD, RouteSettings
from eopd.stages.settings import COUNT, DAY, LENGTH, PROCESSES, ROUNDS, Settings, setting
from eopd.storage.errors import InputError


class ProblemColumns(Columns):
    """Column names of a benchmark; every problem needs a reference answer."""

    prompt: str = setting("problem", "The problem: text (one user message), or a list of {role, content} messages")
    id: str | None = setting("id", "A unique id (null: the row's number)")
    answer: str | None = setting("answer", "The reference answer that the verifier reads")

    @field_validator("answer")
    @classmethod
    def _there_is_an_answer(cls, value: str | None) -> str:
        if value is None:
            raise ValueError("a verifier needs the column of reference answers")
        return value

    @model_validator(mode="after")
    def _nothing_of_training(self) -> ProblemColumns:
        for name in ("teacher", "response", "labels"):
            if getattr(self, name) is not None:
                raise InputError(
                    f"{name} names a column, which only training prompts have", setting=name, remedy="remove it"
                )
        return self


class BenchmarkSettings(Settings):
    """One set of problems with reference answers."""

    name: str = setting(..., "Name in the results", min_length=1)
    path: str = setting(..., "JSONL, Parquet, or a folder saved with save_to_disk (known by content)", keyed=False)
    split: str | None = setting(None, "Split of a folder that holds several")
    columns: ProblemColumns = setting(ProblemColumns, "Which column holds what")
    verifier: VerifierName = setting("math", "Who judges: math (math-verify), countdown, or exact (equal texts)")
    limit: int | None = setting(None, "Use the first problems only (null: all)", ge=1, le=COUNT)


ModeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=40)]


class ModeSettings(Settings):
    """Prompt settings of a mode; null ones are those of `evaluate`."""

    template: Literal["chat", "plain"] | None = setting(None, "As evaluate.template")
    template_arguments: dict[str, Any] | None = setting(None, "As evaluate.template_arguments")
    system: str | None = setting(None, "As evaluate.system")
    suffix: str | None = setting(None, "As evaluate.suffix")

    @property
    def changes(self) -> dict[str, Any]:
        return {name: value for name, value in self if value is not None}


class EvaluateSettings(Settings):
    """Settings of evaluation: benchmarks, samples per problem, sampling and grading.

    Null settings that training has too are filled in from there (``following``).
    """

    benchmarks: tuple[BenchmarkSettings, ...] = setting(..., "The benchmarks, by unique names", min_length=1)
    every: int = setting(
        1,
        "Measure the students of every this many rounds; the first and the last always are",
        keyed=False,
        ge=1,
        le=ROUNDS,
    )
    samples: int = setting(8, "Responses to each problem (Avg@k and Pass@k have every k up to it)", ge=1, le=100_000)
    temperature: float = setting(1.0, "Sampling temperature (0: greedy)", ge=0.0, le=100.0)
    top_p: float = setting(
        1.0, "Sample from the smallest set of tokens with this mass (1: all; paper: 0.8)", gt=0, le=1
    )
    max_new_tokens: int | None = setting(
        None,
        "Longest response, tokens; a longer one is cut and rarely right (null: as rollout.max_new_tokens)",
        ge=1,
        le=LENGTH,
    )
    template: Literal["chat", "plain"] | None = setting(
        None,
        "chat: the tokenizer's chat template; plain: the text and the suffix, as base models are prompted (null: as "
        "`prompts` has it, with its template_arguments and system where there are none here)",
    )
    template_arguments: dict[str, Any] = setting({}, "Arguments of the chat template, such as enable_thinking: false")
    system: str | None = setting(None, "System message put before the problem (chat only)")
    suffix: str | None = setting(None, "Text put after the problem (null: as prompts.suffix)")
    max_prompt_tokens: int = setting(2048, "Longest prompt, tokens", ge=1, le=LENGTH)
    too_long: Literal["skip", "refuse"] = setting(
        "refuse", "A longer prompt is left out and counted, or refused: results without it are of other problems"
    )
    confidence: float = setting(0.95, "Confidence of the bootstrap intervals", gt=0.0, lt=1.0)
    resamples: int = setting(2000, "Bootstrap resamples of the problems", ge=100, le=1_000_000)
    rows_per_part: int = setting(
        256, "Problems a part: the unit of resuming and of distribution, sampled in one engine call", ge=1, le=COUNT
    )
    seconds_per_answer: float = setting(10.0, "Time limit of the math verifier for one answer", gt=0.0, le=DAY)
    verifier_workers: int = setting(2, "Processes of the math verifier", keyed=False, ge=1, le=PROCESSES)
    # keyed apart: an artifact of its own, so that asking for it leaves every evaluation as it is
    alignment: AlignmentSettings | None = setting(
        None, "Teacher against student on these samples, by teacher entropy (null: not measured)", keyed=False
    )
    # keyed apart too: each mode is an evaluation with a key of its own
    modes: dict[ModeName, ModeSettings] = setting(
        {},
        "Other ways to prompt the same problems, by name (direct, cot): each is evaluated like the settings above, "
        "which are the mode `standard`",
        keyed=False,
    )
    route: RouteSettings | None = setting(
        None, "Choice of a mode for each problem by the entropy of the first tokens (null: not measured)", keyed=False
    )
    engine: EngineKind = setting("auto", "vllm, transformers, or auto: vLLM if it is installed", keyed=False)
    engine_options: EngineOptions = setting(EngineOptions, "Speed and placement of the engine", keyed=False)

    @field_validator("temperature")
    @classmethod
    def _can_be_sampled_at(cls, value: float) -> float:
        SamplingParameters(temperature=value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateSettings:
        names = [benchmark.name for benchmark in self.benchmarks]
        for name in names:
            if names.count(name) > 1:
                raise InputError(
                    f"evaluate.benchmarks: the name {name!r} is given to {names.count(name)} of them",
                    setting="evaluate.benchmarks",
                )
        for benchmark in self.benchmarks:
            self.prompts_of(benchmark)
        if self.alignment is not None and self.alignment.samples > self.samples:
            raise InputError(
                f"evaluate.alignment.samples is {self.alignment.samples}, but evaluate.samples only {self.samples}",
                setting="evaluate.alignment.samples",
            )
        if self.template is not None and self.suffix is not None:  # else `following` fills them in first
            self._modes_differ()
        if self.route is not None:
            self._check_route(self.route)
        return self

    def _modes_differ(self) -> None:
        seen: dict[str, str] = {}
        for name in self.mode_names:
            if name == STANDARD and self.modes.get(name, ModeSettings()).changes:
                raise InputError(
                    f"evaluate.modes.{STANDARD} is evaluate itself",
                    setting=f"evaluate.modes.{STANDARD}",
                    remedy=f"set {', '.join(self.modes[name].changes)} there, or choose another name",
                )
            try:
                read = str([self.in_mode(name).prompts_of(benchmark) for benchmark in self.benchmarks])
            except ValidationError as error:
                raise InputError(
                    f"evaluate.modes.{name}: {error.errors()[0]['msg']}", setting=f"evaluate.modes.{name}"
                ) from error
            if read in seen:
                raise InputError(
                    f"evaluate.modes.{name} prompts as {seen[read]} does",
                    setting=f"evaluate.modes.{name}",
                    remedy="change its suffix, system, template or template_arguments, or remove it",
                )
            seen[read] = name

    def _check_route(self, route: RouteSettings) -> None:
        if len(self.mode_names) < 2:
            raise InputError(
                "evaluate.route has no modes to choose from",
                setting="evaluate.route",
                remedy="name at least one in evaluate.modes",
            )
        if self.max_new_tokens is not None and route.tokens > self.max_new_tokens:
            raise InputError(
                f"evaluate.route.tokens is {route.tokens}, and responses end at evaluate.max_new_tokens = "
                f"{self.max_new_tokens}",
                setting="evaluate.route.tokens",
                remedy="lower the one or raise the other",
            )
        if self.temperature > 0 and not route.sampled:
            raise InputError(
                f"evaluate.route reads greedy responses, and evaluate.temperature is {self.temperature:g}",
                setting="evaluate.temperature",
                remedy="set it to 0, or set evaluate.route.sampled: true to route each sample by itself",
            )
        unknown = sorted({*(route.rule.modes if route.rule else ())} - {*self.mode_names})
        if unknown:
            raise InputError(
                f"evaluate.route names the mode {unknown[0]}, and evaluate.modes has {', '.join(self.mode_names)}",
                setting="evaluate.route.rule",
            )

    @property
    def mode_names(self) -> list[str]:
        """The modes, `standard` first."""
        return [STANDARD, *(name for name in self.modes if name != STANDARD)]

    def in_mode(self, name: str) -> EvaluateSettings:
        """Return the settings of the evaluation in a mode; of `standard` (or ``""``) these."""
        changes = {} if name in ("", STANDARD) else self.modes[name].changes
        return self.model_copy(update=changes) if changes else self

    def following(self, prompts: PromptSettings, max_new_tokens: int) -> EvaluateSettings:
        """Fill null fields from a run's prompts and rollouts."""
        filled: dict[str, Any] = {}
        if self.max_new_tokens is None:
            filled["max_new_tokens"] = max_new_tokens
        if self.suffix is None:
            filled["suffix"] = prompts.suffix
        if self.template is None:
            if prompts.template == "plain" and (self.template_arguments or self.system is not None):
                raise InputError(
                    "evaluate.template_arguments and evaluate.system belong to template: chat, and "
                    "prompts.template, which evaluate follows, is plain",
                    setting="evaluate.template",
                    remedy="set evaluate.template: chat",
                )
            filled["template"] = prompts.template
            filled["template_arguments"] = self.template_arguments or prompts.template_arguments
            filled["system"] = prompts.system if self.system is None else self.system
        return EvaluateSettings.model_validate({**self.model_dump(), **filled}) if filled else self

    def prompts_of(self, benchmark: BenchmarkSettings) -> PromptSettings:
        """Return the benchmark as a prompt source."""
        return PromptSettings(
            path=benchmark.path,
            split=benchmark.split,
            limit=benchmark.limit,
            columns=Columns(**benchmark.columns.model_dump()),
            verifier=benchmark.verifier,
            template=self.template or "chat",
            template_arguments=self.template_arguments,
            system=self.system,
            suffix=self.suffix or "",
            max_prompt_tokens=self.max_prompt_tokens,
            too_long=self.too_long,
        )

    def parameters(self, stop_ids: tuple[int, ...]) -> SamplingParameters:
        assert self.max_new_tokens is not None, "a run fills it in"
        return SamplingParameters(
            temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens, stop_ids=stop_ids
        )


@dataclass(frozen=True)
class Chunk:
    """The problems of one part: rows [start, stop) of a benchmark's source."""

    benchmark: int
    start: int
    stop: int


def chunks(settings: EvaluateSettings) -> list[Chunk]:
    """List the parts of an evaluation, in order.

    Raises:
        ValueError: a source is missing or empty.
    """
    parts = []
    for number, benchmark in enumerate(settings.benchmarks):
        count = count_prompts(settings.prompts_of(benchmark))
        step = settings.rows_per_part
        parts += [Chunk(number, start, min(start + step, count)) for start in range(0, count, step)]
    return parts
