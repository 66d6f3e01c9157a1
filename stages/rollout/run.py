"""The rollout stage: one engine call a part, nothing else in flight, committed when it returns.

Producer of the records of ``storage.rollouts``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eopd.stages.engines.kept import Engines
from eopd.stages.engines.sampling import Sample, SamplingEngine, SamplingMeter, SamplingRequest, derive_seed
from eopd.stages.job import ModelRef, Progress
from eopd.stages.models.model_config import refuse_crossing
from eopd.stages.models.prompts import Prompt, PromptSettings, load_prompts, render_prompt
from eopd.stages.rollout.settings import RolloutSettings
from eopd.storage.artifacts import Artifact
from eopd.storage.claims import claimed_parts
from eopd.storage.rollouts import write_rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RolloutJob:
    """Sample the responses of one round.

    Part i of ``output`` holds the samples of the prompts ``prompt_indices[i]``. ``stop_ids`` are those of student
    and teacher together: every response ends at the first of them.
    """

    output: Artifact
    parts: Sequence[int]
    settings: RolloutSettings
    progress: Progress
    log_dir: Path
    policy: ModelRef
    prompts: PromptSettings
    prompt_indices: Sequence[Sequence[int]]  # rows of the prompt source, per part of the artifact
    stop_ids: tuple[int, ...]
    seed: int  # of this round: equal seeds give equal draws to equal prompts
    engines: Engines = field(default_factory=Engines)


@dataclass(frozen=True)
class Draw:
    """A prompt of a part, as the student reads it."""

    prompt: Prompt
    token_ids: list[int]
    first_sample: int  # number of its first sample: above 0 when the round has drawn it before


def run(job: RolloutJob) -> None:
    """Do every part of ``job.parts`` that is not committed.

    Raises:
        ValueError: bad prompts (``prompts.load_prompts``), a prompt longer than ``prompts.max_prompt_tokens`` where
            that is refused, or a model that the engine cannot serve. Prompts are checked before a model is loaded.
    """
    assert len(job.prompt_indices) == job.output.parts, (len(job.prompt_indices), job.output.parts)
    done = job.output.committed()
    pending = [part for part in job.parts if part not in done]
    if pending:
        _sample_parts(job, pending)


def _sample_parts(job: RolloutJob, pending: Sequence[int]) -> None:
    from eopd.stages.models.loading import load_tokenizer, model_folder

    tokenizer = load_tokenizer(job.policy)
    draws = _prepare(job, tokenizer)
    responses = sum(len(draws[part]) for part in pending) * job.settings.samples_per_prompt
    longest = max(len(draw.token_ids) for part in draws for draw in part)
    refuse_crossing(
        model_folder(job.policy.path, job.policy.revision),
        job.policy.path,
        job.settings.engine_options.max_model_len or longest + job.settings.max_new_tokens,
        "the sampler and the trainer would mean different policies. Lower rollout.max_new_tokens or "
        "prompts.max_prompt_tokens",
    )
    sampling = job.engines.sampling(
        job.settings.engine,
        job.policy,
        max_model_len=longest + job.settings.max_new_tokens,
        log_dir=job.log_dir,
        progress=job.progress,
        options=job.settings.engine_options,
    )
    with sampling as engine:
        meter = _Meter(job, responses)
        try:
            for part in claimed_parts(job.output, pending, job.progress.line):
                _do_part(job, part, draws[part], engine, tokenizer, meter)
        finally:
            job.progress.close()
    job.progress.line(meter.summary())


def _prepare(job: RolloutJob, tokenizer: PreTrainedTokenizerBase) -> list[list[Draw]]:
    """Render and check every prompt of the round, per part.

    All parts, also those not to be done here: so that every process opens its engine for the same length.
    """
    table = load_prompts(job.prompts)
    limit = job.prompts.max_prompt_tokens
    found: list[list[Draw]] = []
    skipped: list[int] = []
    for indices, firsts in zip(job.prompt_indices, _first_samples(job), strict=True):
        found.append([])
        for prompt, first in zip(table.rows(indices), firsts, strict=True):
            ids = render_prompt(tokenizer, prompt, job.prompts)
            if not ids:
                raise ValueError(f"prompt {prompt.id!r} of {job.prompts.path} has no tokens: nothing can follow it")
            if len(ids) <= limit:
                found[-1].append(Draw(prompt, ids, first))
            elif job.prompts.too_long == "skip":
                skipped.append(len(ids))
            else:
                raise ValueError(
                    f"prompt {prompt.id!r} of {job.prompts.path} has {len(ids)} tokens, more than "
                    f"prompts.max_prompt_tokens = {limit}; raise it, or set too_long: skip"
                )
    if skipped:
        drawn = sum(len(indices) for indices in job.prompt_indices)
        told = (
            f"{len(skipped)} of {drawn} prompts are longer than prompts.max_prompt_tokens = {limit} "
            f"(longest: {max(skipped)})"
        )
        if len(skipped) == drawn:
            raise ValueError(f"{job.prompts.path}: {told}: none is left. Raise the limit")
        job.progress.line(f"rollout: skipped {told}")
    return found


def _first_samples(job: RolloutJob) -> list[list[int]]:
    """Per part and prompt, the number of its first sample, so that (prompt, sample) never repeats in a round."""
    seen: Counter[int] = Counter()
    found: list[list[int]] = []
    for indices in job.prompt_indices:
        found.append([])
        for index in indices:
            found[-1].append(seen[index] * job.settings.samples_per_prompt)
            seen[index] += 1
    return found


class _Meter:
    """Counts what was sampled, for the bar and the closing line."""

    def __init__(self, job: RolloutJob, responses: int) -> None:
        self.bar = SamplingMeter(job.progress, "rollout", responses, job.settings.max_new_tokens)
        self.tokens = self.responses = self.stopped = 0
        self.seconds = 0.0
        self._began = 0.0

    def begin(self, responses: int) -> None:
        self._began = time.monotonic()
        self.bar.begin(responses)

    def end(self, samples: Sequence[Sample]) -> None:
        self.seconds += time.monotonic() - self._began
        self.responses += len(samples)
        self.tokens += sum(len(sample.token_ids) for sample in samples)
        self.stopped += sum(sample.finish_reason == "stop" for sample in samples)

    def summary(self) -> str:
        rate = self.tokens / max(self.seconds, 1e-9)
        stopped = 100 * self.stopped / max(self.responses, 1)
        return (
            f"rollout: {self.responses:,} responses, {self.tokens:,} tokens, {stopped:.0f} % of them stopped, "
            f"{rate:,.0f} tokens/s"
        )


def _do_part(
    job: RolloutJob,
    part: int,
    draws: Sequence[Draw],
    engine: SamplingEngine,
    tokenizer: PreTrainedTokenizerBase,
    meter: _Meter,
) -> None:
    """One engine call and its commit."""
    asked = [(draw, draw.first_sample + number) for draw in draws for number in range(job.settings.samples_per_prompt)]
    requests = [
        SamplingRequest(draw.token_ids, derive_seed(job.seed, draw.prompt.id, number)) for draw, number in asked
    ]
    meter.begin(len(requests))
    samples = engine.sample(requests, job.settings.parameters(job.stop_ids), meter.bar.advance) if requests else []
    meter.end(samples)
    rows = [
        _row(job, draw, number, request.seed, sample, tokenizer)
        for (draw, number), request, sample in zip(asked, requests, samples, strict=True)
    ]
    stopped = sum(sample.finish_reason == "stop" for sample in samples)
    info = {
        "prompts": len(draws),
        "skipped": len(job.prompt_indices[part]) - len(draws),
        "responses": len(samples),
        "tokens": sum(len(sample.token_ids) for sample in samples),
        "stop_rate": stopped / len(samples) if samples else None,
        "engine": engine.name,
        "engine_version": engine.version,
        "engine_options": job.settings.engine_options.model_dump(mode="json"),
    }
    with job.output.write_part(part, inputs={"policy": job.policy.fingerprint}, info=info) as folder:
        write_rollouts(folder, rows)


def _row(
    job: RolloutJob, draw: Draw, number: int, seed: int, sample: Sample, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    return {
        "prompt_id": draw.prompt.id,
        "prompt_index": draw.prompt.index,
        "sample": number,
        "messages": draw.prompt.messages_json,
        "answer": draw.prompt.answer,
        "verifier": job.prompts.verifier,
        "teacher_prompt": draw.prompt.teacher_prompt,
        "prompt_token_ids": draw.token_ids,
        "response_token_ids": sample.token_ids,
        "response_text": tokenizer.decode(sample.token_ids.tolist(), skip_special_tokens=True),
        "logprobs": sample.logprobs,
        "truncated_logprobs": sample.truncated_logprobs,
        "finish_reason": sample.finish_reason,
        "stop_token_id": sample.stop_token_id,
        "seed": seed,
    }
