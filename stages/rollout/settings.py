"""Settings of the rollout stage: writers and sampling of the responses."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from eopd.stages.engines.sampling import MIN_TEMPERATURE, EngineKind, EngineOptions, SamplingParameters
from eopd.stages.models import teacher_prompts as placeholders
from eopd.stages.settings import COUNT, ENTRIES, LENGTH, Settings, setting
from eopd.storage.errors import InputError

Source = Literal["student", "teacher", "prefix", "mixed", "revise", "data"]
OFF_POLICY: frozenset[Source] = frozenset({"teacher", "mixed", "data"})
"""Sources whose tokens are no samples of the student that is trained: it has no log-probs of when they were drawn."""


class GuideSettings(Settings):
    """Sampling of the teacher's own responses, which experiments with equal settings share."""

    samples: int | None = setting(
        None, "Responses of the teacher to each prompt (None: rollout.samples_per_prompt)", ge=1, le=1_000_000
    )
    temperature: float | None = setting(
        None, "Sampling temperature (None: rollout.temperature)", ge=MIN_TEMPERATURE, le=100.0
    )
    max_new_tokens: int | None = setting(None, "Longest response (None: rollout.max_new_tokens)", ge=1, le=LENGTH)
    engine: EngineKind | None = setting(None, "Engine (None: rollout.engine)", keyed=False)
    engine_options: EngineOptions | None = setting(
        None, "Speed and placement of the engine (None: rollout.engine_options)", keyed=False
    )


class PrefixSettings(Settings):
    """Length of the teacher's part of a response (`source: prefix`, arXiv 2606.01249): most tokens by a cosine."""

    start: int | None = setting(
        None, "Most tokens of the teacher at the beginning of the run (None: rollout.max_new_tokens)", ge=1, le=LENGTH
    )
    end: int = setting(0, "Most tokens of the teacher at its end", ge=0, le=LENGTH)
    over: Literal["rounds", "responses"] = setting(
        "rounds",
        "The cosine goes by round, so that the last one is on-policy; or by response, over all rounds, so that one "
        "round has every length",
    )
    length: Literal["cap", "uniform"] = setting(
        "cap", "As many tokens as the cosine allows, or a uniform number of at most so many"
    )


class ExpertSettings(Settings):
    """The expert's reading of a prompt: the student's, with another suffix or system message."""

    system: str | None = setting(
        None,
        "System message in place of prompts.system (chat only); may hold {{answer}} and {{solution}}. None: that one",
    )
    suffix: str | None = setting(
        None,
        "Text after the prompt in place of prompts.suffix; may hold {{answer}} and {{solution}}. None: that one",
    )

    @model_validator(mode="after")
    def _placeholders_are_of_the_prompt(self) -> ExpertSettings:
        for name, text in (("suffix", self.suffix), ("system", self.system)):
            later = [one for one in placeholders.names_in(text or "") if one in (*placeholders.JUDGED, "response")]
            if later:
                raise InputError(
                    f"rollout.mixed.expert.{name} holds {{{{{later[0]}}}}}, and there is no response yet; it may "
                    f"hold {{{{answer}}}} and {{{{solution}}}}",
                    setting=f"rollout.mixed.expert.{name}",
                )
            placeholders.check(f"rollout.mixed.expert.{name}", text or "", placeholders.OF_PROMPT)
        return self

    @property
    def values_needed(self) -> tuple[str, ...]:
        """Names of the placeholders in these settings."""
        names = placeholders.names_in(f"{self.system or ''} {self.suffix or ''}")
        return tuple(name for name in placeholders.OF_PROMPT if name in names)


class MixedSettings(Settings):
    """Tokens that the student writes under the plain prompt and under an expert prompt (`source: mixed`, MixSD)."""

    student_share: float = setting(
        0.5, "Probability of a token to be written under the plain prompt (1: all of them; 0: none)", ge=0.0, le=1.0
    )
    temperature: float | None = setting(
        None, "Sampling temperature; 0: the most probable token (None: rollout.temperature)", ge=0.0, le=100.0
    )
    expert: ExpertSettings = setting(ExpertSettings, "The expert prompt")

    @field_validator("temperature")
    @classmethod
    def _temperature_is_not_tiny(cls, value: float | None) -> float | None:
        if value is not None and 0.0 < value < MIN_TEMPERATURE:
            raise InputError(f"must be 0 (the most probable token) or at least {MIN_TEMPERATURE}")
        return value


class PhrasesSettings(Settings):
    """Texts between a first answer and its revision, by the verdict on it."""

    wrong: str = setting("", "Text after a wrong answer")
    right: str | None = setting(None, "Text after a right answer; needed with `when: always`")


class ReviseSettings(Settings):
    """A first answer, a phrase by the verdict on it, and a second answer (`source: revise`, SD-Zero)."""

    when: Literal["wrong", "always"] = setting("wrong", "Which first answers are revised")
    phrases: PhrasesSettings = setting(PhrasesSettings, "The phrases; without special tokens")
    first_tokens: int | None = setting(
        None,
        "Longest first answer, tokens; a longer one is cut and wrong (None: half of max_new_tokens)",
        ge=1,
        le=LENGTH,
    )


class AttemptsSettings(Settings):
    """Sample again what `prompts.verifier` does not find right. Rollouts then carry the verdicts."""

    until: Literal["right"] = setting("right", "What ends the attempts at a response")
    most: int = setting(..., "Most attempts at a response; the last one is stored, right or wrong", ge=1, le=100_000)


class RolloutSettings(Settings):
    """Writers and sampling of the responses."""

    source: Source = setting(
        "student",
        "Who writes the responses: the student; the teacher (its own answers, sampled once for every experiment); "
        "prefix (the teacher begins them and the student goes on); mixed (the student, some tokens under a prompt that "
        "shows it more); revise (the student, and once more after the verdict on its answer); data (they come with the "
        "prompts, prompts.columns.response)",
    )
    prompts_per_round: int = setting(
        128, "Prompts drawn each round, without repetition within an epoch", ge=1, le=COUNT
    )
    samples_per_prompt: int = setting(1, "Responses to each prompt", ge=1, le=1_000_000)
    temperature: float = setting(1.0, "Sampling temperature", ge=MIN_TEMPERATURE, le=100.0)
    top_p: float = setting(
        1.0,
        "Sample from the smallest set of tokens with this mass (1: all; less, and any top_k or min_p, is refused for "
        "objectives that weigh tokens by the policy that drew them)",
        gt=0.0,
        le=1.0,
    )
    top_k: int = setting(0, "Sample from this many most probable tokens (0: all)", ge=0, le=ENTRIES)
    min_p: float = setting(0.0, "Sample from tokens at least this probable, relative to the top one", ge=0.0, le=1.0)
    max_new_tokens: int = setting(
        1024,
        "Longest response, tokens; a longer one is cut (finish reason: length). One that comes with its prompt is "
        "skipped or refused instead, as prompts.too_long says",
        ge=1,
        le=LENGTH,
    )
    rows_per_part: int = setting(
        128, "Prompts a part: the unit of resuming and of distribution, sampled in one engine call", ge=1, le=COUNT
    )
    student_topk: int = setting(
        0,
        "Also store the student's own k most probable tokens of every position (0: no). Rollouts stay; scores and all "
        "that follows are made anew",
        keyed=False,
        ge=0,
        le=ENTRIES,
    )
    guide: GuideSettings = setting(GuideSettings, "The teacher's own responses (source: teacher or prefix)")
    prefix: PrefixSettings = setting(PrefixSettings, "How long the teacher's part is (source: prefix)")
    mixed: MixedSettings = setting(MixedSettings, "Whose tokens a response holds (source: mixed)")
    revise: ReviseSettings = setting(ReviseSettings, "How answers are revised (source: revise)")
    attempts: AttemptsSettings | None = setting(
        None, "Sample again, under other seeds, what the verifier does not find right. None: each response once"
    )
    engine: EngineKind = setting("auto", "vllm, transformers, or auto: vLLM if it is installed", keyed=False)
    engine_options: EngineOptions = setting(EngineOptions, "Speed and placement of the engine", keyed=False)

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> RolloutSettings:
        if self.source not in ("teacher", "prefix") and self.guide != GuideSettings():
            raise InputError(
                f"rollout.guide has no effect with source: {self.source}",
                setting="rollout.guide",
                remedy="remove it, or name the source",
            )
        if self.source != "prefix" and self.prefix != PrefixSettings():
            raise InputError(
                f"rollout.prefix has no effect with source: {self.source}",
                setting="rollout.prefix",
                remedy="set source: prefix",
            )
        if self.source == "mixed":
            self._expert_sees_more()
        elif self.mixed != MixedSettings():
            raise InputError(
                f"rollout.mixed has no effect with source: {self.source}",
                setting="rollout.mixed",
                remedy="set source: mixed",
            )
        if self.source == "revise":
            self._phrases_are_given()
        elif self.revise != ReviseSettings():
            raise InputError(
                f"rollout.revise has no effect with source: {self.source}",
                setting="rollout.revise",
                remedy="set source: revise",
            )
        if self.source == "teacher" and self.guide.samples is not None:
            raise InputError(
                "rollout.guide.samples is for source: prefix; with source: teacher, rollout.samples_per_prompt says it",
                setting="rollout.guide.samples",
            )
        if self.source == "data" and self.samples_per_prompt != 1:
            raise InputError(
                f"rollout.samples_per_prompt is {self.samples_per_prompt}, and a row of source: data holds one "
                "response",
                setting="rollout.samples_per_prompt",
                remedy="set it to 1 (several responses to a prompt are several rows)",
            )
        self._attempts_differ()
        return self

    def _expert_sees_more(self) -> None:
        if self.engine == "vllm":
            raise InputError(
                "rollout.engine is vllm, which samples a response under one context, and with source: mixed every "
                "token follows two",
                setting="rollout.engine",
                remedy="set rollout.engine: transformers",
            )
        if self.mixed.expert == ExpertSettings():
            raise InputError(
                "rollout.source is mixed, and rollout.mixed.expert shows the student nothing more than the plain "
                "prompt does",
                setting="rollout.mixed.expert",
                remedy="set its suffix or system, with {{solution}} or {{answer}}",
            )
        if self.mixed.temperature == 0.0 and (self.top_p < 1.0 or self.top_k or self.min_p):
            raise InputError(
                "rollout.mixed.temperature is 0, so that rollout.top_p, top_k and min_p have no effect",
                setting="rollout.mixed.temperature",
                remedy="remove them",
            )

    def _phrases_are_given(self) -> None:
        phrases, always = self.revise.phrases, self.revise.when == "always"
        for name, text in (("wrong", phrases.wrong), *([("right", phrases.right)] if always else [])):
            if not text:
                raise InputError(
                    f"rollout.source is revise, and rollout.revise.phrases.{name} is empty",
                    setting=f"rollout.revise.phrases.{name}",
                    remedy=f"write the text after a {name} answer",
                )
        if phrases.right is not None and not always:
            raise InputError(
                "rollout.revise.phrases.right has no effect with when: wrong, which leaves right answers as they are",
                setting="rollout.revise.phrases.right",
                remedy="remove it, or set when: always",
            )
        if not self.revised_from < self.max_new_tokens:
            raise InputError(
                f"rollout.revise.first_tokens = {self.revised_from} leaves no room for a phrase and a second answer "
                f"within rollout.max_new_tokens = {self.max_new_tokens}",
                setting="rollout.revise.first_tokens",
                remedy="lower it",
            )

    @property
    def revised_from(self) -> int:
        """Most tokens of a first answer that may be revised."""
        return self.revise.first_tokens or max(1, self.max_new_tokens // 2)

    def _attempts_differ(self) -> None:
        if self.attempts is None:
            return
        if self.source == "data":
            raise InputError(
                "rollout.attempts has no effect with source: data, whose responses come with the prompts",
                setting="rollout.attempts",
                remedy="remove it",
            )
        fixed = self._what_is_fixed()
        if self.attempts.most > 1 and fixed:
            raise InputError(
                f"rollout.attempts.most is {self.attempts.most}, and with {fixed} nothing is random: every attempt "
                "would be the same",
                setting="rollout.attempts.most",
                remedy="Remove rollout.attempts, or sample from more than one token",
            )

    def _what_is_fixed(self) -> str:
        """Return the settings by which every token follows from those before it; empty if there are none."""
        fixed = "rollout.top_k: 1" if self.top_k == 1 else "rollout.min_p: 1" if self.min_p == 1.0 else ""
        if self.source != "mixed":
            return fixed
        fixed = fixed or ("rollout.mixed.temperature: 0" if self.mixed.temperature == 0.0 else "")
        coins = self.mixed.student_share
        return f"{fixed} and rollout.mixed.student_share: {coins:g}" if fixed and coins in (0.0, 1.0) else ""

    def semantic(self) -> dict[str, Any]:
        """Return the settings of the student's sampling. Those of other sources enter the keys of what they change."""
        kept = super().semantic()
        others = {"source", "guide", "prefix", "mixed", "revise"}
        if self.attempts is None:
            others.add("attempts")
        return {name: value for name, value in kept.items() if name not in others}

    @property
    def writer_is_the_student(self) -> bool:
        """True if the student, at some round's start, wrote the responses or continued them."""
        return self.source not in OFF_POLICY

    @property
    def engine_kind(self) -> EngineKind:
        """Return the engine that samples: transformers if every token follows two contexts."""
        return "transformers" if self.source == "mixed" else self.engine

    def parameters(self, stop_ids: tuple[int, ...]) -> SamplingParameters:
        own = self.mixed.temperature
        return SamplingParameters(
            temperature=own if self.source == "mixed" and own is not None else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_new_tokens=self.max_new_tokens,
            stop_ids=stop_ids,
        )

    def guided(self) -> RolloutSettings:
        """Return the settings by which the teacher samples."""
        guide = self.guide
        own = {
            "samples_per_prompt": guide.samples,
            "temperature": guide.temperature,
            "max_new_tokens": guide.max_new_tokens,
            "engine": guide.engine,
            "engine_options": guide.engine_options,
        }
        set_ = {name: value for name, value in own.items() if value is not None}
        kept = self.attempts if self.source == "teacher" else None
        return self.model_copy(update={**set_, "guide": GuideSettings(), "prefix": PrefixSettings(), "attempts": kept})
