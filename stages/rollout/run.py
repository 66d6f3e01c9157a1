"""Sampling of rollouts: one engine call per part, committed when it returns, with nothing else in flight.

Producer of the records of ``storage.rollouts``. The student or the teacher samples, or the student goes on from a
prefix that the teacher sampled, or the responses come with the prompts and no engine is opened.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eopd.stages.engines.kept import Engines
from eopd.stages.engines.sampling import Sample, SamplingEngine, SamplingMeter, SamplingRequest, derive_seed
from eopd.stages.job import ModelRef, Progress
from eopd.stages.judge.settings import JudgeSettings
from eopd.stages.models.model_config import refuse_crossing, vocabulary_size
from eopd.stages.models.prompts import Prompt, PromptSettings, load_prompts, render_prompt
from eopd.stages.models.responses import NoResponse, response_ids
from eopd.stages.models.teacher_prompts import TeacherPromptSettings, teacher_context
from eopd.stages.rollout import mixed
from eopd.stages.rollout import segments as revise
from eopd.stages.rollout.segments import Draft, Draw, Judging, Prefixes, Sampling, Written, until_right
from eopd.stages.rollout.settings import RolloutSettings
from eopd.stages.verifiers.registry import Answered, Verifier, check_answers, judge_responses, open_verifier
from eopd.storage.artifacts import Artifact
from eopd.storage.claims import claimed_parts
from eopd.storage.errors import InputError
from eopd.storage.records import Writer, read_rollouts, write_rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RolloutJob:
    """Inputs of sampling the responses of one round.

    Part i of ``output`` holds the samples of the prompts ``prompt_indices[i]``. ``stop_ids`` are those of student
    and teacher together, the student's main one first: every response ends at the first of them that is sampled.
    """

    output: Artifact
    parts: Sequence[int]
    settings: RolloutSettings
    progress: Progress
    log_dir: Path
    policy: ModelRef  # the model that samples
    prompts: PromptSettings
    prompt_indices: Sequence[Sequence[int]]  # rows of the prompt source, per part of the artifact
    stop_ids: tuple[int, ...]
    seed: int  # of this round: equal seeds give equal draws to equal prompts
    student: ModelRef | None = None  # whose prompts are recorded; None: the policy's
    teacher_prompt: TeacherPromptSettings | None = None  # how the teacher reads prompts, if it is the one that samples
    guide: Artifact | None = None  # the teacher's responses, by the same parts
    prefixes: Prefixes | None = None  # how much of them begins a response
    judge: JudgeSettings | None = None  # how responses are judged while they are sampled; None: they are not
    engines: Engines = field(default_factory=Engines)


def run(job: RolloutJob) -> None:
    """Do every part of ``job.parts`` that is not committed.

    Raises:
        ValueError: bad prompts (``prompts.load_prompts``), a prompt longer than ``prompts.max_prompt_tokens`` where
            that is refused, or a model that the engine cannot serve. Prompts are checked before a model is loaded.
    """
    assert len(job.prompt_indices) == job.output.parts, (len(job.prompt_indices), job.output.parts)
    done = job.output.committed()
    pending = [part for part in job.parts if part not in done]
    if not pending:
        return
    from eopd.stages.models.loading import load_tokenizer

    tokenizer = load_tokenizer(job.student or job.policy)
    draws = _prepare(job, tokenizer)
    if job.settings.source == "data":
        _copy_parts(job, pending, draws, tokenizer)
    else:
        _sample_parts(job, pending, draws, tokenizer)


def _sample_parts(
    job: RolloutJob, pending: Sequence[int], draws: list[list[Draw]], tokenizer: PreTrainedTokenizerBase
) -> None:
    from eopd.stages.models.loading import model_folder

    phrases = None
    if job.settings.source == "revise":
        phrases = revise.Phrases.of(job.settings, tokenizer, job.stop_ids)
    responses = sum(len(draws[part]) for part in pending) * job.settings.samples_per_prompt
    longest = max(
        max(len(draw.context_ids), len(draw.token_ids), len(draw.expert_ids)) for part in draws for draw in part
    )
    refuse_crossing(
        model_folder(job.policy.path, job.policy.revision),
        job.policy.path,
        job.settings.engine_options.max_model_len or longest + job.settings.max_new_tokens,
        "the sampler and the trainer would mean different policies",
        "Lower rollout.max_new_tokens or prompts.max_prompt_tokens",
    )
    sampling = job.engines.sampling(
        job.settings.engine_kind,
        job.policy,
        max_model_len=longest + job.settings.max_new_tokens,
        log_dir=job.log_dir,
        progress=job.progress,
        options=job.settings.engine_options,
        setting="rollout.engine",
    )
    with _judging(job, draws, tokenizer) as judge, sampling as engine:
        meter = _Meter(job, responses)
        try:
            for part in claimed_parts(job.output, pending, job.progress.line):
                _do_part(job, part, draws[part], engine, tokenizer, meter, judge, phrases)
        finally:
            job.progress.close()
    job.progress.line(meter.summary())


@contextmanager
def _judging(
    job: RolloutJob, draws: Sequence[Sequence[Draw]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Judging | None]:
    """Yield a judge of responses; None if they are not judged while they are sampled.

    Raises:
        ValueError: a prompt without a reference answer, or with one that the verifier cannot read; names its id.
    """
    if job.judge is None:
        yield None
        return
    assert job.prompts.verifier is not None, "settings that judge without a verifier are refused"
    verifier: Verifier = open_verifier(
        job.prompts.verifier, seconds=job.judge.seconds_per_answer, workers=job.judge.verifier_workers
    )

    def judge(drafts: Sequence[Draft], written: Sequence[Written]) -> list[bool]:
        responses = [
            Answered(one.token_ids.tolist(), one.finish_reason, one.stop_token_id, draft.draw.prompt.answer or "")
            for draft, one in zip(drafts, written, strict=True)
        ]
        return [verdict.correct for verdict in judge_responses(verifier, tokenizer, responses)]

    try:
        check_answers(
            verifier, ((draw.prompt.id, draw.prompt.answer) for part in draws for draw in part), job.prompts.path
        )
        yield judge
    finally:
        verifier.close()


def _prepare(job: RolloutJob, tokenizer: PreTrainedTokenizerBase) -> list[list[Draw]]:
    """Render and check every prompt of the round, per part.

    All parts, also those not to be done here: so that every process opens its engine for the same length.
    """
    table = load_prompts(job.prompts)
    limit = job.prompts.max_prompt_tokens
    context_of = _contexts(job)
    expert_of = None
    if job.settings.source == "mixed":
        expert_of = mixed.expert_reader(tokenizer, job.prompts, job.settings.mixed.expert)
    rank = 0
    per_part: list[list[Draw]] = []
    skipped: list[int] = []
    for indices, firsts in zip(job.prompt_indices, _first_samples(job), strict=True):
        per_part.append([])
        for prompt, first in zip(table.rows(indices), firsts, strict=True):
            ids = render_prompt(tokenizer, prompt, job.prompts)
            expert_ids = [] if expert_of is None else expert_of(prompt, ids)
            length = max(len(ids), len(expert_ids))
            if length <= limit:
                per_part[-1].append(Draw(prompt, ids, context_of(prompt, ids), first, rank, expert_ids))
            elif job.prompts.too_long == "skip":
                skipped.append(length)
            else:
                reader = " as rollout.mixed.expert shows it" if length > len(ids) else ""
                raise InputError(
                    f"it has {length} tokens{reader}, more than prompts.max_prompt_tokens = {limit}",
                    setting="prompts.max_prompt_tokens",
                    file=job.prompts.path,
                    prompt=prompt.id,
                    remedy="raise it, or set too_long: skip",
                )
            rank += job.settings.samples_per_prompt
    if skipped:
        drawn = sum(len(indices) for indices in job.prompt_indices)
        notes = (
            f"{len(skipped)} of {drawn} prompts are longer than prompts.max_prompt_tokens = {limit} "
            f"(longest: {max(skipped)})"
        )
        if len(skipped) == drawn:
            problem, setting = f"{notes}: none is left", "prompts.max_prompt_tokens"
            raise InputError(problem, setting=setting, file=job.prompts.path, remedy="Raise the limit")
        job.progress.line(f"rollout: skipped {notes}")
    return per_part


def _contexts(job: RolloutJob) -> Callable[[Prompt, list[int]], list[int]]:
    """Render prompts as the sampling model reads them, by the prompt and its ids as the student reads it."""
    reads = job.teacher_prompt
    if reads is None:
        return lambda _, ids: ids
    from eopd.stages.models.loading import load_tokenizer

    tokenizer = load_tokenizer(job.policy)

    def render(prompt: Prompt, own: list[int]) -> list[int]:
        where = f"prompt {prompt.id!r} of {job.prompts.path}"
        source = {"same": None, "template": prompt.messages_json, "column": prompt.teacher_prompt}[reads.kind]
        values = {name: prompt.value(name) for name in reads.values_needed}
        ids = teacher_context(source, own, reads, tokenizer, values, where).ids((), ())
        if not ids:
            raise InputError("it has no tokens as the teacher reads it", file=job.prompts.path, prompt=prompt.id)
        return list(ids)

    return render


def _first_samples(job: RolloutJob) -> list[list[int]]:
    """Return, per part and prompt, the number of its first sample, so that (prompt, sample) never repeats in a
    round."""
    seen: Counter[int] = Counter()
    first: list[list[int]] = []
    for indices in job.prompt_indices:
        first.append([])
        for index in indices:
            first[-1].append(seen[index] * job.settings.samples_per_prompt)
            seen[index] += 1
    return first


class _Meter:
    """Counts of sampled tokens, for the bar and the closing line."""

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
    judge: Judging | None,
    phrases: revise.Phrases | None,
) -> None:
    """Sample one part and commit it. An engine call samples all of its responses, or what is left of them."""

    def sample(requests: Sequence[SamplingRequest]) -> list[Sample]:
        if not requests:
            return []
        meter.begin(len(requests))
        samples = engine.sample(requests, job.settings.parameters(job.stop_ids), meter.bar.advance)
        meter.end(samples)
        return samples

    vocabulary = 0
    if job.student is not None and job.teacher_prompt is not None:
        vocabulary = vocabulary_size(Path(job.student.path))

    def write(drafts: Sequence[Draft]) -> list[Written]:
        if phrases is not None:
            assert judge is not None, "answers are revised by their verdicts"
            return revise.write(drafts, sample, judge, job.settings, phrases, job.seed)
        written = _write(job, drafts, sample)
        if vocabulary:
            written = [one.before_unknown(vocabulary) for one in written]
        if judge is None:
            return written
        return [replace(one, correct=correct) for one, correct in zip(written, judge(drafts, written), strict=True)]

    before, attempts = meter.tokens, job.settings.attempts
    results = until_right(_begun(job, part, draws), write, 1 if attempts is None else attempts.most, job.seed)
    rows = [_row(job, draft, written, tokenizer) for draft, written in results]
    emptied = sum(not row["response_token_ids"] for row in rows)
    if emptied * 2 > len(rows):
        raise InputError(
            f"part {part}: {emptied} of {len(rows)} responses of the teacher begin with ids beyond the student's "
            f"vocabulary of {vocabulary}: the two tokenizers do not belong together",
            setting="rollout.source",
            part=part,
            remedy="take a teacher with the student's tokenizer, or rollout.source: student",
        )
    cut = sum(written.is_cut for _, written in results)
    if cut:
        job.progress.line(
            f"rollout: {cut} of {len(rows)} responses of part {part} end before an id beyond the student's vocabulary "
            f"of {vocabulary}"
        )
    info = {
        **_counts(job, part, draws, rows),
        **({"cut_at_unknown_ids": cut} if cut else {}),
        "engine": engine.name,
        "engine_version": engine.version,
        "engine_options": job.settings.engine_options.model_dump(mode="json"),
    }
    if meter.tokens - before > info["tokens"]:
        info["tokens_sampled"] = meter.tokens - before
    with job.output.write_part(part, inputs=_inputs(job, part), info=info) as folder:
        write_rollouts(folder, rows, writers=_has_writers(job), judged=job.judge is not None)


def _write(job: RolloutJob, drafts: Sequence[Draft], sample: Sampling) -> list[Written]:
    """Write responses as `rollout.source` says."""
    if job.settings.source == "mixed":
        return mixed.write(drafts, sample, job.settings, job.seed)
    writer = Writer.POLICY if job.teacher_prompt is None else Writer.TEACHER
    samples = iter(sample([_request(job, draft) for draft in drafts if draft.ended is None]))
    results = []
    for draft in drafts:
        prefix = Written.fixed(draft.prefix, Writer.TEACHER)
        if draft.ended is not None:
            end = {name: draft.ended[name] for name in ("finish_reason", "stop_token_id")}
            results.append(replace(prefix, **end))
            continue
        rest = Written.sampled(next(samples), writer)
        results.append(prefix.followed_by(rest) if draft.prefix else rest)
    return results


def _copy_parts(
    job: RolloutJob, pending: Sequence[int], draws: list[list[Draw]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the responses that come with the prompts."""
    job.progress.start("rollout", sum(len(draws[part]) for part in pending))
    long: list[int] = []
    try:
        for part in claimed_parts(job.output, pending, job.progress.line):
            rows = []
            for draw in draws[part]:
                ids = _given(job, draw, tokenizer)
                if len(ids) > job.settings.max_new_tokens:
                    long.append(len(ids))
                    continue
                stopped = ids[-1] in job.stop_ids
                sample = Sample(
                    np.asarray(ids, np.int32), "stop" if stopped else "length", ids[-1] if stopped else None
                )
                draft = Draft(draw, draw.first_sample, derive_seed(0, draw.prompt.id, draw.first_sample))
                rows.append(_row(job, draft, Written.sampled(sample, Writer.DATA), tokenizer))
            info = _counts(job, part, draws[part], rows)
            with job.output.write_part(part, inputs=_inputs(job, part), info=info) as folder:
                write_rollouts(folder, rows, writers=True)
            job.progress.advance(len(draws[part]))
    finally:
        job.progress.close()
    if long:
        job.progress.line(
            f"rollout: skipped {len(long)} responses that are longer than rollout.max_new_tokens = "
            f"{job.settings.max_new_tokens} (longest: {max(long)})"
        )


def _given(job: RolloutJob, draw: Draw, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of the response that comes with a prompt."""
    try:
        ids = response_ids(tokenizer, draw.prompt, job.prompts, job.stop_ids)
        if len(ids) > job.settings.max_new_tokens and job.prompts.too_long == "refuse":
            raise NoResponse(
                f"has {len(ids)} tokens, more than rollout.max_new_tokens = {job.settings.max_new_tokens}; raise it, "
                "or set prompts.too_long: skip"
            )
    except NoResponse as error:
        raise InputError.of(error, "the response", file=job.prompts.path, prompt=draw.prompt.id) from error
    return ids


def _begun(job: RolloutJob, part: int, draws: Sequence[Draw]) -> list[Draft]:
    """Return the responses of a part with the tokens that the teacher has written."""
    numbers = range(job.settings.samples_per_prompt)
    drafts = [
        Draft(draw, sample, derive_seed(job.seed, draw.prompt.id, sample))
        for draw in draws
        for sample in (draw.first_sample + number for number in numbers)
    ]
    if job.guide is None or job.prefixes is None:
        return drafts
    columns = ["prompt_id", "sample", "response_token_ids", "finish_reason", "stop_token_id"]
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for row in read_rollouts(job.guide.part_folder(part), columns).to_pylist():
        rows.setdefault(row["prompt_id"], {})[row["sample"]] = row
    begun = []
    for draft in drafts:
        draw, name = draft.draw, draft.draw.prompt.id
        guides = list(rows.get(name, {}).values())
        if not guides:
            problem = f"{job.guide} part {part} holds no response to prompt {name!r}"
            raise InputError(problem, prompt=name, artifact=str(job.guide), part=part)
        row = guides[draft.sample % len(guides)]
        ids = row["response_token_ids"]
        length = job.prefixes.length(draw.rank + draft.sample - draw.first_sample, job.seed, name, draft.sample)
        prefix = ids[: min(length, job.settings.max_new_tokens)]
        ended = None
        if len(prefix) == len(ids) and row["stop_token_id"] is not None:
            ended = row
        elif len(prefix) == job.settings.max_new_tokens:
            ended = {"finish_reason": "length", "stop_token_id": None}
        begun.append(replace(draft, prefix=prefix, ended=ended))
    return begun


def _request(job: RolloutJob, draft: Draft) -> SamplingRequest:
    context = [*draft.draw.context_ids, *draft.prefix]
    left = job.settings.max_new_tokens - len(draft.prefix)
    return SamplingRequest(context, draft.seed, left if draft.prefix else None)


def _has_writers(job: RolloutJob) -> bool:
    """True if rows say who wrote each token: version 2 of the record."""
    return (
        job.teacher_prompt is not None
        or job.guide is not None
        or job.judge is not None
        or job.settings.source in ("data", "mixed")
    )


def _inputs(job: RolloutJob, part: int) -> dict[str, str]:
    inputs = {} if job.settings.source == "data" else {"policy": job.policy.fingerprint}
    return inputs if job.guide is None else {**inputs, "guide": job.guide.marker(part).checksum}


def _counts(job: RolloutJob, part: int, draws: Sequence[Draw], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    stopped = sum(row["finish_reason"] == "stop" for row in rows)
    counts = {
        "prompts": len(draws),
        "skipped": len(job.prompt_indices[part]) - len(draws),
        "responses": len(rows),
        "tokens": sum(len(row["response_token_ids"]) for row in rows),
        "stop_rate": stopped / len(rows) if rows else None,
    }
    if job.guide is not None:
        counts["teacher_tokens"] = sum(row["written"].count(Writer.TEACHER) for row in rows)
    if job.settings.source == "mixed":
        counts["expert_tokens"] = sum(row["written"].count(Writer.EXPERT) for row in rows)
    if job.settings.source == "revise":
        counts["revised"] = sum(int(Writer.TEXT) in row["written"] for row in rows)
    if job.judge is not None:
        counts["right"] = sum(row["correct"] for row in rows)
        counts["attempts"] = sum(row["attempts"] for row in rows)
    return counts


def _row(job: RolloutJob, draft: Draft, written: Written, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    draw, ids = draft.draw, written.token_ids.tolist()
    by_teacher = job.teacher_prompt is not None  # log-probs of another model than the one that is trained
    row = {
        "prompt_id": draw.prompt.id,
        "prompt_index": draw.prompt.index,
        "sample": draft.sample,
        "messages": draw.prompt.messages_json,
        "answer": draw.prompt.answer,
        "verifier": job.prompts.verifier,
        "teacher_prompt": draw.prompt.teacher_prompt,
        "prompt_token_ids": draw.token_ids,
        "response_token_ids": ids,
        "response_text": tokenizer.decode(ids, skip_special_tokens=True),
        "logprobs": None if by_teacher else written.logprobs,
        "truncated_logprobs": None if by_teacher else written.truncated_logprobs,
        "finish_reason": written.finish_reason,
        "stop_token_id": written.stop_token_id,
        "seed": draft.seed,
    }
    if _has_writers(job):
        row["written"] = written.written.tolist()
    if job.judge is not None:
        row |= {"correct": written.correct, "attempts": written.attempts}
    return row
