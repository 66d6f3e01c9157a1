"""Exact divergences, entropies and agreement of teacher and student on the same tokens, over the full vocabulary.

Nothing of size [T, V] is ever held: both heads are applied to a few rows at a time. Logits and log-probs are float32,
sums over the vocabulary are accumulated in float64.
Letters: T tokens, D hidden size (of each model its own), V vocabulary (of each model its own), C rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eopd.stages.align.settings import EDGES
from eopd.stages.engines.hidden import HiddenBatch
from eopd.stages.intervals import all_alike, intervals
from eopd.stages.models.lm_head import LMHead, evaluating, lm_head_of
from eopd.stages.models.packing import Sequence, final_hidden, layout_of, pack
from eopd.storage.errors import InputError

Floats = NDArray[np.float64]
CHUNK_VALUES = 2**24
"""Logits of one model in a chunk, about: 64 MiB, of which about six are alive at once."""
BLANK = -1e30
"""Logit of an outcome that was merged into another: its probability is 0, and 0 * log 0 stays 0."""


@dataclass(frozen=True)
class TokenFigures:
    """Per token [T]. Divergences and entropies in nats, the others are probabilities or 0/1."""

    fkl: Floats  # KL(teacher || student)
    rkl: Floats  # KL(student || teacher)
    teacher_entropy: Floats
    student_entropy: Floats
    agreement: Floats  # 1 where both models' most probable token is the same
    teacher_outside: Floats  # probability on ids that the student's vocabulary lacks
    student_outside: Floats  # the same of the student

    @property
    def tokens(self) -> int:
        return len(self.fkl)

    def part(self, start: int, stop: int) -> TokenFigures:
        return TokenFigures(**{item.name: getattr(self, item.name)[start:stop] for item in fields(self)})


def compare(
    teacher: tuple[Tensor, LMHead],
    student: tuple[Tensor, LMHead],
    *,
    temperature: float = 1.0,
    merged: SequenceOf[int] = (),
    chunk_rows: int | None = None,
) -> TokenFigures:
    """Compute figures of T tokens from both models' hidden states [T, D] and heads.

    Ids are shared, vocabularies need not be of equal size (padding differs). Entropies and the most probable token are
    over each model's own V rows. Divergences are between the two distributions given an id that both have: finite
    whatever the padding is worth, and the exact divergence where the sizes are equal or the padding has no mass
    (``teacher_outside`` and ``student_outside`` say how much it has).

    Args:
        temperature: both models' logits are divided by it.
        merged: ids that are one outcome in both distributions, such as the stop ids; fewer than two change nothing.
        chunk_rows: rows compared at a time (default: so that a chunk's logits take about 64 MiB).

    Raises:
        ValueError: the two do not hold as many tokens.
        InputError: logits that are not finite.
    """
    hidden = teacher[0], student[0]
    if len(hidden[0]) != len(hidden[1]):
        raise ValueError(
            f"the teacher's hidden states are of {len(hidden[0])} tokens, the student's of {len(hidden[1])}"
        )
    heads = teacher[1].float(), student[1].float()
    rows = chunk_rows or max(1, CHUNK_VALUES // max(head.vocab_size for head in heads))
    chunks: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(hidden[0]), rows):
            logits = [
                _merge(head.logits(states[start : start + rows].to(head.weight.device)) / temperature, merged)
                for states, head in zip(hidden, heads, strict=True)
            ]
            chunks.append(_chunk(logits[0], logits[1].to(logits[0].device)).cpu())
    values = torch.cat(chunks, dim=1).numpy() if chunks else np.zeros((len(fields(TokenFigures)), 0))
    return TokenFigures(*values)


def known_ids(ids: SequenceOf[int], vocab_size: int) -> list[int]:
    """Return the distinct ``ids`` that lie in the vocabulary, in order."""
    return sorted({number for number in ids if number < vocab_size})


def _merge(logits: Tensor, ids: SequenceOf[int]) -> Tensor:
    """Merge ``ids`` in ``logits`` [C, V] into one outcome at the first of them."""
    known = known_ids(ids, logits.shape[1])
    if len(known) < 2:
        return logits
    total = logits[:, known].logsumexp(1)
    logits[:, known] = BLANK
    logits[:, known[0]] = total
    return logits


def _chunk(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the fields of ``TokenFigures`` in order, [7, C] float64, from logits [C, V] of each model."""
    log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
    if not (log_p.isfinite().all() and log_q.isfinite().all()):
        who = "student" if log_p.isfinite().all() else "teacher"
        raise InputError(
            f"the {who}'s logits are not finite",
            setting=f"{who}.dtype",
            remedy=f"check its weights, or set a wider {who}.dtype",
        )
    agreement = teacher.argmax(1) == student.argmax(1)
    entropies = [-(log.exp() * log).sum(1, dtype=torch.float64) for log in (log_p, log_q)]
    log_p, outside_p = _given_shared(log_p, student.shape[1])
    log_q, outside_q = _given_shared(log_q, teacher.shape[1])
    difference = log_p - log_q
    fkl = (log_p.exp() * difference).sum(1, dtype=torch.float64)
    rkl = -(log_q.exp() * difference).sum(1, dtype=torch.float64)
    return torch.stack([fkl, rkl, *entropies, agreement.double(), outside_p, outside_q])


def _given_shared(logprobs: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Return log-probs of the first ``shared`` ids, given that one of them occurs, and the mass [C] of all others."""
    if shared >= logprobs.shape[1]:
        return logprobs, torch.zeros(len(logprobs), dtype=torch.float64, device=logprobs.device)
    outside = logprobs[:, shared:].exp().sum(1, dtype=torch.float64)
    inside = logprobs[:, :shared]
    return inside - inside.logsumexp(1, keepdim=True), outside


# -- bins -------------------------------------------------------------------------------------------------------------

# Token figures summed by teacher entropy, and their means per bin with intervals over problems.
#
# Sums are kept per response and bin, so that parts add up, intervals can be taken over problems, and two students can
# be compared in pairs on the same responses. Letters: R responses, P problems, B bins, F figures, N resamples.


SUMMED = (
    "tokens",
    "fkl",
    "rkl",
    "agreement",
    "teacher_entropy",
    "student_entropy",
    "student_above",
    "teacher_outside",
    "student_outside",
)
"""The F figures. ``student_above`` counts tokens whose *student* entropy exceeds tau."""
WITH_INTERVAL = ("fkl", "rkl", "agreement", "student_entropy", "student_above")


@dataclass(frozen=True)
class EntropyBins:
    """Bin b holds teacher entropies in (edges[b], edges[b + 1]], nats; the first one also holds 0."""

    edges: tuple[float, ...]
    tau: float

    @classmethod
    def of(cls, inner: SequenceOf[float], tau: float, vocabulary: int) -> EntropyBins:
        """Build bins from 0 to ln ``vocabulary``, the largest possible entropy; tau is an edge if it lies below
        that."""
        top = math.log(vocabulary)
        return cls((0.0, *sorted(edge for edge in {*inner, tau} if edge < top), top), tau)

    @property
    def count(self) -> int:
        return len(self.edges) - 1

    @property
    def gated(self) -> slice:
        """Select the bins of entropies above tau."""
        return slice(self.edges.index(self.tau) if self.tau in self.edges else self.count, self.count)

    def sums(self, figures: TokenFigures) -> Floats:
        """Sum the figures over the tokens of each bin: [B, F]."""
        bins = np.searchsorted(np.asarray(self.edges[1:-1]), figures.teacher_entropy, side="left")
        above = figures.student_entropy > self.tau
        columns = [
            np.ones(figures.tokens)
            if name == "tokens"
            else above
            if name == "student_above"
            else getattr(figures, name)
            for name in SUMMED
        ]
        return np.column_stack([np.bincount(bins, weights, minlength=self.count) for weights in columns])


@dataclass(frozen=True)
class Means:
    """Means over the tokens of a bin (or of several); None if the bin is empty.

    ``share``: its tokens among all. ``intervals``: (low, high) of figures by name, percentile bootstrap over problems;
    none where resamples never differ, as where one problem has all tokens or all have one value.
    """

    tokens: int
    share: float
    fkl: float | None
    rkl: float | None
    agreement: float | None
    teacher_entropy: float | None
    student_entropy: float | None
    student_above: float | None
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Alignment:
    """Teacher against student on some responses. Divergences and entropies in nats a token.

    ``above`` and ``below`` split all tokens at teacher entropy tau; ``above.share`` is the teacher's share of
    high-entropy tokens, ``all.student_above`` the student's. ``*_outside``: mean probability on ids that the other
    model's vocabulary lacks, which the divergences leave out.
    """

    edges: tuple[float, ...]
    tau: float
    responses: int
    problems: int
    all: Means
    above: Means
    below: Means
    bins: tuple[Means, ...]
    teacher_outside: float
    student_outside: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise_bins(
    sums: Floats,
    problems: SequenceOf[object],
    bins: EntropyBins,
    *,
    benchmarks: SequenceOf[str] | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Alignment:
    """Summarise the sums [R, B, F] of responses; ``problems`` [R] names the problem of each, for the intervals.

    Means are over tokens, whosever they are: a benchmark of many and long responses weighs more than a small one.

    Args:
        benchmarks: of each response [R]; problems are drawn within theirs (default: one for all).

    Raises:
        InputError: no token at all.
    """
    if not len(sums) or sums[:, :, 0].sum() == 0:
        problem = "no response has a token, so there is nothing to compare teacher and student on"
        raise InputError(problem, setting="evaluate.alignment")
    numbers = {problem: number for number, problem in enumerate(dict.fromkeys(problems))}
    by_problem = np.zeros((len(numbers), *sums.shape[1:]))  # [P, B, F]
    np.add.at(by_problem, [numbers[problem] for problem in problems], sums)
    homes = dict(zip(problems, benchmarks or [""] * len(sums), strict=True))
    resampled = _resampled(by_problem, [homes[problem] for problem in numbers], resamples, seed)
    whole = by_problem.sum(axis=0)
    total = whole[:, 0].sum()

    def means(chosen: slice) -> Means:
        return _means(whole[chosen].sum(axis=0), total, resampled[:, chosen].sum(axis=1), confidence)

    outside = dict(zip(SUMMED, whole.sum(axis=0) / total, strict=True))
    return Alignment(
        edges=bins.edges,
        tau=bins.tau,
        responses=len(sums),
        problems=len(numbers),
        all=means(slice(None)),
        above=means(bins.gated),
        below=means(slice(0, bins.gated.start)),
        bins=tuple(means(slice(number, number + 1)) for number in range(bins.count)),
        teacher_outside=float(outside["teacher_outside"]),
        student_outside=float(outside["student_outside"]),
    )


def _resampled(by_problem: Floats, benchmarks: SequenceOf[str], resamples: int, seed: int) -> Floats:
    """Return sums [N, B, F] of bootstrap resamples of the problems, each drawn within its benchmark."""
    rng = np.random.default_rng(seed)
    sums = np.zeros((resamples, *by_problem.shape[1:]))
    for name in sorted(set(benchmarks)):
        rows = by_problem[[one == name for one in benchmarks]]
        weights = rng.multinomial(len(rows), np.full(len(rows), 1.0 / len(rows)), size=resamples)
        sums += (weights @ rows.reshape(len(rows), -1)).reshape(sums.shape)
    return sums


def _means(whole: Floats, total: float, resampled: Floats, confidence: float) -> Means:
    """Return means from one bin's sums [F] and their resamples [N, F]."""
    tokens = whole[0]
    share = float(tokens / total)
    if tokens == 0:
        return Means(0, share, None, None, None, None, None, None, {})
    drawn = resampled[resampled[:, 0] > 0]  # resamples that missed the bin say nothing of it
    values = {name: float(value / tokens) for name, value in zip(SUMMED, whole, strict=True)}
    ratios = drawn[:, [SUMMED.index(name) for name in WITH_INTERVAL]] / drawn[:, :1]
    fields = {
        name: (interval.low, interval.high)
        for name, interval, column in zip(WITH_INTERVAL, intervals(ratios, confidence), ratios.T, strict=True)
        if not all_alike(column)  # resamples that never differ know of no spread, not of none
    }
    kept = {name: values[name] for name in SUMMED if name in Means.__dataclass_fields__ and name != "tokens"}
    return Means(tokens=int(tokens), share=share, intervals=fields, **kept)


# -- reading ----------------------------------------------------------------------------------------------------------

# Joint reading of responses by two models: their hidden states in step, a few thousand tokens at a time.
#
#     found = measure_alignment(teacher, student, sequences, tau=0.8)
#     found.above.fkl, found.all.agreement, found.to_json()


class Reader(Protocol):
    """The interface that reading needs of a model; an open hidden engine has it."""

    @property
    def head(self) -> LMHead: ...

    def hidden(self, sequences: SequenceOf[Sequence]) -> Iterator[HiddenBatch]: ...


class LoadedModel:
    """A causal LM in memory as a ``Reader``, with its device, dtype and mode unchanged."""

    def __init__(self, model: nn.Module, *, batch_tokens: int = 8192, row_tokens: int = 2048) -> None:
        self._model, self._batch_tokens, self._row_tokens = model, batch_tokens, min(row_tokens, batch_tokens)
        self.head = lm_head_of(model)
        self._layout = layout_of(model)

    @torch.no_grad()  # inference mode would leave tensors in the model's buffers that training cannot use
    def hidden(self, sequences: SequenceOf[Sequence]) -> Iterator[HiddenBatch]:
        device = self.head.weight.device
        for packed in pack(sequences, self._row_tokens, self._batch_tokens, self._layout):
            yield HiddenBatch(final_hidden(self._model, packed.to(device)), packed.order, packed.lengths)


def measure_alignment(
    teacher: nn.Module,
    student: nn.Module,
    sequences: SequenceOf[Sequence],
    *,
    teacher_sequences: SequenceOf[Sequence] | None = None,
    problems: SequenceOf[object] | None = None,
    tau: float = 0.8,
    edges: SequenceOf[float] = EDGES,
    temperature: float = 1.0,
    merged: SequenceOf[int] = (),
    batch_tokens: int = 8192,
    resamples: int = 2000,
) -> Alignment:
    """Measure exact divergences between two models in memory on given responses, by bin of teacher entropy.

    Args:
        sequences: context and response token ids as the student reads them.
        teacher_sequences: as the teacher reads them, where its contexts differ; the responses are the same.
        problems: which problem each response answers (default: one of its own each); intervals are over problems.
        tau: threshold of high entropy, nats.
        edges: inner edges of the bins of teacher entropy, nats; 0, tau and ln V are added.
        temperature: both models' logits are divided by it.
        merged: ids that count as one outcome, such as both models' stop ids.
        batch_tokens: tokens that both models read before their heads are compared.

    Raises:
        ValueError: no response has a token; an unknown architecture; logits that are not finite.
    """
    pair = LoadedModel(teacher, batch_tokens=batch_tokens), LoadedModel(student, batch_tokens=batch_tokens)
    bins = EntropyBins.of(edges, tau, pair[0].head.vocab_size)
    sums = np.zeros((len(sequences), bins.count, len(SUMMED)))
    with evaluating(teacher, student):
        read = read_pairs(
            *pair, teacher_sequences or sequences, sequences, temperature, merged, batch_tokens=batch_tokens
        )
        for number, figures in read:
            sums[number] = bins.sums(figures)
    named = range(len(sequences)) if problems is None else problems
    return summarise_bins(sums, list(named), bins, resamples=resamples)


def read_pairs(
    teacher: Reader,
    student: Reader,
    teacher_sequences: SequenceOf[Sequence],
    student_sequences: SequenceOf[Sequence],
    temperature: float = 1.0,
    merged: SequenceOf[int] = (),
    *,
    batch_tokens: int,
) -> Iterator[tuple[int, TokenFigures]]:
    """Yield (number, figures) of every sequence that has a response, in order.

    Memory: float32 copies of both heads, the hidden states of ``batch_tokens`` tokens (at least one sequence) of both
    models, and one chunk of logits.
    """
    heads = teacher.head.float(), student.head.float()
    for numbers in _groups(teacher_sequences, student_sequences, batch_tokens):
        states = [
            _in_order(reader, [sequences[number] for number in numbers])
            for reader, sequences in ((teacher, teacher_sequences), (student, student_sequences))
        ]
        figures = compare((states[0], heads[0]), (states[1], heads[1]), temperature=temperature, merged=merged)
        at = 0
        for number in numbers:
            length = len(student_sequences[number].response_ids)
            yield number, figures.part(at, at + length)
            at += length


def _groups(teacher: SequenceOf[Sequence], student: SequenceOf[Sequence], batch_tokens: int) -> Iterator[list[int]]:
    numbers: list[int] = []
    tokens = 0
    for number, (theirs, own) in enumerate(zip(teacher, student, strict=True)):
        if len(theirs.response_ids) != len(own.response_ids):
            raise ValueError(f"sequence {number}: teacher and student are given responses of different lengths")
        if not len(own.response_ids):
            continue
        longer = max(theirs.input_length, own.input_length)
        if numbers and tokens + longer > batch_tokens:
            yield numbers
            numbers, tokens = [], 0
        numbers.append(number)
        tokens += longer
    if numbers:
        yield numbers


def _in_order(reader: Reader, sequences: SequenceOf[Sequence]) -> Tensor:
    """Yield hidden states [T, D] of all sequences, in their order."""
    waiting: dict[int, Tensor] = {}
    for batch in reader.hidden(sequences):
        waiting.update(zip(batch.order, torch.split(batch.hidden, list(batch.lengths)), strict=True))
    return torch.cat([waiting[number] for number in range(len(sequences))])
