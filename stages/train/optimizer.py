"""AdamW, its state as named tensors, and the gradient norm. State is safetensors: reading it runs no code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eopd.stages.train.parallel import gathered, like, whole
from eopd.stages.train.settings import OptimizerSettings
from eopd.storage.errors import InputError

# -- ema --------------------------------------------------------------------------------------------------------------

# An exponential moving average of the weights: shadow <- decay * shadow + (1 - decay) * weights after each step.
#
# It starts as the weights of round 0 and goes on from round to round where the optimiser does. Kept in float32 and
# sharded as the parameters are.


class Ema:
    """The average of every trainable parameter of ``module``. Make it after the parameters are distributed."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._shadow = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, parameter in self._parameters.items():
            self._shadow[name].mul_(self._decay).add_(parameter.detach().float(), alpha=1.0 - self._decay)

    def tensors(self) -> dict[str, Tensor]:
        """Return every average in float32, ``gathered``."""
        return gathered(self._shadow.items())

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Restore what ``tensors`` returned.

        Raises:
            ValueError: it is of another model; names the first parameter that differs.
        """
        for name, parameter in self._parameters.items():
            value = averages.get(name)
            if value is None or value.shape != parameter.shape:
                shape = None if value is None else tuple(value.shape)
                raise InputError(
                    f"averaged weights of {name}: found {shape}, the model has {tuple(parameter.shape)}",
                    setting="train.optimizer.carry_over",
                    remedy="set train.optimizer.carry_over=false to start a new average",
                )
            self._shadow[name] = like(value, parameter, torch.float32)


# -- the optimizer ----------------------------------------------------------------------------------------------------

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(module: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Create AdamW over the trainable parameters; vectors (norms, biases) are not decayed."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return ``<moment>.<parameter name>`` -> tensor, and ``step``; ``gathered``."""
    return gathered(_state_of(module, optimizer))


def _state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        state = optimizer.state.get(parameter)
        if not state:
            continue
        for moment in MOMENTS:
            yield f"{moment}.{name}", state[moment]
        yield "step", state["step"].float().reshape(1)


def load_optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what ``optimizer_tensors`` returned.

    Raises:
        ValueError: the state is of another model; names the first parameter that differs.
    """
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        assert id(parameter) in stepped, name  # a state of any other object would never be read
        state: dict[str, Any] = {}
        for moment in MOMENTS:
            value = tensors.get(f"{moment}.{name}")
            if value is None or value.shape != parameter.shape:
                shape = None if value is None else tuple(value.shape)
                raise InputError(
                    f"optimiser state of {name}: found {shape}, the model has {tuple(parameter.shape)}. Another "
                    "model or another kind of training made it",
                    setting="train.optimizer.carry_over",
                    remedy="set train.optimizer.carry_over=false to start anew.",
                )
            state[moment] = like(value, parameter)
        state["step"] = tensors["step"].clone().reshape(()).to(parameter.device)
        optimizer.state[parameter] = state


def gradient_norm(module: nn.Module) -> Tensor:
    """Return the global L2 norm of the gradients, float32 scalar; infinite or NaN if one of them is."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    return whole(norm).float()


def scale_gradients(module: nn.Module, factor: float) -> None:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    torch._foreach_mul_(gradients, factor)  # of a thousand tensors in a few kernels
