"""Tensors to or from a GPU in one copy: every copy costs a call, and from or to ordinary memory a wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
ALIGNMENT = 16


def on_device(device: torch.device | str, value: T) -> T:
    """Return a dataclass with its tensors, and those of dataclasses in its fields, on ``device``.

    On a CPU they are kept. On a GPU they become views of one buffer, copied once from pinned memory.
    """
    tensors = _tensors(value)
    if torch.device(device).type == "cpu" or not tensors:
        return value
    return _with_tensors(value, iter(copied_at_once(tensors, device)))


def copied_at_once(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Return ``tensors``, all of one device, as views of one buffer on ``device``."""
    starts, end, from_host = [], 0, tensors[0].device.type == "cpu"
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    pinned = from_host and torch.cuda.is_available()
    buffer = torch.empty(end, dtype=torch.uint8, device=tensors[0].device, pin_memory=pinned)
    for start, tensor in zip(starts, tensors, strict=True):
        if tensor.numel():
            buffer[start : start + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
    buffer = buffer.to(device, non_blocking=from_host)
    return [
        buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, tensors, strict=True)
    ]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in _parts(value).values() for tensor in _tensors(part)]


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    return replace(value, **{name: _with_tensors(part, tensors) for name, part in _parts(value).items()})


def _parts(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are tensors or dataclasses."""
    named = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: part for name, part in named.items() if isinstance(part, Tensor) or is_dataclass(part)}
