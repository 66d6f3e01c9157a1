"""Settings of the score stage."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from eopd.stages.engines.sampling import EngineKind, EngineOptions
from eopd.stages.models.teacher_prompts import TeacherPromptSettings
from eopd.stages.settings import COUNT, ENTRIES, LENGTH, NATS, SEED, Settings, setting
from eopd.storage.errors import InputError
from eopd.storage.teacher_record import DrawMode, HeadRule

LEAST_WEIGHT = 1e-6
"""A token may have one draw for each such share of its probability: a million, which nothing has a use for."""


class HeadSettings(Settings):
    """Rule for which entries of the teacher's distribution are kept (``storage.teacher_record.HeadRule``)."""

    k_max: int = setting(16, "Most entries kept of a token", ge=1, le=ENTRIES)
    min_prob: float = setting(
        0.03, "Keep ids at least this probable; also the weight of each draw", ge=LEAST_WEIGHT, le=1.0
    )
    full_head_above: float = setting(
        0.4,
        "Keep all k_max entries where the entropy exceeds this (nats); -1: everywhere, a fixed top-k",
        ge=-1.0,
        le=NATS,
    )
    draws: DrawMode = setting("beyond_head", "beyond_head: unbiased draws of the rest; full: of everything; none")
    n_draws: int = setting(0, "Draws a token, with draws: full", ge=0, le=ENTRIES)
    seed: int = setting(0, "Seed of the draws", ge=0, le=SEED)

    @model_validator(mode="after")
    def _is_a_rule(self) -> HeadSettings:
        self.rule()
        return self

    def rule(self) -> HeadRule:
        return HeadRule(self.k_max, self.min_prob, self.full_head_above, self.draws, self.n_draws, self.seed)


class ScoreSettings(Settings):
    """The teacher's statistics of response tokens, and the speed of computing them."""

    teacher_prompt: TeacherPromptSettings = setting(TeacherPromptSettings, "The prompt as the teacher reads it")
    temperature: float | None = setting(
        None,
        "Teacher logits are divided by it (null: the rollout's; another one is refused, see below)",
        gt=0.0,
        le=100.0,
    )
    allow_other_temperature: bool = setting(
        False, "Score at a temperature that the rollouts were not sampled at", keyed=False
    )
    head: HeadSettings = setting(HeadSettings, "Which entries of the distribution are kept")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Of the teacher's forward pass (auto: the teacher's own); the statistics are float32 in any case"
    )
    max_tokens: int | None = setting(
        None, "Longest context + response the teacher reads, tokens (null: what its config allows)", ge=2, le=LENGTH
    )
    too_long: Literal["refuse", "truncate"] = setting(
        "refuse", "A longer one: refuse its part, or score the response's first tokens that fit"
    )
    engine: EngineKind = setting(
        "auto",
        "vllm, transformers, or auto: vLLM if it is installed and known to read the teacher right",
        keyed=False,
    )
    engine_options: EngineOptions = setting(EngineOptions, "Speed and placement of the engine", keyed=False)
    batch_tokens: int = setting(
        16384,
        "Tokens the teacher reads in one call of the engine (transformers on a CPU: at most 1,024, more are slower)",
        keyed=False,
        ge=1,
        le=COUNT,
    )
    row_tokens: int = setting(
        2048,
        "transformers engine: most tokens of a packed row; rows are no longer than a part's longest sequence",
        keyed=False,
        ge=1,
        le=LENGTH,
    )
    first_batch_check: bool = setting(
        True,
        "Compare distributions of a few sequences with the checkpoint's own, which is loaded again, before storing",
        keyed=False,
    )

    @field_validator("engine_options")
    @classmethod
    def _of_a_reader(cls, value: EngineOptions) -> EngineOptions:
        return value.of_a_reader()

    def identity(self) -> dict[str, Any]:
        """Return the settings that define the scores, besides the models and the rollouts: part of the artifact's
        key."""
        kept = self.semantic()
        del kept["head"]
        return kept

    def coverage(self) -> dict[str, Any]:
        """Return how much of the distributions is kept; it is keyed apart from the identity."""
        return {"head": self.head.semantic()}

    def resolve_temperature(self, rollout_temperature: float) -> float:
        """Return the scoring temperature.

        Raises:
            ValueError: it is not the rollouts', and ``allow_other_temperature`` is off.
        """
        if self.temperature is None or self.temperature == rollout_temperature:
            return rollout_temperature
        if not self.allow_other_temperature:
            raise InputError(
                f"score.temperature is {self.temperature}, but the rollouts were sampled at {rollout_temperature}: "
                "log ratios of the two would compare different distributions",
                setting="score.temperature",
                remedy="Remove score.temperature, or set score.allow_other_temperature: true if you mean it.",
            )
        return self.temperature
