"""An exponential moving average of the weights: shadow <- decay * shadow + (1 - decay) * weights after each step.

It starts as the weights of round 0 and goes on from round to round where the optimiser does. Kept in float32 and
sharded as the parameters are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from eopd.stages.train.parallel import gathered, like


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
                raise ValueError(
                    f"averaged weights of {name}: found {shape}, the model has {tuple(parameter.shape)}; set "
                    "train.optimizer.carry_over=false to start a new average"
                )
            self._shadow[name] = like(value, parameter, torch.float32)
