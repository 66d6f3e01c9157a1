"""What the examples' models have in common: a small Qwen3, trained from scratch in plain torch, float32."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

IGNORED = -100  # label of a token that is not trained on


@dataclass(frozen=True, kw_only=True)
class SmallModel:
    """Shape of one model, and how it is trained."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    feed_forward: int
    steps: int
    batch: int  # texts a step
    matrix_lr: float = 0.02  # Muon, for the matrices of the layers
    other_lr: float = 5e-3  # AdamW, for embeddings and norms
    warmup: int = 50


def new_model(
    recipe: SmallModel, *, vocabulary: int, positions: int, pad_id: int, stop_ids: Sequence[int], seed: int
) -> Qwen3ForCausalLM:
    """A randomly initialised model that stops at ``stop_ids``, the last of which ends its texts.

    head_dim is 32 because vLLM's CPU attention has no 24.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=32,
        max_position_embeddings=positions,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        pad_token_id=pad_id,
        bos_token_id=None,
        eos_token_id=stop_ids[-1],
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = list(stop_ids)
    model.generation_config.pad_token_id = pad_id
    return model


class Optimisers:
    """Muon for the matrices of the layers, AdamW for the rest, one schedule for both."""

    def __init__(self, model: Qwen3ForCausalLM, recipe: SmallModel) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        self.recipe = recipe
        self.all: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), recipe.matrix_lr),
            (torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0), recipe.other_lr),
        ]

    def step(self, step: int) -> None:
        """Take the step numbered ``step`` and forget the gradients."""
        recipe = self.recipe
        cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        factor = min(1.0, (step + 1) / recipe.warmup, 0.02 + 0.98 * cosine)
        for optimiser, lr in self.all:
            for group in optimiser.param_groups:
                group["lr"] = lr * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        return [optimiser.state_dict() for optimiser, _ in self.all]

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        for (optimiser, _), state in zip(self.all, states, strict=True):
            optimiser.load_state_dict(state)


class StepReport:
    """One line every ``every`` steps, and at the last: mean loss since the line before, and time."""

    def __init__(self, steps: int, every: int, tell: Callable[[str], None], first: int = 0) -> None:
        self._steps, self._every, self._tell, self._first = steps, every, tell, first
        self._started, self._losses = time.monotonic(), list[float]()

    def add(self, step: int, loss: float) -> bool:
        """Whether a line was told."""
        self._losses.append(loss)
        done = step + 1
        if done % self._every and done != self._steps:
            return False
        seconds = time.monotonic() - self._started
        left = seconds / (done - self._first) * (self._steps - done)
        mean = sum(self._losses) / len(self._losses)
        self._tell(f"step {done}/{self._steps}  loss {mean:.4f}  {seconds:.0f} s, {left:.0f} s left")
        self._losses.clear()
        return True
