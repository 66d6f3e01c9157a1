"""Packing: several sequences in one row, positions reset, so that no compute goes into padding.

With ``attention_mask=None`` transformers builds a block-diagonal mask from the resets of ``position_ids``. A row
holds at most ``row_tokens`` tokens, so attention costs T * row_tokens and not T squared. A ``Layout`` says which
sequences a model may read together; ``backbone.layout_of`` finds a model's.
Letters: S sequences, R rows, L row length, T scored response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eopd.stages.models.transfer import on_device


@dataclass(frozen=True)
class Sequence:
    """A context and the response whose tokens are scored. Ids, never text."""

    context_ids: SequenceOf[int]
    response_ids: SequenceOf[int]

    @property
    def input_length(self) -> int:
        """Tokens the model reads: the last response token is predicted, never read."""
        return len(self.context_ids) + len(self.response_ids) - 1


@dataclass(frozen=True)
class Layout:
    """Rules for which sequences may share a row or a call without affecting each other's results."""

    packed: bool = True  # several sequences in a row; else one, padded on the right
    batched: bool = True  # several rows in a call
    boundary: int | None = None  # sequences of at most this many tokens and longer ones never share a call
    alone_beyond: bool = False  # sequences beyond the boundary share a call with none at all
    row_limit: int | None = None  # most tokens of a row of several sequences

    def describe(self) -> str:
        """Return one line for the log; empty if sequences are packed without limits."""
        notes = []
        if not self.batched:
            notes.append("one sequence a call, because this model's state depends on its neighbours")
        elif not self.packed:
            notes.append("one sequence a row, because this model does not keep packed sequences apart")
        if self.boundary is not None:
            beyond = "each alone" if self.alone_beyond else "apart from shorter ones"
            notes.append(f"sequences of more than {self.boundary} tokens {beyond}, because its positions scale there")
        return "; ".join(notes)


PACKED = Layout()


@dataclass(frozen=True)
class Packed:
    """One batch of packed rows. Its T scored tokens are grouped by sequence, in the order of ``order``."""

    input_ids: Tensor  # [R, L] int64
    position_ids: Tensor  # [R, L] int64, restarting at 0 with each sequence; in padding 0, or going on in unpacked rows
    predict_index: Tensor  # [T] int64 into R*L: where the hidden state that predicts each response token stands
    target_ids: Tensor  # [T] int64 the response tokens
    order: tuple[int, ...]  # number (in the list given to pack) of each sequence here
    lengths: tuple[int, ...]  # response tokens of each, in the same order

    @property
    def tokens(self) -> int:
        """Scored response tokens T."""
        return int(self.predict_index.numel())

    def to(self, device: torch.device | str) -> Packed:
        return on_device(device, self)


def pack(
    sequences: SequenceOf[Sequence], row_tokens: int, token_budget: int | None = None, layout: Layout = PACKED
) -> list[Packed]:
    """Pack sequences first-fit decreasing into rows of ``row_tokens``, rows into batches of at most ``token_budget``
    tokens.

    Deterministic. A sequence longer than ``row_tokens`` has a row of its own; a batch holds at least one row. A
    sequence without response tokens has nothing to predict and is in no batch (and in no ``order``).

    Args:
        row_tokens: tokens a row may hold.
        token_budget: R * L of a batch at most; default: one row of ``row_tokens``.
        layout: which sequences may stand together.
    Raises:
        ValueError: a sequence with a response and an empty context (nothing predicts its first token), by number.
    """
    if row_tokens < 1:
        raise ValueError(f"row_tokens must be at least 1, got {row_tokens}")
    for number, sequence in enumerate(sequences):
        if len(sequence.response_ids) and not len(sequence.context_ids):
            raise ValueError(f"sequence {number} has an empty context: nothing predicts its first response token")
    budget = token_budget or row_tokens
    numbers = [number for number, sequence in enumerate(sequences) if len(sequence.response_ids)]
    numbers.sort(key=lambda number: (-sequences[number].input_length, number))
    beyond = [n for n in numbers if layout.boundary is not None and sequences[n].input_length > layout.boundary]
    within = numbers[len(beyond) :]
    row_tokens = min(row_tokens, layout.row_limit or row_tokens)
    batches: list[list[list[int]]] = []
    for group, batched in ((beyond, layout.batched and not layout.alone_beyond), (within, layout.batched)):
        packed = layout.packed and batched
        rows = _fill_rows(sequences, group, row_tokens) if packed else [[number] for number in group]
        batches += _fill_batches(sequences, rows, budget if batched else 0)
    return [_batch(sequences, batch, layout) for batch in batches]


def _fill_batches(sequences: SequenceOf[Sequence], rows: list[list[int]], budget: int) -> list[list[list[int]]]:
    batches: list[list[list[int]]] = []
    width = 0
    for row in rows:  # longest first, so the first row of a batch is its width
        if batches and (len(batches[-1]) + 1) * width <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
            width = _row_length(sequences, row)
    return batches


def _row_length(sequences: SequenceOf[Sequence], row: list[int]) -> int:
    return sum(sequences[number].input_length for number in row)


def _fill_rows(sequences: SequenceOf[Sequence], numbers: list[int], row_tokens: int) -> list[list[int]]:
    """Fill rows with ``numbers``, which are sorted longest first; fullest row first.

    First fit is looked up in a tree of the rows' free space: S log S, where trying each row in turn is S squared.
    """
    leaves = 1
    while leaves < max(1, len(numbers)):
        leaves *= 2
    free = [row_tokens] * (2 * leaves)  # free[1] is the root: the most free space of any row
    rows: list[list[int]] = []
    for number in numbers:
        length = sequences[number].input_length
        node = 1
        if length > row_tokens:
            node = leaves + len(rows)  # longer than any row: the next unused one, alone
        else:
            while node < leaves:
                node = 2 * node if free[2 * node] >= length else 2 * node + 1
        if node - leaves >= len(rows):
            node = leaves + len(rows)
            rows.append([])
        rows[node - leaves].append(number)
        free[node] -= length
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return sorted(rows, key=lambda row: (-_row_length(sequences, row), row[0]))


def _batch(sequences: SequenceOf[Sequence], rows: list[list[int]], layout: Layout) -> Packed:
    width = max(_row_length(sequences, row) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)  # any token may fill the end of a row
    positions = np.zeros((len(rows), width), dtype=np.int64)
    if not layout.packed:
        positions[:] = np.arange(width)  # without resets, which a model that cannot pack would misread
    index, targets = [], []
    order = [number for row in rows for number in row]
    for r, row in enumerate(rows):
        at = 0
        for number in row:
            sequence = sequences[number]
            length, context = sequence.input_length, len(sequence.context_ids)
            ids[r, at : at + context] = sequence.context_ids
            ids[r, at + context : at + length] = sequence.response_ids[:-1]
            positions[r, at : at + length] = np.arange(length)
            index.append(r * width + at + np.arange(context - 1, length))
            targets.append(np.asarray(sequence.response_ids, dtype=np.int64))
            at += length
    return Packed(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        predict_index=torch.from_numpy(np.concatenate(index)),
        target_ids=torch.from_numpy(np.concatenate(targets)),
        order=tuple(order),
        lengths=tuple(len(sequences[number].response_ids) for number in order),
    )
