"""A preallocated KV cache: appending writes one position instead of copying all of them.

Copying the whole cache at every token is two thirds of the time of a small model at 150 tokens, and more later.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

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
