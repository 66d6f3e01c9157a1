"""The evaluate stage: sample every problem k times, verify, and sum up.

Producer of the records of ``storage.records``: samples, by part (one engine call each), and a summary of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eopd.stages.engines.kept import Engines
from eopd.stages.engines.sampling import Sample, SamplingEngine, SamplingMeter, SamplingRequest, derive_seed
from eopd.stages.evaluate.settings import BenchmarkSettings, Chunk, EvaluateSettings, chunks
from eopd.stages.evaluate.summary import Tally, doubts, figures, overall
from eopd.stages.job import ModelRef, Progress
from eopd.stages.models.prompts import Prompt, PromptSettings, PromptTable, load_prompts, render_prompt
from eopd.stages.models.tokenizers import response_text
from eopd.stages.stage import SummaryJob
from eopd.stages.verifiers.registry import Verifier, open_verifier
from eopd.stages.verifiers.verdict import Verdict
from eopd.storage import records as evaluations
from eopd.storage.artifacts import Artifact
from eopd.storage.claims import claimed_parts
from eopd.storage.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESULTS_VERSION = 1


@dataclass(frozen=True)
class EvaluateJob:
    """Evaluation job: sample and verify the problems of some benchmarks.

    Part i of ``output`` holds the samples of ``settings.chunks(...)[i]``.
    """

    output: Artifact
    parts: Sequence[int]
    settings: EvaluateSettings
    progress: Progress
    log_dir: Path
    policy: ModelRef
    stop_ids: tuple[int, ...]
    seed: int  # equal seeds give equal draws to equal problems, independent of parts
    engines: Engines = field(default_factory=Engines)


@dataclass(frozen=True)
class Problem:
    """A problem as the model reads it."""

    prompt: Prompt
    token_ids: list[int]


@dataclass(frozen=True)
class PartWork:
    """The problems of one part, ready to sample, and the ids of those that are too long."""

    benchmark: BenchmarkSettings
    problems: list[Problem]
    skipped: list[str]


def run(job: EvaluateJob) -> None:
    """Do every part of ``job.parts`` that is not committed.

    Raises:
        ValueError: a benchmark that is missing, malformed, changed in size, too long for ``max_prompt_tokens``
            (``too_long: refuse``), or whose answers its verifier cannot read. All before the model is loaded.
    """
    cut = _chunks(job.settings, job.output)
    done = job.output.committed()
    todo = [part for part in job.parts if part not in done]
    if todo:
        _sample_parts(job, cut, todo)


def _chunks(settings: EvaluateSettings, evaluation: Artifact) -> list[Chunk]:
    """Return the parts of ``evaluation``. Raises ValueError if a benchmark changed in size."""
    cut = chunks(settings)
    if evaluation.parts != len(cut):
        raise InputError(
            f"{evaluation} has {evaluation.parts} parts, but its benchmarks make {len(cut)}: a benchmark changed "
            "since the run was planned",
            setting="evaluate.benchmarks",
            remedy="plan it again",
        )
    return cut


def _sample_parts(job: EvaluateJob, cut: Sequence[Chunk], todo: Sequence[int]) -> None:
    from eopd.stages.models.loading import load_tokenizer

    tokenizer = load_tokenizer(job.policy)
    verifiers = _open_verifiers(job, {cut[part].benchmark for part in todo})
    try:
        work = _prepare(job, cut, todo, tokenizer, verifiers)
        longest = max((len(problem.token_ids) for part in work.values() for problem in part.problems), default=1)
        responses = sum(len(part.problems) for part in work.values()) * job.settings.samples
        sampling = job.engines.sampling(
            job.settings.engine,
            job.policy,
            max_model_len=longest + job.settings.parameters(()).max_new_tokens,
            log_dir=job.log_dir,
            progress=job.progress,
            options=job.settings.engine_options,
            setting="evaluate.engine",
        )
        with sampling as engine:
            meter = SamplingMeter(job.progress, "evaluate", responses, job.settings.parameters(()).max_new_tokens)
            try:
                for part in claimed_parts(job.output, list(work), job.progress.line):
                    content = work[part]
                    _do_part(job, part, content, engine, tokenizer, verifiers[content.benchmark.verifier], meter)
            finally:
                job.progress.close()
    finally:
        for verifier in verifiers.values():
            verifier.close()


def _open_verifiers(job: EvaluateJob, benchmarks: set[int]) -> dict[str, Verifier]:
    names = sorted({job.settings.benchmarks[number].verifier for number in benchmarks})
    seconds, workers = job.settings.seconds_per_answer, job.settings.verifier_workers
    return {name: open_verifier(name, seconds=seconds, workers=workers) for name in names}


def _prepare(
    job: EvaluateJob,
    cut: Sequence[Chunk],
    todo: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    verifiers: dict[str, Verifier],
) -> dict[int, PartWork]:
    """Render and check every problem of the parts to do."""
    prepared = {}
    for number in sorted({cut[part].benchmark for part in todo}):
        benchmark = job.settings.benchmarks[number]
        settings = job.settings.prompts_of(benchmark)
        table = load_prompts(settings)
        for part in todo:
            chunk = cut[part]
            if chunk.benchmark != number:
                continue
            content = PartWork(benchmark, [], [])
            for prompt in table.rows(range(chunk.start, chunk.stop)):
                _check_answer(benchmark, prompt, verifiers[benchmark.verifier])
                ids = render_prompt(tokenizer, prompt, settings)
                if len(ids) <= settings.max_prompt_tokens:
                    content.problems.append(Problem(prompt, ids))
                elif settings.too_long == "skip":
                    content.skipped.append(prompt.id)
                else:
                    raise InputError(
                        f"benchmark {benchmark.name}, problem {prompt.id!r}: {len(ids)} tokens, more than "
                        f"evaluate.max_prompt_tokens = {settings.max_prompt_tokens}",
                        setting="evaluate.max_prompt_tokens",
                        prompt=prompt.id,
                        remedy="raise it, or set too_long: skip",
                    )
            prepared[part] = content
        mine = [content for content in prepared.values() if content.benchmark is benchmark]
        if mine and not any(content.problems for content in mine):
            _require_a_short_problem(benchmark, settings, table, tokenizer)
    return dict(sorted(prepared.items()))


def _require_a_short_problem(
    benchmark: BenchmarkSettings, settings: PromptSettings, table: PromptTable, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a benchmark if all its problems would be skipped, as it could have no results."""
    limit = settings.max_prompt_tokens
    if not any(len(render_prompt(tokenizer, prompt, settings)) <= limit for prompt in table):
        raise InputError(
            f"benchmark {benchmark.name}: all {len(table)} problems are longer than evaluate.max_prompt_tokens = "
            f"{limit}",
            setting="evaluate.max_prompt_tokens",
            remedy="raise it, or leave the benchmark out",
        )


def _check_answer(benchmark: BenchmarkSettings, prompt: Prompt, verifier: Verifier) -> None:
    assert prompt.answer is not None
    try:
        verifier.check_answer(prompt.answer)
    except ValueError as error:
        where = f"benchmark {benchmark.name}, problem {prompt.id!r}"
        raise InputError.of(error, where, file=benchmark.path, prompt=prompt.id) from error


def _do_part(
    job: EvaluateJob,
    part: int,
    content: PartWork,
    engine: SamplingEngine,
    tokenizer: PreTrainedTokenizerBase,
    verifier: Verifier,
    meter: SamplingMeter,
) -> None:
    """One engine call, verification, commit."""
    started = time.monotonic()
    pairs = [(problem, sample) for problem in content.problems for sample in range(job.settings.samples)]
    requests = [
        SamplingRequest(problem.token_ids, derive_seed(job.seed, content.benchmark.name, problem.prompt.id, sample))
        for problem, sample in pairs
    ]
    meter.begin(len(requests))
    samples = engine.sample(requests, job.settings.parameters(job.stop_ids), meter.advance) if requests else []
    texts = [response_text(tokenizer, sample.token_ids.tolist(), sample.stop_token_id) for sample in samples]
    sampled = time.monotonic()
    verdicts = verifier.verify_many(
        [(text, problem.prompt.answer or "") for text, (problem, _) in zip(texts, pairs, strict=True)]
    )
    rows = [
        _row(content.benchmark.name, problem, number, request.seed, sample, text, verdict)
        for (problem, number), request, sample, text, verdict in zip(
            pairs, requests, samples, texts, verdicts, strict=True
        )
    ]
    info: dict[str, Any] = {
        "engine": engine.name,
        "engine_version": engine.version,
        "tokens": sum(len(sample.token_ids) for sample in samples),
        "responses": len(rows),
        "seconds": round(sampled - started, 3),
        "verifying_seconds": round(time.monotonic() - sampled, 3),
        "verifier": verifier.named(),
        "skipped": content.skipped,
    }
    with job.output.write_part(part, info=info) as folder:
        evaluations.SAMPLES.write(folder, rows)


def _row(
    benchmark: str, problem: Problem, number: int, seed: int, sample: Sample, text: str, verdict: Verdict
) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "problem_id": problem.prompt.id,
        "problem_index": problem.prompt.index,
        "sample": number,
        "answer": problem.prompt.answer,
        "prompt_tokens": len(problem.token_ids),
        "response_token_ids": sample.token_ids,
        "response_text": text,
        "logprobs": sample.logprobs,
        "truncated_logprobs": sample.truncated_logprobs,
        "finish_reason": sample.finish_reason,
        "seed": seed,
        **asdict(verdict),
    }


def summarise(job: SummaryJob) -> None:
    """Read every part of the evaluation and commit its figures.

    Raises:
        ValueError: every problem of a benchmark was skipped or set aside.
    """
    cut = _chunks(job.settings, job.source)
    for _ in claimed_parts(job.output, [0], job.progress.line):
        _write_summary(job, cut)


def _write_summary(job: SummaryJob, cut: Sequence[Chunk]) -> None:
    settings, identity = job.settings, job.source.identity
    tallies = [Tally(boxes=benchmark.verifier == "math") for benchmark in settings.benchmarks]
    markers = [job.source.marker(part) for part in range(len(cut))]
    left_out = [part for part, marker in enumerate(markers) if marker.set_aside is not None]
    filled = [part for part in range(len(cut)) if part not in left_out]
    for part in filled:
        chunk, marker = cut[part], markers[part]
        samples = evaluations.SAMPLES.read(job.source.part_folder(part))
        tallies[chunk.benchmark].add(samples, marker.info["skipped"])
    by_benchmark = {
        benchmark.name: figures(
            benchmark.name, tally, resamples=settings.resamples, confidence=settings.confidence, seed=number
        )
        for number, (benchmark, tally) in enumerate(zip(settings.benchmarks, tallies, strict=True))
    }
    mean = overall(by_benchmark, resamples=settings.resamples, confidence=settings.confidence)
    results: dict[str, Any] = {
        "record": "evaluation_results",
        "version": RESULTS_VERSION,
        "benchmarks": {name: one.values for name, one in by_benchmark.items()},
        "mean": mean,
        "settings": settings.model_dump(mode="json"),
        "seed": identity.settings.get("seed"),
        "stop_ids": identity.settings.get("stop_ids"),
        "model": {"fingerprint": identity.inputs.get("policy")},
        "engines": sorted({f"{info['engine']} {info['engine_version']}" for info in (markers[p].info for p in filled)}),
        # what graded the parts: more than one where it was upgraded between them
        "verifiers": sorted({info["verifier"] for info in (markers[p].info for p in filled) if info["responses"]}),
        "artifact": {"key": job.source.key, "inputs": dict(identity.inputs)},
    }
    if left_out:
        results["left_out"] = [  # problems of parts that were set aside: rows [start, stop) of a benchmark
            {"benchmark": settings.benchmarks[chunk.benchmark].name, "start": chunk.start, "stop": chunk.stop}
            for chunk in (cut[part] for part in left_out)
        ]
    warnings = [
        text
        for benchmark, tally in zip(settings.benchmarks, tallies, strict=True)
        for text in doubts(benchmark.name, tally)
    ]
    if warnings:
        results["warnings"] = warnings
    inputs = {f"part-{part:05d}": marker.checksum for part, marker in enumerate(markers)}
    with job.output.write_part(0, inputs=inputs) as folder:
        problems = [row for tally in tallies for row in tally.problems]
        evaluations.PROBLEMS.write(folder, problems)
        (folder / evaluations.RESULTS).write_text(json.dumps(results, indent=1, sort_keys=True, allow_nan=False))
    for warning in warnings:
        job.progress.line(f"evaluate: warning: {warning}")
    n = settings.samples
    job.progress.line(
        f"evaluate: Avg@{n} {mean['avg_at_k']:.3f}, Pass@{n} {mean['pass_at_k'][str(n)]:.3f}, "
        f"{mean['distinct_correct']:.2f} distinct correct a problem"
    )
