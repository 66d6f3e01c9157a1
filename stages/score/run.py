"""The score stage: computes the teacher's statistics of every response token, part by part.

Producer of the record of ``storage.teacher_record``. Several processes may do parts of one artifact, even the same
ones: the process that claims a part does it, and the first commit wins.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from eopd.stages.engines.hidden import HiddenBatch, HiddenEngine, check_first_batch, refuse_uniform
from eopd.stages.models.loading import load_tokenizer, load_tokenizer_at, model_folder
from eopd.stages.models.model_config import longest_readable
from eopd.stages.models.packing import Sequence
from eopd.stages.models.teacher_prompts import SIBLING
from eopd.stages.models.threads import torch_threads
from eopd.stages.models.tokenizers import check_same_vocabulary, vocabulary_fingerprint
from eopd.stages.score.responses import PartResponses, ScoreJob, context_name, read_part
from eopd.stages.score.statistics import StatisticsHead
from eopd.stages.score.token_statistics import (
    NotFinite,
    TokenBatch,
    TokenStatistics,
    concatenate,
    empty,
    in_response_order,
    row_keys,
)
from eopd.storage.claims import held_parts
from eopd.storage.errors import InputError
from eopd.storage.sources import passes_on
from eopd.storage.teacher_cache import PartHeader, write_part
from eopd.storage.teacher_record import TeacherRows, take_ranges

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# -- part writer ------------------------------------------------------------------------------------------------------

# Background writing of a part; its claim is held until it is committed.


class PartWriter:
    """One thread that encodes and writes; at most one part waits for it, so memory holds two.

    A part that was handed over is begun when the caller says so, at a moment when its own work leaves cores free.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="part-writer")
        self._next: tuple[Callable[[], None], ExitStack] | None = None
        self._last: Future[None] | None = None

    def write(self, task: Callable[[], None], claimed: ExitStack) -> None:
        """Hand over ``task`` once the previous one is done; raises what that one raised."""
        with claimed:
            self.finish()
            self._next = task, claimed.pop_all()

    def begin(self) -> None:
        """Let the thread begin the task that was handed over."""
        if self._next is not None:
            self._last, self._next = self._pool.submit(_run, *self._next), None

    def finish(self) -> None:
        """Wait for every task that was handed over; raises what they raised."""
        self.begin()
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Wait for the task that was handed over, and end the thread."""
        self.begin()
        self._pool.shutdown(wait=True)


def _run(task: Callable[[], None], held: ExitStack) -> None:
    with held:
        task()


# -- the stage --------------------------------------------------------------------------------------------------------


def run(job: ScoreJob) -> None:
    """Do every part of ``job.parts`` that is not committed.

    Everything that can be wrong with the input is found before the teacher is loaded. A part whose logits are not
    finite fails by name at the end, when all other parts are done.

    Raises:
        ValueError: settings or inputs that do not belong together; a teacher that cannot be served; an engine that
            disagrees with the full model; parts with logits that are not finite.
    """
    done = job.output.committed()
    read = [job.rollouts, *([job.verdicts] if job.verdicts is not None else [])]
    pending = [
        part
        for part in job.parts
        if part not in done and not any(passes_on(source, part, job.output, part) for source in read)
    ]
    if not pending:
        return
    temperature = job.settings.resolve_temperature(job.rollout_temperature)
    tokenizer = load_tokenizer(job.teacher)
    if job.student_tokenizer != job.teacher.tokenizer_path:
        check_same_vocabulary(tokenizer, load_tokenizer_at(job.student_tokenizer))
    scorer = Scorer(job, tokenizer, temperature)
    longest = scorer.survey(pending)
    options = job.settings.engine_options
    reading = job.engines.reading(
        job.settings.engine,
        job.teacher,
        longest=longest,
        log_dir=job.log_dir,
        options=options,
        dtype=job.settings.dtype,
        batch_tokens=job.settings.batch_tokens,
        row_tokens=job.settings.row_tokens,
        setting="score.engine",
    )
    with torch_threads(options.cpu_threads), reading as engine:
        if engine.note:
            job.progress.line(f"score: the teacher reads {engine.note}")
        scorer.score(pending, engine)


@dataclass
class InReadingOrder:
    """A part's statistics, collected in the order of the engine's batches."""

    pieces: list[TokenStatistics] = field(default_factory=list)
    order: list[int] = field(default_factory=list)  # number of the response of each run of tokens
    lengths: list[int] = field(default_factory=list)  # tokens of each run

    def rows(self, stop_ids: tuple[int, ...], responses: int) -> TeacherRows:
        """Return the record of ``responses`` responses."""
        statistics = concatenate(self.pieces) if self.pieces else empty(len(stop_ids))
        return in_response_order(statistics, self.order, self.lengths, np.asarray(stop_ids, np.int32), responses)


@dataclass
class Scorer:
    """State of one run: ``survey`` first, then ``score`` with an open engine."""

    job: ScoreJob
    tokenizer: PreTrainedTokenizerBase
    temperature: float

    def __post_init__(self) -> None:
        self.limit = self._limit()
        self.total = self.truncated = self.without_sibling = self.done = 0
        self.failures: list[str] = []

    def _limit(self) -> int | None:
        """Return the most tokens that the teacher can read."""
        stated = self.job.settings.max_tokens
        readable = longest_readable(model_folder(self.job.teacher.path, self.job.teacher.revision))
        if stated is not None and readable is not None and stated > readable:
            raise InputError(
                f"score.max_tokens is {stated}, but {self.job.teacher.path} reads at most {readable}",
                setting="score.max_tokens",
            )
        return stated or readable

    def survey(self, parts: list[int]) -> int:
        """Read every part once, for errors and sizes; returns the length of the longest sequence."""
        longest = 1
        for part in parts:
            responses = read_part(self.job, part, self.tokenizer, self.limit)
            longest = max(longest, responses.longest)
            self.total += responses.tokens
            self.truncated += responses.truncated
            self.without_sibling += responses.without_sibling
        return longest

    def score(self, parts: list[int], engine: HiddenEngine) -> None:
        """Score the parts. While one is encoded and written, the teacher reads the next."""
        job = self.job
        head = StatisticsHead(
            engine.head, job.settings.head.rule(), temperature=self.temperature, stop_ids=job.stop_ids
        )
        began = time.monotonic()
        job.progress.start("score", self.total)
        with closing(PartWriter()) as writer:
            try:
                for part, claimed in held_parts(job.output, parts, job.progress.line, writer.begin):
                    with claimed:
                        responses = read_part(job, part, self.tokenizer, self.limit)
                        job.progress.expect(self.total, responses.tokens)
                        if job.settings.first_batch_check and responses.tokens and not engine.checked:
                            job.progress.line(
                                f"score: {check_first_batch(engine, head, responses.sequences, 'score.engine')}"
                            )
                            engine.checked = True
                        statistics = self._statistics(part, responses, engine, head, began, writer)
                        if statistics is not None:
                            writer.write(partial(self._write, part, statistics, responses, engine), claimed.pop_all())
                writer.finish()
            finally:
                job.progress.close()
        self._tell(time.monotonic() - began)

    def _statistics(
        self,
        part: int,
        responses: PartResponses,
        engine: HiddenEngine,
        head: StatisticsHead,
        began: float,
        writer: PartWriter,
    ) -> InReadingOrder | None:
        """Return the statistics of a part; None if logits are not finite, which is noted."""
        collected = InReadingOrder()
        for batch in engine.hidden(responses.sequences):
            # not before: on a CPU the teacher's threads wait for each other, so one core taken from them costs all
            writer.begin()
            try:
                collected.pieces.append(head(batch.hidden, self._question(responses, batch)))
            except NotFinite:
                response, position = first_not_finite(engine, head, responses.sequences, batch.order)
                self.failures.append(f"part {part}: {responses.names[response]}, response token {position}")
                return None
            collected.order += batch.order
            collected.lengths += batch.lengths
            self.done += sum(batch.lengths)
            rate = self.done / max(time.monotonic() - began, 1e-9)
            self.job.progress.advance(sum(batch.lengths), tokens_per_s=rate)
        if collected.pieces:
            entropy = np.concatenate([piece.entropy for piece in collected.pieces])
            refuse_uniform(entropy, engine.head.vocab_size, self.job.teacher.path, "score.engine")
        return collected

    def _question(self, responses: PartResponses, batch: HiddenBatch) -> TokenBatch:
        seed = self.job.settings.head.seed
        sampled = [np.asarray(responses.sequences[number].response_ids, np.int64) for number in batch.order]
        lengths = np.asarray(batch.lengths, np.int64)
        identities = np.repeat(responses.identities[list(batch.order)], lengths, axis=0)
        keys = row_keys(seed, identities, take_ranges(np.zeros_like(lengths), lengths))
        if responses.topk is None:
            return TokenBatch(np.concatenate(sampled), keys)
        extra = np.concatenate([responses.extra_ids(number) for number in batch.order])
        counts = np.full(len(extra), extra.shape[1], np.int64)
        return TokenBatch(np.concatenate(sampled), keys, counts, extra.reshape(-1))

    @cached_property
    def _vocabulary(self) -> str:
        return vocabulary_fingerprint(self.tokenizer)

    def _write(self, part: int, statistics: InReadingOrder, responses: PartResponses, engine: HiddenEngine) -> None:
        job = self.job
        rows = statistics.rows(job.stop_ids, len(responses.sequences))
        header = PartHeader(
            teacher=job.teacher.fingerprint,
            tokenizer=self._vocabulary,
            teacher_context=context_name(job.settings.teacher_prompt),
            temperature=self.temperature,
            head=job.settings.head.rule(),
            vocab_size=engine.head.vocab_size,
            rollout_checksum=job.rollouts.marker(part).checksum,
            stop_ids=job.stop_ids,
            engine=engine.name,
            engine_version=engine.version,
            dtype=engine.dtype,
            extra_k=0 if responses.topk is None else int(responses.topk.ids.shape[1]),
        )
        inputs = {"rollouts": header.rollout_checksum}
        if job.student_topk is not None:
            inputs["student_topk"] = job.student_topk.marker(part).checksum
        info = {"responses": rows.responses, "tokens": rows.tokens, "truncated": responses.truncated}
        if responses.copies:
            info["tokens_read"] = responses.tokens_read
        if SIBLING in job.settings.teacher_prompt.used:
            info["without_sibling"] = responses.without_sibling
        if job.verdicts is not None:
            inputs["verdicts"] = job.verdicts.marker(part).checksum
        with job.output.write_part(part, inputs=inputs, info=info) as folder:
            write_part(folder, rows, header)

    def _tell(self, seconds: float) -> None:
        self.job.progress.line(
            f"score: {self.done:,} tokens in {seconds:.1f} s ({self.done / max(seconds, 1e-9):,.0f} tokens/s)"
        )
        if self.truncated:
            self.job.progress.line(
                f"score: {self.truncated} responses are longer than the {self.limit} tokens the teacher reads; their "
                "first tokens were scored"
            )
        if self.without_sibling:
            same = self.job.settings.teacher_prompt.otherwise == "same"
            how = "were scored as the student reads their prompt" if same else "were not scored"
            self.job.progress.line(f"score: {self.without_sibling} responses have no right sibling and {how}")
        if self.failures:
            raise InputError(
                "the teacher's logits are NaN or infinite; not scored: "
                f"{'; '.join(self.failures[:8])}{' ...' if len(self.failures) > 8 else ''}. The other parts are "
                "stored",
                setting="score.dtype",
                remedy="Check the teacher's weights, or score in a wider score.dtype.",
            )


def first_not_finite(
    engine: HiddenEngine, head: StatisticsHead, sequences: SequenceOf[Sequence], suspects: SequenceOf[int]
) -> tuple[int, int]:
    """Find which of ``suspects``, read together with NaN or infinite logits, is the cause: (its number, response
    token).

    Attention multiplies masked values by 0, and 0 * NaN is NaN: one bad token spoils its whole row, neighbours and
    earlier tokens too. So each sequence is read alone, and its first bad position is found by bisection over prefixes.
    """
    for number in suspects:
        length = len(sequences[number].response_ids)
        if not _is_finite(engine, head, sequences[number], length):
            good, bad = 0, length
            while bad - good > 1:
                middle = (good + bad) // 2
                good, bad = (middle, bad) if _is_finite(engine, head, sequences[number], middle) else (good, middle)
            return number, bad - 1
    return suspects[0], 0  # gone when read alone: named by the first of them


def _is_finite(engine: HiddenEngine, head: StatisticsHead, sequence: Sequence, length: int) -> bool:
    prefix = Sequence(sequence.context_ids, sequence.response_ids[:length])
    [batch] = list(engine.hidden([prefix]))
    ids = np.asarray(prefix.response_ids, np.int64)
    try:
        head(batch.hidden, TokenBatch(ids, ids.astype(np.uint64)))
    except NotFinite:
        return False
    return True
