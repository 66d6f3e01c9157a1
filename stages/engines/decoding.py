"""Faster decoding with transformers, bit for bit the same: a KV cache that grows without copies, and attention whose
query heads share keys and values without copies of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# -- roomy cache ------------------------------------------------------------------------------------------------------

# A preallocated KV cache: appending writes one position instead of copying all of them.
#
# Copying the whole cache at every token is two thirds of the time of a small model at 150 tokens, and more later.


MIN_ROOM = 64
GROWTH = 1.5


class RoomyLayer(DynamicLayer):
    """A full-attention layer. ``keys`` and ``values`` are views of the filled part, [B, heads, length, size]."""

    keys: Any  # tensors; None before the first update
    values: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if self._rooms is None or stop > self._rooms[0].shape[-2]:
            size = max(stop + MIN_ROOM, int(stop * GROWTH))
            keys = _moved(self.keys, key_states, start, size)
            self._rooms = keys, _moved(self.values, value_states, start, size)
        keys, values = self._rooms
        keys[:, :, start:stop] = key_states
        values[:, :, start:stop] = value_states
        self.keys, self.values = keys[:, :, :stop], values[:, :, :stop]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._rooms is None:
            return
        length = self.get_seq_length()
        self._rooms = self._rooms[0][indices], self._rooms[1][indices]
        self.keys, self.values = self._rooms[0][:, :, :length], self._rooms[1][:, :, :length]


def can_drop_rows(cache: DynamicCache) -> bool:
    """True if ``batch_select_indices`` reaches every state of a cache; it forgets those of linear attention."""
    return all(isinstance(layer, DynamicLayer) and "Linear" not in type(layer).__name__ for layer in cache.layers)


def _moved(old: Tensor | None, like: Tensor, length: int, size: int) -> Tensor:
    """Allocate ``size`` positions of the shape of ``like``, the first ``length`` copied from ``old``."""
    room = like.new_empty((*like.shape[:2], size, like.shape[3]))
    if old is not None and length:
        room[:, :, :length] = old
    return room


def roomy_cache(config: Any) -> DynamicCache:
    """Build a cache for ``config``; layers of other kinds (sliding windows, linear attention) stay transformers'
    own."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


# -- grouped attention ------------------------------------------------------------------------------------------------

# With padding, transformers copies the cached keys and values once for every query head that shares them: at 400 tokens
# and three heads to a group that takes ten times as long as attention itself, at each layer of each step. On a CPU,
# torch's kernel reads them where they are, and its results are the same, bit for bit.


@contextmanager
def grouped_attention() -> Iterator[None]:
    """Let transformers' ``sdpa`` attention decode on a CPU without repeating keys and values."""
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _grouped_sdpa
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = own


def _grouped_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of one new token [B, heads, 1, size] to keys and values [B, groups, L, size]; of more, transformers'
    own."""
    plain = options.get("position_bias") is None and options.get("cache") is None
    grouped = getattr(module, "num_key_value_groups", 1) > 1
    if not (plain and grouped and query.device.type == "cpu" and query.shape[2] == 1 and attention_mask is not None):
        attended: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return attended
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=options.get("scaling"), enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None
