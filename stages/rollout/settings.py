"""Settings of the rollout stage."""

from __future__ import annotations

from eopd.stages.engines.sampling import MIN_TEMPERATURE, EngineKind, EngineOptions, SamplingParameters
from eopd.stages.settings import COUNT, ENTRIES, LENGTH, Settings, setting


class RolloutSettings(Settings):
    """How the student's responses are sampled."""

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
        1024, "Longest response, tokens; a longer one is cut (finish reason: length)", ge=1, le=LENGTH
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
    engine: EngineKind = setting("auto", "vllm, transformers, or auto: vLLM where it is installed", keyed=False)
    engine_options: EngineOptions = setting(EngineOptions, "How fast and where the engine runs", keyed=False)

    def parameters(self, stop_ids: tuple[int, ...]) -> SamplingParameters:
        return SamplingParameters(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_new_tokens=self.max_new_tokens,
            stop_ids=stop_ids,
        )
