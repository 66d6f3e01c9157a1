"""The sampling protocol: token ids in, sampled token ids and their log-probs out. One engine, one set of weights.

    engine = open_sampling_engine("auto", model, max_model_len=1024, log_dir=logs)
    samples = engine.sample([SamplingRequest(ids, seed), ...], SamplingParameters(stop_ids=(2,)), None)
    engine.close()

Log-probs come from the full softmax at the sampling temperature, before top-p / top-k / min-p truncation; where
something is truncated, the truncated ones are given too. Letters: T tokens of one response.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from eopd.stages.job import ModelRef, Progress
from eopd.stages.models.model_config import longest_readable
from eopd.stages.settings import COUNT, LENGTH, PROCESSES, THREADS, Settings, setting
from eopd.storage.errors import InputError

EngineKind = Literal["auto", "vllm", "transformers"]
FinishReason = Literal["stop", "length"]
OnProgress = Callable[[int, int], None]
"""Called with (newly sampled tokens, newly finished responses)."""

MIN_TEMPERATURE = 0.01
"""Below it vLLM silently samples at 0.01."""


class EngineOptions(Settings):
    """Settings of an engine's speed and placement. None of them enters an artifact's key."""

    device: str | None = setting(
        None, "Device of the transformers engine (None: cuda if present, else cpu)", keyed=False
    )
    max_batch: int | None = setting(
        None, "Most sequences decoded at once (None: the engine's choice)", keyed=False, ge=1, le=COUNT
    )
    max_model_len: int | None = setting(
        None,
        "Longest prompt + response an engine that samples is opened for, tokens (None: what the stage needs)",
        keyed=False,
        ge=2,
        le=LENGTH,
    )
    cpu_threads: int | None = setting(
        None,
        "Threads on a CPU (null: torch's, while sampling fewer for a small model). How many changes the last bits of "
        "logits, and so now and then a draw",
        keyed=False,
        ge=1,
        le=THREADS,
    )
    gpu_memory_utilization: float = setting(
        0.85, "vLLM on a GPU: share of its memory to take", keyed=False, gt=0.0, le=1.0
    )
    cpu_kv_cache_gib: float = setting(1.0, "Size of the KV cache on a CPU, GiB", keyed=False, gt=0.0, le=100_000.0)
    tensor_parallel: int = setting(1, "vLLM: GPUs that share one model", keyed=False, ge=1, le=PROCESSES)
    enforce_eager: bool | None = setting(
        None, "vLLM: do not compile (None: compile on a GPU, never on a CPU)", keyed=False
    )

    def of_a_reader(self) -> EngineOptions:
        """Return these options for an engine that only reads.

        Raises:
            ValueError: a length is stated, which would have no effect.
        """
        if self.max_model_len is not None:
            raise InputError(
                f"max_model_len={self.max_model_len} would have no effect: what is read decides how long an engine "
                "that samples nothing is opened for",
                setting="max_model_len",
                remedy="Remove it; score.max_tokens bounds what the teacher reads",
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _dtype_is_the_model_s(cls, raw: Any) -> Any:
        """Refuse a dtype; null, as older resolved configs have it, is ignored."""
        if not isinstance(raw, dict) or "dtype" not in raw:
            return raw
        if raw["dtype"] is not None:
            raise InputError(
                f"dtype: {raw['dtype']} decides what is stored, and how fast or where does not",
                setting="dtype",
                remedy="set student.dtype or teacher.dtype (score.dtype for the teacher's scores alone)",
            )
        return {name: value for name, value in raw.items() if name != "dtype"}


def torch_device(options: EngineOptions) -> str:
    """Device for a model that transformers runs."""
    import torch

    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Expert:
    """A second context of the response: another prompt, and the tokens that are drawn under it and not under the first.

    Every token of the response follows both contexts.
    """

    prompt_token_ids: Sequence[int]
    writes: NDArray[np.bool_]  # [max_new_tokens]


@dataclass(frozen=True)
class SamplingRequest:
    """One response to sample. n samples of a prompt are n requests with n seeds."""

    prompt_token_ids: Sequence[int]
    seed: int  # 0 <= seed < 2^63
    max_new_tokens: int | None = None  # at most those of the call, which None stands for
    expert: Expert | None = None  # engine transformers only; in all requests of a call or in none

    def limit(self, parameters: SamplingParameters) -> int:
        """Most tokens of the response."""
        return parameters.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True)
class SamplingParameters:
    """Sampling parameters shared by all requests of a call."""

    temperature: float = 1.0  # 0 is greedy; its log-probs are those of temperature 1
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    max_new_tokens: int = 256
    stop_ids: tuple[int, ...] = ()  # sampling any of these ends the response, which keeps it as its last token
    logprobs: bool = True  # False: samples carry none, which is faster

    def __post_init__(self) -> None:
        if self.temperature < 0.0 or 0.0 < self.temperature < MIN_TEMPERATURE:
            raise InputError(
                f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, got {self.temperature}",
                setting="temperature",
            )
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}", setting="top_p")
        if not 0.0 <= self.min_p <= 1.0:
            raise InputError(f"min_p must be in [0, 1], got {self.min_p}", setting="min_p")
        if self.top_k < 0:
            raise InputError(f"top_k must be >= 0 (0: all), got {self.top_k}", setting="top_k")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}", setting="max_new_tokens")

    @property
    def truncates(self) -> bool:
        """True if some tokens with positive probability can never be drawn."""
        return self.temperature > 0.0 and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0)


@dataclass(frozen=True)
class Sample:
    """One sampled response of T tokens."""

    token_ids: NDArray[np.int32]  # [T] with the stop token, when one was sampled, as the last
    finish_reason: FinishReason
    stop_token_id: int | None  # the last token when finish_reason is "stop"
    # [T] full softmax at the sampling temperature, nats; None if not requested, and from vLLM if it truncates
    logprobs: NDArray[np.float32] | None = None
    truncated_logprobs: NDArray[np.float32] | None = None  # [T] nats; None where nothing is truncated


class SamplingEngine(Protocol):
    """A model opened for sampling.

    ``sample`` is deterministic for equal requests in equal order on one machine with equal ``cpu_threads``. A batch
    of other composition may differ where float rounding decides a draw.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def max_tokens(self) -> int:
        """Maximum tokens of prompt and response together."""

    def sample(
        self,
        requests: Sequence[SamplingRequest],
        parameters: SamplingParameters,
        on_progress: OnProgress | None = None,
    ) -> list[Sample]:
        """Sample every request; results are in the order of the requests.

        Raises:
            ValueError: a prompt with ``max_new_tokens`` does not fit ``max_tokens``, an empty prompt, or a
                parameter the engine cannot serve.
        """

    @property
    def is_open(self) -> bool:
        """True until the engine is closed, or ended by the closing of another engine of its process."""

    def load(self, ref: ModelRef) -> None:
        """Replace the weights by those of ``ref``, a model of the same shape and dtype.

        The caller must ``probe`` the engine afterwards (``engines.probe``).

        Raises:
            ValueError: it would not; the engine is of no more use and is to be closed.
        """

    def logprobs_of(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Return log-probs (full softmax, temperature 1, nats) of every token of each sequence but its first: [L - 1]
        each."""

    def close(self) -> None:
        """Free the model. The engine cannot be used again."""


class SamplingMeter:
    """Progress of sampling several parts, in tokens, including those still being decoded.

    The total is unknown until a response has ended. Then it is estimated from the tokens so far per response that has
    ended (the usual estimate of a lifetime while some are still running), at most ``max_new_tokens`` each.
    """

    def __init__(self, progress: Progress, what: str, responses: int, max_new_tokens: int) -> None:
        self._progress = progress
        self._responses, self._longest = responses, max_new_tokens
        self.tokens = self.finished = 0
        self._part_tokens = self._part_responses = 0
        progress.line(f"{what}: {responses:,} responses of at most {max_new_tokens:,} tokens")
        progress.start(what, 0)

    def begin(self, responses: int) -> None:
        """Begin the next part, with this many responses."""
        self._part_tokens, self._part_responses = 0, responses

    def advance(self, tokens: int, finished: int) -> None:
        """Update the progress; an engine's ``OnProgress``."""
        self.tokens += tokens
        self.finished += finished
        self._part_tokens += tokens
        self._progress.advance(tokens, responses=self.finished)
        if not self.finished:
            return
        length = min(self._longest, self.tokens / self.finished)
        in_hand = max(round(self._part_responses * length) - self._part_tokens, 0)
        self._progress.expect(max(round(self._responses * length), self.tokens + in_hand), in_hand)


def check_requests(requests: Sequence[SamplingRequest], parameters: SamplingParameters, max_tokens: int) -> None:
    """Raise ValueError for the first request that an engine opened for ``max_tokens`` cannot serve."""
    for number, request in enumerate(requests):
        prompts = [request.prompt_token_ids, *([request.expert.prompt_token_ids] if request.expert else [])]
        length = max(map(len, prompts))
        if not all(map(len, prompts)):
            raise ValueError(f"request {number} has an empty prompt: nothing predicts its first token")
        limit = request.limit(parameters)
        assert 1 <= limit <= parameters.max_new_tokens, limit
        if length + limit > max_tokens:
            raise ValueError(
                f"request {number}: a prompt of {length} tokens and max_new_tokens {limit} do not fit the {max_tokens} "
                "tokens the engine was opened for"
            )
        assert 0 <= request.seed < 2**63, request.seed


def check_model_length(folder: Path, name: str, max_model_len: int) -> None:
    """Raise ValueError if a model was not made for sequences of ``max_model_len`` tokens."""
    longest = longest_readable(folder)
    if longest is not None and max_model_len > longest:
        raise InputError(
            f"{name} reads at most {longest} tokens (its config), but prompt and response may take {max_model_len}",
            file=folder,
            remedy="lower max_prompt_tokens or max_new_tokens",
        )


def derive_seed(seed: int, *names: str | int) -> int:
    """Derive a seed in [0, 2^63) from the arguments alone, independent of batch, part and machine."""
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
