"""Sampling with transformers, for machines without vLLM and as an independent check of it.

Requests are sorted by length, left-padded and decoded together; rows that have finished are dropped. A request's
random numbers come from its own seed, one per position, so a sample depends on its neighbours by float rounding
only. Letters: B rows, L tokens so far, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eopd.stages.engines.decoding import can_drop_rows, grouped_attention, roomy_cache
from eopd.stages.engines.sampling import (
    EngineOptions,
    OnProgress,
    Sample,
    SamplingParameters,
    SamplingRequest,
    check_model_length,
    check_requests,
    torch_device,
)
from eopd.stages.job import ModelRef
from eopd.stages.models.lm_head import probe_ids, refusal
from eopd.stages.models.loading import load_model, model_folder
from eopd.stages.models.memory import give_back_gpu_memory, weight_bytes
from eopd.stages.models.model_config import refuse_crossing
from eopd.stages.models.packing import TOLERANCE
from eopd.stages.models.threads import decoding_threads, torch_threads

MAX_BATCH = 256
KEEP_FRACTION = 0.75
"""Rows are compacted when no more than this share of them is still running: a compaction copies the KV cache."""


class TransformersSamplingEngine:
    """A ``SamplingEngine`` on a transformers model and its KV cache."""

    name = "transformers"

    def __init__(self, ref: ModelRef, *, max_model_len: int, options: EngineOptions) -> None:
        self._folder = model_folder(ref.path, ref.revision)
        check_model_length(self._folder, ref.path, max_model_len)
        self.version = version("transformers")
        self.max_tokens = max_model_len
        self._options = options
        self._device = torch_device(options)
        on_cpu = self._device == "cpu"
        self._threads = decoding_threads(options.cpu_threads, weight_bytes(self._folder)) if on_cpu else None
        self._model: Any = None
        self.load(ref)
        self._cache_name = _cache_name(self._model)
        with self._working():
            self._takes_padding = _takes_padding(self._model)

    @property
    def is_open(self) -> bool:
        return self._model is not None

    def load(self, ref: ModelRef) -> None:
        self._model = None  # the old weights go before the new ones come
        self._model = load_model(ref, self._device)

    @torch.inference_mode()
    def logprobs_of(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        with self._working():
            return [sequence_logprobs(self._model, sequence, self._device) for sequence in sequences]

    @torch.inference_mode()
    def sample(
        self,
        requests: Sequence[SamplingRequest],
        parameters: SamplingParameters,
        on_progress: OnProgress | None = None,
    ) -> list[Sample]:
        assert self._model is not None, "the engine is closed"
        check_requests(requests, parameters, self.max_tokens)
        if not requests:
            return []
        longest = _longest(requests, parameters)
        refuse_crossing(self._folder, str(self._folder), longest, "a sample would depend on its neighbours' lengths")
        order = sorted(range(len(requests)), key=lambda number: (-len(requests[number].prompt_token_ids), number))
        samples: dict[int, Sample] = {}
        with self._working():
            rows = self._options.max_batch or self._rows_that_fit(requests, parameters)
            rows = rows if self._takes_padding else 1
            for start in range(0, len(order), rows):
                batch = order[start : start + rows]
                decoded = self._decode([requests[number] for number in batch], parameters, on_progress)
                samples.update(zip(batch, decoded, strict=True))
        return [samples[number] for number in range(len(requests))]

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Wrap every use of the model."""
        with torch_threads(self._threads), grouped_attention():
            yield

    def close(self) -> None:
        self._model = None
        give_back_gpu_memory()

    def _rows_that_fit(self, requests: Sequence[SamplingRequest], parameters: SamplingParameters) -> int:
        """Return how many sequences' KV caches fit: on a GPU into half of the free memory, on a CPU into the same as
        vLLM's.

        On a CPU it depends on nothing but the call, which therefore gives the same bytes in any process.
        """
        longest = _longest(requests, parameters) * (2 if any(request.expert for request in requests) else 1)
        config = self._model.config.get_text_config()
        all_heads = getattr(config, "num_attention_heads", None) or 1  # none in a pure state-space model
        heads = getattr(config, "num_key_value_heads", None) or all_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // all_heads
        row_bytes = 2 * config.num_hidden_layers * heads * size * self._model.dtype.itemsize * longest
        room = int(self._options.cpu_kv_cache_gib * 2**30)
        if self._device.startswith("cuda"):
            room = torch.cuda.mem_get_info(self._device)[0] // 2
        return max(1, min(MAX_BATCH, int(room // row_bytes)))

    def _decode(
        self, requests: Sequence[SamplingRequest], parameters: SamplingParameters, on_progress: OnProgress | None
    ) -> list[Sample]:
        """Sample one batch, all rows at once."""
        state = _Batch.of(requests, parameters, self._device)
        contexts = self._contexts(requests)
        written = _Written.empty(requests, parameters)
        stop_ids = torch.tensor(parameters.stop_ids, dtype=torch.int64, device=self._device)
        droppable = all(can_drop_rows(context.cache) for context in contexts)
        for step in range(int(state.limits.max())):
            logits = contexts[0].read(self._model)
            if state.by_expert is not None:  # both contexts read every token, whoever writes the next one
                logits = torch.where(state.by_expert[:, step, None], contexts[1].read(self._model), logits)
            drawn, full, truncated = _draw(logits, state.uniforms[:, step], parameters)
            stopped = torch.isin(drawn, stop_ids)
            written.write(state.rows, step, drawn, full, truncated, stopped)
            stopped = stopped | (step + 1 >= state.limits)  # cut
            newly, drawn_count = int((stopped & ~state.finished).sum()), int((~state.finished).sum())
            if on_progress is not None:
                on_progress(drawn_count, newly)
            state.finished |= stopped
            if bool(state.finished.all()):
                break
            keep = (~state.finished).nonzero().squeeze(1)
            if droppable and len(keep) <= KEEP_FRACTION * len(state.finished):
                state, drawn = state.select(keep), drawn[keep]
                for context in contexts:
                    context.select(keep)
            for context in contexts:
                context.append(drawn)
        return written.samples()

    def _contexts(self, requests: Sequence[SamplingRequest]) -> list[_Context]:
        """Return what predicts the responses' tokens: their prompts, and those of their experts if they have any."""
        prompts = [[request.prompt_token_ids for request in requests]]
        experts = [request.expert.prompt_token_ids for request in requests if request.expert is not None]
        assert len(experts) in (0, len(requests)), "some requests of a call have an expert, and others have none"
        return [
            _Context(of_context, self._model, self._cache_name, self._device, is_masked=self._takes_padding)
            for of_context in (*prompts, *([experts] if experts else []))
        ]


class _Context:
    """The prompts of the rows, what was appended to them, and the KV cache of both."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], model: Any, cache_name: str, device: str, *, is_masked: bool
    ) -> None:
        lengths = [len(prompt) for prompt in prompts]
        ids = np.zeros((len(prompts), max(lengths)), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            ids[row, -length:] = prompt
            mask[row, -length:] = 1
        self.cache = roomy_cache(model.config)
        self._cache_name = cache_name
        self._is_masked = is_masked  # False: one row, without padding
        self._mask = torch.from_numpy(mask).to(device)  # [B, L] int64, 0 on padding
        self._lengths = torch.tensor(lengths, device=device)  # [B] tokens of prompt and response
        self._ids = torch.from_numpy(ids).to(device)  # [B, L] int64, to be read next; prompts are left-padded
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)  # [B, L] int64

    def read(self, model: Any) -> Tensor:
        """Read the ids that are next and return the logits [B, V] after them."""
        out = model(
            input_ids=self._ids,
            attention_mask=self._mask if self._is_masked else None,
            position_ids=self._positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: self.cache},
        )
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def select(self, keep: Tensor) -> None:
        """Drop all rows but these."""
        self.cache.batch_select_indices(keep)
        self._mask, self._lengths = self._mask[keep], self._lengths[keep]

    def append(self, ids: Tensor) -> None:
        """Append one token [B] to every row."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        self._ids, self._positions = ids[:, None], self._lengths[:, None]
        self._lengths = self._lengths + 1


@dataclass
class _Batch:
    """The rows still being decoded."""

    uniforms: Tensor  # [B, max_new_tokens] float64 in [0, 1)
    limits: Tensor  # [B] most tokens of the response
    finished: Tensor  # [B] bool
    rows: Tensor  # [B] number of the request
    by_expert: Tensor | None  # [B, max_new_tokens] bool: the token is drawn under the expert's context

    @classmethod
    def of(cls, requests: Sequence[SamplingRequest], parameters: SamplingParameters, device: str) -> _Batch:
        uniforms = np.stack([_uniforms(request.seed, parameters.max_new_tokens) for request in requests])
        by_expert = [request.expert.writes for request in requests if request.expert is not None]
        return cls(
            uniforms=torch.from_numpy(uniforms).to(device),
            limits=torch.tensor([request.limit(parameters) for request in requests], device=device),
            finished=torch.zeros(len(requests), dtype=torch.bool, device=device),
            rows=torch.arange(len(requests), device=device),
            by_expert=torch.from_numpy(np.stack(by_expert)).to(device) if by_expert else None,
        )

    def select(self, keep: Tensor) -> _Batch:
        by_expert = None if self.by_expert is None else self.by_expert[keep]
        return _Batch(self.uniforms[keep], self.limits[keep], self.finished[keep], self.rows[keep], by_expert)


@dataclass
class _Written:
    """Tokens and log-probs drawn so far, for every request of a batch."""

    token_ids: Tensor  # [B, max_new_tokens]
    logprobs: Tensor | None
    truncated: Tensor | None
    limits: Tensor  # [B] most tokens
    lengths: Tensor  # [B] tokens up to and with the first stop
    stopped: Tensor  # [B] bool

    @classmethod
    def empty(cls, requests: Sequence[SamplingRequest], parameters: SamplingParameters) -> _Written:
        rows = len(requests)
        shape = (rows, parameters.max_new_tokens)
        truncates = parameters.logprobs and parameters.truncates
        return cls(
            token_ids=torch.zeros(shape, dtype=torch.int32),
            logprobs=torch.zeros(shape) if parameters.logprobs else None,
            truncated=torch.zeros(shape) if truncates else None,
            limits=torch.tensor([request.limit(parameters) for request in requests]),
            lengths=torch.zeros(rows, dtype=torch.int64),
            stopped=torch.zeros(rows, dtype=torch.bool),
        )

    def write(
        self, rows: Tensor, step: int, drawn: Tensor, full: Tensor, truncated: Tensor | None, stopped: Tensor
    ) -> None:
        """Write one position of the rows in the batch; rows that have stopped stay as they are."""
        there = rows.cpu()
        going = ~self.stopped[there] & (step < self.limits[there])
        there = there[going]
        self.token_ids[there, step] = drawn.cpu()[going].int()
        if self.logprobs is not None:
            self.logprobs[there, step] = full.cpu()[going]
        if self.truncated is not None and truncated is not None:
            self.truncated[there, step] = truncated.cpu()[going]
        self.lengths[there] = step + 1
        self.stopped[there] = stopped.cpu()[going]

    def samples(self) -> list[Sample]:
        samples = []
        for row, (length, stopped) in enumerate(zip(self.lengths.tolist(), self.stopped.tolist(), strict=True)):
            token_ids = self.token_ids[row, :length].numpy().copy()
            samples.append(
                Sample(
                    token_ids=token_ids,
                    finish_reason="stop" if stopped else "length",
                    stop_token_id=int(token_ids[-1]) if stopped else None,
                    logprobs=None if self.logprobs is None else self.logprobs[row, :length].numpy().copy(),
                    truncated_logprobs=None if self.truncated is None else self.truncated[row, :length].numpy().copy(),
                )
            )
        return samples


def _longest(requests: Sequence[SamplingRequest], parameters: SamplingParameters) -> int:
    """Most tokens of prompt and response together."""

    def prompt(request: SamplingRequest) -> int:
        return max(len(request.prompt_token_ids), len(request.expert.prompt_token_ids) if request.expert else 0)

    return max((prompt(request) + request.limit(parameters) for request in requests), default=0)


def _cache_name(model: Any) -> str:
    """Return the name of the model's cache argument: pure state-space models silently ignore the usual one."""
    return "cache_params" if "cache_params" in signature(model.forward).parameters else "past_key_values"


@torch.inference_mode()
def _takes_padding(model: Any) -> bool:
    """True if prompts of several lengths, padded on the left, can be continued together, each as it is alone.

    Raises:
        ValueError: the model cannot continue even one prompt from transformers' usual cache.
    """
    ids = torch.tensor([probe_ids(model.config, 10)], device=model.device)
    padding = 4
    mask = torch.ones_like(ids).repeat(2, 1)
    mask[1, :padding] = 0
    tolerance = TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])

    def is_off(continued: Tensor, start: int) -> bool:
        own = model(input_ids=ids[:, start:], use_cache=False).logits[0, -1].double()
        return bool((continued.double() - own).norm() > tolerance * own.norm())  # NaN is the weights' fault

    with suppress(TypeError, ValueError, AttributeError, RuntimeError):  # of a model that takes no mask
        together = _continued(model, ids.repeat(2, 1), mask)
        if not (is_off(together[0], 0) or is_off(together[1], padding)):
            return True
    try:
        alone = _continued(model, ids, None)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise refusal(
            model, f"it cannot be sampled from with engine transformers ({error})", "Set engine: vllm"
        ) from error
    if is_off(alone[0], 0):
        problem = (
            "it cannot be sampled from with engine transformers: it continues a prompt from its cache otherwise than "
            "it reads the whole"
        )
        raise refusal(model, problem, "Set engine: vllm")
    return False


def _continued(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return logits [B, V] after the last of ``ids``, whose last three were read one at a time from the cache."""
    width = ids.shape[1]
    positions = (torch.ones_like(ids) if mask is None else mask).cumsum(1).sub(1).clamp(min=0)
    cache = roomy_cache(model.config)
    logits = ids.new_zeros(())
    for part in (slice(0, width - 3), *(slice(at, at + 1) for at in range(width - 3, width))):
        logits = model(
            input_ids=ids[:, part],
            attention_mask=None if mask is None else mask[:, : part.stop],
            position_ids=positions[:, part],
            use_cache=True,
            **{_cache_name(model): cache},
        ).logits[:, -1]
    return logits


def _uniforms(seed: int, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    # a bit generator's raw stream is fixed for ever, numpy's distributions are not; 53 bits make a double
    return (np.random.PCG64(seed).random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _draw(logits: Tensor, uniforms: Tensor, parameters: SamplingParameters) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw one token a row by inverting the cumulative distribution at ``uniforms``.

    Args:
        logits: [B, V] float32.
        uniforms: [B] float64 in [0, 1).

    Returns:
        Token ids [B]; their log-probs [B] under the full softmax at the temperature, nats; and under the truncated
        one, where something is truncated.
    """
    tempered = logits if parameters.temperature in (0.0, 1.0) else logits / parameters.temperature
    full = tempered.log_softmax(-1)
    kept = full
    if parameters.truncates:
        kept = truncate(full, parameters.top_p, parameters.top_k, parameters.min_p).log_softmax(-1)
    if parameters.temperature == 0.0:
        drawn = logits.argmax(-1)
    else:
        cumulative = kept.double().exp().cumsum(-1)
        # the first token whose cumulative mass exceeds u; the last token's may round to less than u
        target = (uniforms * cumulative[:, -1])[:, None]
        drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1)
        drawn = torch.minimum(drawn, _last_possible(kept))
    at = drawn[:, None]
    return drawn, full.gather(1, at).squeeze(1), kept.gather(1, at).squeeze(1) if parameters.truncates else None


def _last_possible(logprobs: Tensor) -> Tensor:
    """Return the highest id with a probability above 0: [B]."""
    ids = torch.arange(logprobs.shape[-1], device=logprobs.device)
    return torch.where(logprobs > -torch.inf, ids, 0).amax(-1)


def sequence_logprobs(model: Any, sequence: Sequence[int], device: str) -> NDArray[np.float32]:
    """Return log-probs [L - 1] of every token but the first under ``model``, in nats."""
    ids = torch.tensor([list(sequence)], device=device)
    logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    taken: NDArray[np.float32] = logprobs.gather(1, ids[0, 1:, None]).squeeze(1).cpu().numpy()
    return taken


def truncate(logprobs: Tensor, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> Tensor:
    """Truncate by min-p, then top-k, then top-p, each on what the one before left (vLLM's order).

    Truncated entries become -inf; at least the most probable token stays. Not renormalised.

    Args:
        logprobs: [B, V] log-softmax at the sampling temperature, nats.
        top_p: keep the most probable tokens until their mass reaches this (1: all).
        top_k: keep this many most probable tokens, and those as probable as the last (0: all).
        min_p: keep tokens at least this probable, relative to the most probable one (0: all).
    """
    kept = logprobs
    if min_p > 0.0:
        floor = logprobs.amax(-1, keepdim=True) + math.log(min_p)
        kept = kept.masked_fill(logprobs < floor, -torch.inf)
    if 0 < top_k < logprobs.shape[-1]:
        smallest = kept.topk(top_k, dim=-1).values[:, -1:]
        kept = kept.masked_fill(kept < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, ids = kept.sort(dim=-1, descending=True, stable=True)
        probs = ordered.double().softmax(-1)
        cut = probs.cumsum(-1) - probs >= top_p  # the mass before a token is enough already
        cut[:, 0] = False
        kept = kept.masked_fill(torch.zeros_like(cut).scatter(1, ids, cut), -torch.inf)
    return kept
