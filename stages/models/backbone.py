"""The model below its LM head, over packed rows. Letters: T scored tokens, R rows, L row length, D hidden size, V
vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eopd.stages.models.lm_head import evaluating, lm_head_of, probe_ids, refusal, traits_of, unwrap
from eopd.stages.models.model_config import scaled_positions
from eopd.stages.models.packing import Layout, Packed, Sequence, pack
from eopd.storage.teacher_record import offsets_of

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
