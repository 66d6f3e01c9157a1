"""Sampling with vLLM, in this process on a CPU and in vLLM's own processes on GPUs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eopd.stages.engines.sampling import (
    EngineOptions,
    OnProgress,
    Sample,
    SamplingParameters,
    SamplingRequest,
    check_model_length,
    check_requests,
)
from eopd.stages.engines.vllm_process import VLLMProcess
from eopd.stages.job import ModelRef
from eopd.stages.models.loading import model_folder
from eopd.stages.models.memory import weight_bytes
from eopd.stages.models.model_config import refuse_dynamic_positions
from eopd.stages.models.threads import decoding_threads
from eopd.storage.errors import InputError

LOOK_EVERY_SECONDS = 0.5
"""How often tokens that are being decoded are counted."""
PREFILL_TOKENS = 8192
"""Prompt tokens read in one step on a CPU, where a prompt must be read whole."""


def prefill_tokens(max_model_len: int) -> int:
    """Return tokens per step of an engine for sequences of ``max_model_len``: the next multiple of PREFILL_TOKENS."""
    return -(-max_model_len // PREFILL_TOKENS) * PREFILL_TOKENS


class VLLMSamplingEngine:
    """A ``SamplingEngine`` on vLLM.

    vLLM reports one kind of log-prob: here those of the distribution that was sampled from. Where nothing is
    truncated that is the full softmax at the sampling temperature; with top-p, top-k or min-p it is the truncated
    one, and ``Sample.logprobs`` is None: vLLM has no exact way to give both.
    """

    name = "vllm"

    def __init__(self, ref: ModelRef, *, max_model_len: int, log_dir: Path, options: EngineOptions) -> None:
        folder = model_folder(ref.path, ref.revision)
        check_model_length(folder, ref.path, max_model_len)
        refuse_dynamic_positions(folder, ref.path)
        self.max_tokens = max_model_len
        arguments: dict[str, Any] = {
            "max_model_len": max_model_len,
            "logprobs_mode": "processed_logprobs",
            # in steps: engines opened for somewhat longer or shorter sequences make up the same batches
            "max_num_batched_tokens": prefill_tokens(max_model_len),
        }
        if options.max_batch is not None:
            arguments["max_num_seqs"] = options.max_batch
        threads = decoding_threads(options.cpu_threads, weight_bytes(folder))
        self._process = VLLMProcess(ref, log=log_dir / "vllm.log", options=options, threads=threads, **arguments)
        self.version = self._process.version

    @property
    def is_open(self) -> bool:
        return self._process.llm is not None

    def sample(
        self,
        requests: Sequence[SamplingRequest],
        parameters: SamplingParameters,
        on_progress: OnProgress | None = None,
    ) -> list[Sample]:
        llm = self._process.llm
        assert llm is not None, "the engine is closed"
        check_requests(requests, parameters, self.max_tokens)
        if any(request.expert is not None for request in requests):
            problem, setting = "vLLM samples a response under one context", "rollout.engine"
            raise InputError(problem, setting=setting, remedy=f"set {setting}: transformers")
        if not requests:
            return []
        with self._process.working():
            return self._run(llm, requests, parameters, on_progress)

    def _run(
        self,
        llm: Any,
        requests: Sequence[SamplingRequest],
        parameters: SamplingParameters,
        on_progress: OnProgress | None,
    ) -> list[Sample]:
        llm.enqueue(
            [{"prompt_token_ids": [int(token) for token in request.prompt_token_ids]} for request in requests],
            [_sampling_params(parameters, request) for request in requests],
            use_tqdm=False,
        )
        finished: list[tuple[int, Sample]] = []  # with vLLM's request number, which counts in the order given
        ended = reported = counted = 0  # tokens of responses that ended; of all, as reported; responses, as reported
        looked = time.monotonic()
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                completion = output.outputs[0]
                finished.append((int(output.request_id), _sample(completion, parameters)))
                ended += len(completion.token_ids)
            if on_progress is not None and time.monotonic() - looked >= LOOK_EVERY_SECONDS:
                looked = time.monotonic()
                now = max(ended + _being_decoded(llm), reported)
                on_progress(now - reported, len(finished) - counted)
                reported, counted = now, len(finished)
        if on_progress is not None:
            on_progress(max(ended - reported, 0), len(finished) - counted)
        assert len(finished) == len(requests), f"vLLM answered {len(finished)} of {len(requests)} requests"
        return [sample for _, sample in sorted(finished, key=lambda pair: pair[0])]

    def load(self, ref: ModelRef) -> None:
        self._process.load(ref)

    def logprobs_of(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        from vllm import SamplingParams

        assert self._process.llm is not None, "the engine is closed"
        prompts = [{"prompt_token_ids": [int(token) for token in sequence]} for sequence in sequences]
        parameters = SamplingParams(max_tokens=1, seed=0, prompt_logprobs=0, detokenize=False)
        with self._process.working():
            outputs = self._process.llm.generate(prompts, parameters, use_tqdm=False)
        return [
            np.asarray([at[token].logprob for at, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)], "f4")
            for output, ids in zip(outputs, sequences, strict=True)
        ]

    def close(self) -> None:
        self._process.close()


def _being_decoded(llm: Any) -> int:
    """Return the tokens so far of unfinished responses; 0 if this vLLM does not tell."""
    states = getattr(getattr(llm.llm_engine, "output_processor", None), "request_states", {})
    return sum(state.detokenizer.num_output_tokens() for state in states.values() if state.detokenizer is not None)


def _sampling_params(parameters: SamplingParameters, request: SamplingRequest) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=parameters.temperature,
        top_p=parameters.top_p,
        top_k=parameters.top_k,
        min_p=parameters.min_p,
        seed=request.seed,
        max_tokens=request.limit(parameters),
        stop_token_ids=list(parameters.stop_ids),
        ignore_eos=True,  # the stop ids are the caller's, all of them
        logprobs=0 if parameters.logprobs else None,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _sample(completion: Any, parameters: SamplingParameters) -> Sample:
    token_ids = np.asarray(completion.token_ids, dtype=np.int32)
    assert completion.finish_reason in ("stop", "length"), completion.finish_reason
    stopped = completion.finish_reason == "stop"
    logprobs = None
    if parameters.logprobs:
        flat = completion.logprobs
        # the first entry of every position is the sampled token's
        logprobs = np.asarray([flat.logprobs[start] for start in flat.start_indices], dtype=np.float32)
        assert logprobs.shape == token_ids.shape, (logprobs.shape, token_ids.shape)
    return Sample(
        token_ids=token_ids,
        finish_reason=completion.finish_reason,
        stop_token_id=int(token_ids[-1]) if stopped else None,
        logprobs=None if parameters.truncates else logprobs,
        truncated_logprobs=logprobs if parameters.truncates else None,
    )
