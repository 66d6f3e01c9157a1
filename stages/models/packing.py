"""Packing: several sequences in one row, positions reset, so that no compute goes into padding.

With ``attention_mask=None`` transformers builds a block-diagonal mask from the resets of ``position_ids``. A row
holds at most ``row_tokens`` tokens, so attention costs T * row_tokens and not T squared. A ``Layout`` says which
sequences a model may read together; ``backbone.layout_of`` finds a model's.
Letters: S sequences, R rows, L row length, T scored response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eopd.stages.models.lm_head import evaluating, lm_head_of, probe_ids, refusal, traits_of, unwrap
from eopd.stages.models.model_config import scaled_positions
from eopd.stages.models.transfer import on_device
from eopd.storage.teacher_record import offsets_of


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
    sequences: SequenceOf[Sequence],
    row_tokens: int,
    token_budget: int | None = None,
    layout: Layout = PACKED,
    *,
    few_widths: bool = False,
) -> list[Packed]:
    """Pack sequences first-fit decreasing into rows of ``row_tokens``, rows into batches of at most ``token_budget``
    tokens.

    Deterministic. A sequence longer than ``row_tokens`` has a row of its own; a batch holds at least one row. A
    sequence without response tokens has nothing to predict and is in no batch (and in no ``order``).

    Args:
        row_tokens: tokens a row may hold.
        token_budget: R * L of a batch at most; default: one row of ``row_tokens``.
        layout: which sequences may stand together.
        few_widths: widen rows to a width of ``next_width`` where they may be packed without limits.

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
    widen = next_width if few_widths and layout == PACKED else int
    batches: list[list[list[int]]] = []
    for group, batched in ((beyond, layout.batched and not layout.alone_beyond), (within, layout.batched)):
        packed = layout.packed and batched
        rows = _fill_rows(sequences, group, row_tokens) if packed else [[number] for number in group]
        batches += _fill_batches(sequences, rows, budget if batched else 0, widen)
    return [_batch(sequences, batch, layout, widen) for batch in batches]


def next_width(tokens: int) -> int:
    """Return the next of 8 widths in each power of two: at most an eighth more.

    On a CPU shapes that seldom recur are slow: kernels are prepared for each, and the heap falls to pieces of every
    size (docs/log.md).
    """
    step = 1 << max(tokens.bit_length() - 4, 0)
    return -(-tokens // step) * step


def _fill_batches(
    sequences: SequenceOf[Sequence], rows: list[list[int]], budget: int, widen: Callable[[int], int]
) -> list[list[list[int]]]:
    batches: list[list[list[int]]] = []
    width = 0
    for row in rows:  # longest first, so the first row of a batch is its width
        if batches and (len(batches[-1]) + 1) * width <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
            width = widen(_row_length(sequences, row))
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


def _batch(
    sequences: SequenceOf[Sequence], rows: list[list[int]], layout: Layout, widen: Callable[[int], int]
) -> Packed:
    width = widen(max(_row_length(sequences, row) for row in rows))
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


# -- the backbone -----------------------------------------------------------------------------------------------------

# The model below its LM head, over packed rows. Letters: T scored tokens, R rows, L row length, D hidden size, V
# vocabulary.


# These two honour the block-diagonal mask built from position resets for any number of rows. Flash attention reads
# the resets itself, and only of a single row: with several it would silently attend across sequences.
PACKING_ATTENTION = ("sdpa", "eager")

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
"""Layer types without a recurrent or convolutional state, which would run on from one packed sequence to the next."""
PROBE_LENGTHS = (19, 7, 13, 24, 5)
LONGEST_PROBE = 8192
"""An unknown position scaling is probed beyond its original length up to here; beyond, it is taken to change there."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.08}
"""Relative error of hidden states that rounding may explain. A state or an attention that crosses into a neighbour
changes the short probes by 0.1 to 1; a layout refused in error costs speed and nothing else."""


def final_hidden(model: nn.Module, packed: Packed) -> Tensor:
    """Return hidden states [T, D] that predict each response token, as the LM head reads them; differentiable.

    Raises:
        InputError: an attention implementation for which packing is not known to be right.
    """
    inner = unwrap(model)
    attention = inner.config.get_text_config()._attn_implementation
    if attention not in PACKING_ATTENTION:
        problem = f"attn_implementation {attention!r} is refused with packed sequences"
        raise refusal(inner, problem, f"load the model with one of {', '.join(PACKING_ATTENTION)}")
    if getattr(inner.config.get_text_config(), "attn_logit_softcapping", None) is not None and attention != "eager":
        problem = f"attn_implementation {attention!r} leaves out this model's attention soft-capping and is refused"
        raise refusal(inner, problem, "load it with attn_implementation='eager'")
    traits = traits_of(inner)
    forget_lengths(inner)
    positions = {"position_ids": packed.position_ids} if traits.takes_positions else {}
    out = traits.decoder(input_ids=packed.input_ids, attention_mask=None, use_cache=False, **positions)
    hidden: Tensor = out.last_hidden_state.flatten(0, 1).index_select(0, packed.predict_index)
    return hidden if traits.hidden_scale == 1.0 else hidden * traits.hidden_scale


ROW_TOKENS, BATCH_TOKENS = 2048, 8192
LOGIT_BYTES = 256 * 2**20
"""Size of one block of float32 logits."""


def read_logits(model: nn.Module, sequences: list[Sequence], device: str) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Read ``sequences``, and yield the logits of their response tokens in blocks.

    Yields:
        Numbers [T] of the tokens, counted through all responses in their order, and float32 logits [T, V].
    """
    starts = offsets_of(np.asarray([len(sequence.response_ids) for sequence in sequences], np.int64))
    head = lm_head_of(model).float()
    block = max(1, LOGIT_BYTES // (4 * head.vocab_size))
    for packed in pack(sequences, ROW_TOKENS, BATCH_TOKENS, layout_of(model)):
        hidden = final_hidden(model, packed.to(device))
        tokens = np.concatenate([np.arange(starts[number], starts[number + 1]) for number in packed.order])
        for first in range(0, len(tokens), block):
            yield tokens[first : first + block], head.logits(hidden[first : first + block])


_DYNAMIC_ROPES: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def forget_lengths(inner: nn.Module) -> None:
    """Reset what a dynamic position scaling remembers of the longest sequence read.

    Without this the same call would give different hidden states before and after a longer one.
    """
    if inner not in _DYNAMIC_ROPES:
        modules = inner.modules()
        _DYNAMIC_ROPES[inner] = [one for one in modules if "dynamic" in str(getattr(one, "rope_type", ""))]
    for module in _DYNAMIC_ROPES[inner]:
        for name, original in list(module.named_buffers(recurse=False)):
            if name.endswith("original_inv_freq"):
                prefix = name.removesuffix("original_inv_freq")
                module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


_LAYOUTS: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def layout_of(model: nn.Module) -> Layout:
    """Return the densest packing in which a model treats each sequence as if it were alone.

    The layout is measured once per model by reading a few short sequences alone and together. Call this before the
    model is wrapped or sharded.

    Raises:
        ValueError: the model is not causal: it says something else of a prefix when more tokens follow.
    """
    inner = unwrap(model)
    if inner not in _LAYOUTS:
        traits_of(inner)
        with torch.no_grad(), evaluating(inner), torch.autocast(inner.device.type, enabled=False):
            _LAYOUTS[inner] = _measure(inner)
    return _LAYOUTS[inner]


def _measure(inner: Any) -> Layout:
    config, tolerance = inner.config.get_text_config(), TOLERANCE.get(inner.dtype, TOLERANCE[torch.bfloat16])
    scaled = scaled_positions(config.to_dict())
    attends_only = ATTENTION_LAYERS.issuperset(getattr(config, "layer_types", None) or ())
    packed = traits_of(inner).takes_positions and attends_only and not getattr(inner, "_is_stateful", False)
    layout = Layout(packed=packed, row_limit=getattr(config, "attention_chunk_size", None))
    lengths: tuple[int, ...] = PROBE_LENGTHS
    if scaled is not None and scaled.boundary is not None:
        if scaled.depends_on_length or scaled.boundary + 8 > LONGEST_PROBE:
            layout = replace(layout, boundary=scaled.boundary, alone_beyond=not scaled.alike_beyond)
        else:
            lengths = (*lengths, scaled.boundary + 8)
    ids = probe_ids(inner.config, max(lengths) + len(lengths))
    sequences = [Sequence(ids[start : start + 1], ids[start + 1 : start + n + 1]) for start, n in enumerate(lengths)]
    alone = _states(inner, sequences, Layout(packed=False, batched=False))
    if not all(torch.isfinite(state).all() for state in alone):
        return layout  # the weights' fault, which is reported by the response that shows it
    prefix = [Sequence(sequence.context_ids, sequence.response_ids[:4]) for sequence in sequences[:1]]
    if _error(_states(inner, prefix, layout), [alone[0][:4]]) > tolerance:
        raise refusal(inner, "its state at a token depends on later tokens, so it is refused")
    for candidate in _candidates(layout, scaled.boundary if scaled else None):
        if _error(_states(inner, 2 * sequences, candidate), 2 * alone) <= tolerance:  # twice: several rows
            return candidate
    return replace(layout, packed=False, batched=False)


def _candidates(layout: Layout, boundary: int | None) -> list[Layout]:
    """Yield layouts to try, the fastest first."""
    layouts = [layout]
    if boundary is not None and layout.boundary is None:
        layouts.append(replace(layout, boundary=boundary))
    return [*(one for one in layouts if one.packed), *(replace(one, packed=False) for one in layouts)]


def _states(inner: Any, sequences: list[Sequence], layout: Layout) -> list[Tensor]:
    """Return states [T, D] of each sequence, read in ``layout`` with several neighbours in its row and several rows per
    call."""
    row = sum(PROBE_LENGTHS) + max(sequence.input_length for sequence in sequences)
    states: dict[int, Tensor] = {}
    for packed in pack(sequences, row, 16 * row, layout):
        hidden = final_hidden(inner, packed.to(inner.device)).double()
        states.update(zip(packed.order, torch.split(hidden, list(packed.lengths)), strict=True))
    return [states[number] for number in range(len(sequences))]


def _error(states: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the relative error of the median sequence: rounding may choose other experts for a single one."""
    return median(float((a - b).norm() / b.norm()) for a, b in zip(states, wanted, strict=True))
