"""Joint reading of responses by two models: their hidden states in step, a few thousand tokens at a time.

found = measure_alignment(teacher, student, sequences, tau=0.8)
found.above.fkl, found.all.agreement, found.to_json()
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from eopd.stages.align.divergence import SUMMED, Alignment, EntropyBins, TokenFigures, compare, summarise_bins
from eopd.stages.align.settings import EDGES
from eopd.stages.engines.hidden import HiddenBatch
from eopd.stages.models.backbone import final_hidden, layout_of
from eopd.stages.models.lm_head import LMHead, evaluating, lm_head_of
from eopd.stages.models.packing import Sequence, pack


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
