"""One student on several processes: DDP copies it, FSDP2 shards it; and gathering of its tensors.

Both average gradients over the processes, and the loop's normaliser allows for that (``loop.Loop.take``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from eopd.stages.train.student import Student
from eopd.storage.errors import InputError


def distribute(student: Student, accelerator: Accelerator, sharding: Literal["none", "fsdp"]) -> nn.Module:
    """Return the module to call in every forward. Make the optimiser after this: FSDP2 replaces the parameters."""
    if accelerator.num_processes == 1:
        return student
    if sharding == "none":
        wrapped: nn.Module = accelerator.prepare_model(student)
        return wrapped
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    blocks = set(getattr(student.model, "_no_split_modules", None) or ())
    for module in student.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(student, mesh=mesh)
    return student


def student_of(module: nn.Module) -> Student:
    """Return the Student inside the result of ``distribute``."""
    inner = getattr(module, "module", module)
    assert isinstance(inner, Student)
    return inner


@contextmanager
def accumulating(module: nn.Module, accelerator: Accelerator, *, last: bool) -> Iterator[None]:
    """Exchange gradients only in the ``last`` micro-batch of a step; under FSDP2 in every one, since it keeps
    unexchanged gradients whole in every process."""
    with nullcontext() if last or isinstance(module, FSDPModule) else accelerator.no_sync(module):
        yield


def reshard(module: nn.Module) -> None:
    """Free what a forward pass without a backward one left gathered: FSDP2 keeps its outermost parameters.

    Until then they are other objects than those that the optimiser was made for.
    """
    if isinstance(module, FSDPModule):
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (every process must call it); return a plain one as it is. Detached."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of ``value`` on the device, in the dtype (unless given) and with the sharding of
    ``parameter``."""
    value = value.detach().to(device=parameter.device, dtype=dtype or parameter.dtype).clone()
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def gathered(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return every tensor whole and on the CPU in the main process, none in the others. Every process must call it."""
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    whole_tensors: dict[str, Tensor] = {}
    for name, tensor in tensors:
        value = whole(tensor)
        if main:
            whole_tensors[name] = value.cpu().contiguous()
    return whole_tensors


def gather_weights(module: nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:
    """Return every parameter once (tied ones under their first name), ``gathered``."""
    named = module.named_parameters()
    return gathered((name, parameter) for name, parameter in named if parameter.requires_grad or not trained_only)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Restore the trained weights that ``gather_weights`` returned; frozen ones stay as they were loaded.

    Args:
        folder: of the state that holds the weights, for messages.

    Raises:
        InputError: they are of another model; names the first parameter that differs.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name in sorted(trained.keys() | weights.keys()):
        stored, needed = (tuple(of[name].shape) if name in of else None for of in (weights, trained))
        if stored != needed:
            raise InputError(
                f"resumable state of {name}: it has shape {stored}, the model {needed}. Another model or another kind "
                "of training made it",
                file=folder,
                remedy="delete the state to train the round from its start",
            )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(like(weights[name], parameter))
