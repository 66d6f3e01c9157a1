"""The alignment job: teacher and student read an evaluation's samples, part by part; then a summary.

Producer of the record of ``storage.analyses``. Both models are in memory at once; a part's sums are committed before
the next part is read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eopd.stages.align.divergence import SUMMED, EntropyBins, known_ids, read_pairs, summarise_bins
from eopd.stages.align.settings import AlignmentSettings
from eopd.stages.engines.hidden import HiddenEngine, check_first_batch, refuse_uniform
from eopd.stages.engines.kept import Engines, naming_engine, open_hidden_engine
from eopd.stages.engines.sampling import EngineKind, EngineOptions, torch_device
from eopd.stages.evaluate.settings import EvaluateSettings
from eopd.stages.job import ModelRef, Progress
from eopd.stages.models.loading import load_tokenizer, model_folder
from eopd.stages.models.model_config import longest_readable
from eopd.stages.models.packing import Sequence as PackSequence
from eopd.stages.models.prompts import Prompt
from eopd.stages.models.teacher_prompts import Context, TeacherPromptSettings, donors, teacher_context
from eopd.stages.models.threads import torch_threads
from eopd.stages.models.tokenizers import check_same_vocabulary
from eopd.stages.problems import Problems
from eopd.stages.stage import SummaryJob
from eopd.storage import records as analyses
from eopd.storage import records as evaluations
from eopd.storage.artifacts import Artifact
from eopd.storage.claims import claimed_parts
from eopd.storage.errors import InputError
from eopd.storage.sources import passes_on

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESULTS_VERSION = 1
TEACHER_ENGINE = "evaluate.alignment.teacher_engine"
Part = tuple[str, Artifact, int]  # whose responses, their evaluation, its part
COLUMNS = ["benchmark", "problem_id", "problem_index", "sample", "response_token_ids"]


@dataclass(frozen=True)
class AlignmentJob:
    """Measurement of complete evaluations' samples with teacher and student.

    ``output`` has a part for every part of every evaluation in ``sources``, in their order.
    """

    output: Artifact
    parts: Sequence[int]
    settings: EvaluateSettings  # with ``alignment``
    progress: Progress
    log_dir: Path
    sources: tuple[tuple[str, Artifact], ...]  # whose responses (own, first), and the evaluation that holds them
    student: ModelRef
    teacher: ModelRef
    teacher_prompt: TeacherPromptSettings
    stop_ids: tuple[int, ...]
    seed: int = 0  # of score.teacher_prompt.shuffled
    engines: Engines = field(default_factory=Engines)  # of this process: closed before a GPU is read on


def run(job: AlignmentJob) -> None:
    """Do every part of ``job.parts`` that is not committed.

    Raises:
        ValueError: a problem that cannot be rendered; tokenizers that differ in their tokens; an unknown architecture;
            logits that are not finite; a teacher to which all tokens are equally probable.
    """
    layout = _layout(job)
    assert job.output.parts == len(layout), (job.output.parts, len(layout))
    done = job.output.committed()
    todo = [part for part in job.parts if part not in done]
    todo = [part for part in todo if not passes_on(layout[part][1], layout[part][2], job.output, part)]
    if todo:
        _measure(job, layout, todo)


def _layout(job: AlignmentJob) -> list[Part]:
    return [(whose, evaluation, part) for whose, evaluation in job.sources for part in range(evaluation.parts)]


def _settings(job: AlignmentJob | SummaryJob) -> AlignmentSettings:
    assert job.settings.alignment is not None
    return job.settings.alignment


def _measure(job: AlignmentJob, layout: Sequence[Part], todo: Sequence[int]) -> None:
    tokenizers = load_tokenizer(job.student), load_tokenizer(job.teacher)
    if job.student.tokenizer_path != job.teacher.tokenizer_path:
        check_same_vocabulary(tokenizers[1], tokenizers[0])
    limits = tuple(longest_readable(model_folder(ref.path, ref.revision)) for ref in (job.student, job.teacher))
    reader = ResponseReader(job, *tokenizers, (limits[0], limits[1]))
    by_part = {part: reader.read(*layout[part][1:]) for part in todo}
    longest = max(responses.longest for responses in by_part.values())
    settings = _settings(job)
    if any(torch_device(options) != "cpu" for options in (settings.engine_options, settings.teacher_engine_options)):
        job.engines.close()
    with ExitStack() as stack:
        job.progress.start("align", sum(responses.tokens for responses in by_part.values()))
        stack.callback(job.progress.close)
        stack.enter_context(torch_threads(settings.engine_options.cpu_threads))
        teacher = _open(job, job.teacher, settings.teacher_engine, settings.teacher_engine_options, longest, stack)
        # one process serves one model on vLLM
        student = _open(job, job.student, "transformers", settings.engine_options, longest, stack)
        _check(job, teacher, student, by_part.values())
        for part in claimed_parts(job.output, list(todo), job.progress.line):
            _do_part(job, part, layout[part], by_part[part], teacher, student)


def _check(job: AlignmentJob, teacher: HiddenEngine, student: HiddenEngine, responses: Iterable[Responses]) -> None:
    """Compare each model's reading of a few sequences with its full logits."""
    some = next((one for one in responses if one.tokens), None)
    if some is None:
        return
    for role, engine, sequences, setting in (
        ("teacher", teacher, some.teacher, TEACHER_ENGINE),
        ("student", student, some.student, None),
    ):
        job.progress.line(f"align: the {role} is {check_first_batch(engine, engine.head, sequences, setting)}")


def _open(
    job: AlignmentJob, ref: ModelRef, kind: EngineKind, options: EngineOptions, longest: int, stack: ExitStack
) -> HiddenEngine:
    settings = _settings(job)
    with naming_engine("evaluate.alignment.teacher_engine"):  # the student's is always transformers
        engine = open_hidden_engine(
            kind,
            ref,
            longest=longest,
            log_dir=job.log_dir,
            options=options,
            batch_tokens=settings.batch_tokens,
        )
    stack.enter_context(closing(engine))
    if engine.note:
        job.progress.line(f"align: {ref.path} reads {engine.note}")
    return engine


def _do_part(
    job: AlignmentJob, part: int, source: Part, responses: Responses, teacher: HiddenEngine, student: HiddenEngine
) -> None:
    """Read one part with both models and commit its sums."""
    settings = _settings(job)
    bins = EntropyBins.of(settings.bins, settings.tau, teacher.head.vocab_size)
    merged = job.stop_ids if settings.merge_stops else ()
    began, tokens = time.monotonic(), 0
    rows: list[dict[str, Any]] = []
    entropies: list[np.ndarray[Any, Any]] = []
    for number, figures in read_pairs(
        teacher,
        student,
        responses.teacher,
        responses.student,
        settings.temperature,
        merged,
        batch_tokens=settings.batch_tokens,
    ):
        names = dict(zip(("benchmark", "problem_id", "sample"), responses.names[number], strict=True))
        sums = bins.sums(figures)
        rows += [
            {**names, "bin": place, **dict(zip(SUMMED, sums[place].tolist(), strict=True))}
            for place in np.flatnonzero(sums[:, 0]).tolist()
        ]
        entropies.append(figures.teacher_entropy)
        tokens += figures.tokens
        job.progress.advance(figures.tokens, tokens_per_s=tokens / max(time.monotonic() - began, 1e-9))
    if entropies:
        vocab_size = teacher.head.vocab_size
        refuse_uniform(
            np.concatenate(entropies),
            vocab_size,
            job.teacher.path,
            TEACHER_ENGINE,
            merged=len(known_ids(merged, vocab_size)),
        )
    info = {
        "responses": source[0],
        "edges": list(bins.edges),
        "tokens": tokens,
        "cut": responses.cut,
        "seconds": round(time.monotonic() - began, 3),
        "engines": [f"{engine.name} {engine.version} {engine.dtype}" for engine in (student, teacher)],
    }
    with job.output.write_part(part, inputs={"samples": source[1].marker(source[2]).checksum}, info=info) as folder:
        analyses.ALIGNMENT_SUMS.write(folder, rows)


# -- responses --------------------------------------------------------------------------------------------------------

# Samples of an evaluation as teacher and student read them.


@dataclass(frozen=True)
class Responses:
    """The responses to read from one part of an evaluation; all lists in the samples' order."""

    names: list[tuple[str, str, int]]  # benchmark, problem id, sample
    student: list[PackSequence]
    teacher: list[PackSequence]
    cut: int  # responses whose first tokens alone fit into both models

    @property
    def tokens(self) -> int:
        return sum(len(sequence.response_ids) for sequence in self.student)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that either model reads."""
        return max((one.input_length for one in (*self.student, *self.teacher)), default=1)


class ResponseReader:
    """Renders prompts once and truncates responses that are too long."""

    def __init__(
        self,
        job: AlignmentJob,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        limits: tuple[int | None, int | None],
    ) -> None:
        """``limits``: most tokens that student and teacher can read."""
        self._job, self._teacher, self._limits = job, teacher, limits
        self._problems = Problems(job.settings, student)
        self._contexts: dict[tuple[str, str], tuple[Context, Context]] = {}

    def read(self, evaluation: Artifact, part: int) -> Responses:
        """Read the first samples of the first problems of a part, as the settings say.

        Raises:
            ValueError: a problem, by id, that is no longer in its benchmark or cannot be rendered for the teacher.
        """
        settings = _settings(self._job)
        responses = Responses([], [], [], 0)
        cut = 0
        for row in evaluations.SAMPLES.read(evaluation.part_folder(part), COLUMNS).to_pylist():
            late = settings.limit is not None and row["problem_index"] >= settings.limit
            if late or row["sample"] >= settings.samples:
                continue
            own, theirs = self._contexts_of(row["benchmark"], row["problem_id"], row["problem_index"])
            response = row["response_token_ids"]
            stops = self._job.stop_ids
            room = min(
                context.length_that_fits(response, stops, limit)
                for context, limit in zip((own, theirs), self._limits, strict=True)
            )
            cut += room < len(response)
            response = response[:room]
            responses.names.append((row["benchmark"], row["problem_id"], row["sample"]))
            responses.student.append(PackSequence(own.ids(response, stops), response))
            responses.teacher.append(PackSequence(theirs.ids(response, stops), response))
        return Responses(responses.names, responses.student, responses.teacher, cut)

    def _contexts_of(self, benchmark: str, problem: str, index: int) -> tuple[Context, Context]:
        key = (benchmark, problem)
        if key not in self._contexts:
            prompt, own = self._problems.prompt(*key, index), self._problems.ids(*key, index)
            where = f"benchmark {benchmark}, problem {problem!r}"
            theirs = self._as_the_teacher_reads(prompt, own, self._shown(benchmark, index), where)
            if not theirs.ids((), ()):
                reason = f"{where} has no tokens as the teacher reads it"
                raise InputError(reason, file=self._problems.sources[benchmark].path, prompt=problem)
            self._contexts[key] = Context((tuple(own),)), theirs
        return self._contexts[key]

    def _shown(self, benchmark: str, index: int) -> dict[str, str | None]:
        """Texts of the placeholders of a problem."""
        settings, table = self._job.teacher_prompt, self._problems.table(benchmark)
        if settings.shuffled:
            index = donors(range(len(table)), self._job.seed, benchmark)[index]
        return {name: table[index].value(name) for name in settings.values_needed}

    def _as_the_teacher_reads(
        self, prompt: Prompt, own: list[int], shown: dict[str, str | None], where: str
    ) -> Context:
        settings = self._job.teacher_prompt
        source = {"same": None, "template": prompt.messages_json, "column": prompt.teacher_prompt}[settings.kind]
        if source is None and settings.kind != "same":
            raise InputError(
                f"{where}: score.teacher_prompt.kind is column, but evaluate.benchmarks names no "
                "columns.teacher_prompt",
                setting="evaluate.benchmarks",
            )
        return teacher_context(source, own, settings, self._teacher, shown, where)


# -- summary ----------------------------------------------------------------------------------------------------------


def summarise(job: SummaryJob) -> None:
    """Read the sums of every part and commit the divergences by bin."""
    for _ in claimed_parts(job.output, [0], job.progress.line):
        _write_summary(job)


def _write_summary(job: SummaryJob) -> None:
    settings, identity = _settings(job), job.source.identity
    markers = [job.source.marker(part) for part in range(job.source.parts)]
    per_source, rest = divmod(len(markers), len(settings.responses))  # evaluations of one run have equally many parts
    assert rest == 0, (len(markers), settings.responses)
    filled = [part for part, marker in enumerate(markers) if marker.set_aside is None]
    by_source: dict[str, Any] = {}
    for number, whose in enumerate(settings.responses):
        of_source = range(number * per_source, (number + 1) * per_source)
        parts = [part for part in of_source if part in filled]
        if not parts:
            raise InputError(
                f"evaluate.alignment.responses: every part of {whose!r} was set aside "
                f"({markers[of_source[0]].set_aside}), so nothing can be compared",
                setting="evaluate.alignment.responses",
                remedy="`eopd store verify --repair` re-queues what was set aside",
            )
        bins = EntropyBins(tuple(markers[parts[0]].info["edges"]), settings.tau)
        sums, problems = _read(job.source, parts, bins)
        figures = summarise_bins(
            sums,
            problems,
            bins,
            benchmarks=[benchmark for benchmark, _ in problems],
            resamples=job.settings.resamples,
            confidence=job.settings.confidence,
        )
        by_source[whose] = {**figures.to_json(), "cut": sum(markers[part].info["cut"] for part in parts)}
        job.progress.line(
            f"align: {figures.all.tokens:,} tokens of {whose} responses: FKL {figures.all.fkl:.3f}, RKL "
            f"{figures.all.rkl:.3f} nats a token, {figures.above.share:.1%} above {figures.tau:g}"
        )
    results = {
        "record": "alignment_results",
        "version": RESULTS_VERSION,
        "responses": by_source,
        "settings": settings.model_dump(mode="json"),
        "teacher_prompt": identity.settings.get("teacher_prompt"),
        "stop_ids": list(identity.settings.get("stop_ids", ())),
        "student": {"fingerprint": identity.inputs.get("student")},
        "teacher": {"fingerprint": identity.inputs.get("teacher")},
        "engines": sorted({engine for part in filled for engine in markers[part].info["engines"]}),
        "artifact": {"key": job.source.key, "inputs": dict(identity.inputs)},
    }
    if len(filled) < len(markers):
        results["left_out"] = [part for part in range(len(markers)) if part not in filled]
    inputs = {f"part-{part:05d}": marker.checksum for part, marker in enumerate(markers)}
    with job.output.write_part(0, inputs=inputs) as folder:
        text = json.dumps(results, indent=1, sort_keys=True, allow_nan=False)
        (folder / analyses.ALIGNMENT_RESULTS).write_text(text, encoding="utf-8")


def _read(
    output: Artifact, parts: Sequence[int], bins: EntropyBins
) -> tuple[np.ndarray[Any, Any], list[tuple[str, str]]]:
    """Return sums [R, B, F] of all responses that have a token, and the (benchmark, problem) of each."""
    sums: dict[tuple[str, str, int], np.ndarray[Any, Any]] = {}
    for part in parts:
        for row in analyses.ALIGNMENT_SUMS.read(output.part_folder(part)).to_pylist():
            key = (row["benchmark"], row["problem_id"], row["sample"])
            sums.setdefault(key, np.zeros((bins.count, len(SUMMED))))[row["bin"]] = [row[name] for name in SUMMED]
    problems = [key[:2] for key in sums]
    return np.asarray(list(sums.values())).reshape(len(sums), bins.count, len(SUMMED)), problems
