"""Packing: several sequences in one row, positions reset, so that no compute goes into padding.

With ``attention_mask=None`` transformers builds a block-diagonal mask from the resets of ``position_ids``. A row
holds at most ``row_tokens`` tokens, so attention costs T * row_tokens and not T squared.
Letters: S sequences, R rows, L row length, T scored response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


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
class Packed:
    """One batch of packed rows. Its T scored tokens stand sequence after sequence, in the order of ``order``."""

    input_ids: Tensor  # [R, L] int64
    position_ids: Tensor  # [R, L] int64, restarting at 0 with each sequence; 0 throughout the padding
    predict_index: Tensor  # [T] int64 into R*L: where the hidden state that predicts each response token stands
    target_ids: Tensor  # [T] int64 the response tokens
    order: tuple[int, ...]  # number (in the list given to pack) of each sequence here
    lengths: tuple[int, ...]  # response tokens of each, in the same order

    @property
    def tokens(self) -> int:
        """Scored response tokens T."""
        return int(self.predict_index.numel())

    def to(self, device: torch.device | str) -> Packed:
        moved = {
            name: getattr(self, name).to(device)
            for name in ("input_ids", "position_ids", "predict_index", "target_ids")
        }
        return replace(self, **moved)


def pack(sequences: SequenceOf[Sequence], row_tokens: int, token_budget: int | None = None) -> list[Packed]:
    """First-fit decreasing into rows of ``row_tokens``, rows into batches of at most ``token_budget`` tokens.

    Deterministic. A sequence longer than ``row_tokens`` has a row of its own; a batch holds at least one row. A
    sequence without response tokens has nothing to predict and is in no batch (and in no ``order``).

    Args:
        row_tokens: tokens a row may hold.
        token_budget: R * L of a batch at most; default: one row of ``row_tokens``.
    Raises:
        ValueError: a sequence with a response and an empty context (nothing predicts its first token), by number.
    """
    if row_tokens < 1:
        raise ValueError(f"row_tokens must be at least 1, got {row_tokens}")
    for number, sequence in enumerate(sequences):
        if len(sequence.response_ids) and not len(sequence.context_ids):
            raise ValueError(f"sequence {number} has an empty context: nothing predicts its first response token")
    rows = _fill_rows(sequences, row_tokens)
    batches: list[list[list[int]]] = []
    width = 0
    for row in rows:  # longest first, so the first row of a batch is its width
        length = _row_length(sequences, row)
        if batches and (len(batches[-1]) + 1) * width <= (token_budget or row_tokens):
            batches[-1].append(row)
        else:
            batches.append([row])
            width = length
    return [_batch(sequences, batch) for batch in batches]


def _row_length(sequences: SequenceOf[Sequence], row: list[int]) -> int:
    return sum(sequences[number].input_length for number in row)


def _fill_rows(sequences: SequenceOf[Sequence], row_tokens: int) -> list[list[int]]:
    """Sequence numbers of each row, fullest row first.

    First fit is looked up in a tree of the rows' free space: S log S, where trying each row in turn is S squared.
    """
    numbers = [number for number, sequence in enumerate(sequences) if len(sequence.response_ids)]
    numbers.sort(key=lambda number: (-sequences[number].input_length, number))
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


def _batch(sequences: SequenceOf[Sequence], rows: list[list[int]]) -> Packed:
    width = max(_row_length(sequences, row) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)  # any token may fill the end of a row
    positions = np.zeros((len(rows), width), dtype=np.int64)
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
