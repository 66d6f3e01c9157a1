"""Supervised training of a small Qwen3 on random solution traces, in plain torch.

Letters: B rows of a batch, L tokens of the longest row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from eopd.examples.countdown import task
from eopd.examples.countdown.tokenizer import END, ID, PAD, TURN_END, VOCABULARY, encode

IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """How one of the two models is made. ``chat``: half of the rows are rendered by the chat template."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    feed_forward: int
    steps: int
    chat: bool
    batch: int = 256
    four_numbers: float = 0.6  # share of rows with four numbers, the rest have three
    matrix_lr: float = 0.02  # Muon, for the matrices of the layers
    other_lr: float = 5e-3  # AdamW, for embeddings and norms
    warmup: int = 50


TEACHER = Recipe(layers=4, width=128, heads=4, kv_heads=2, feed_forward=384, steps=1500, chat=True)
STUDENT = Recipe(layers=3, width=96, heads=3, kv_heads=3, feed_forward=256, steps=250, chat=False)


def new_model(recipe: Recipe, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised model; head_dim is 32 because vLLM's CPU attention has no 24."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=recipe.width,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=32,
        max_position_embeddings=256,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        pad_token_id=ID[PAD],
        bos_token_id=None,
        eos_token_id=ID[TURN_END] if recipe.chat else ID[END],
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = [ID[END], ID[TURN_END]] if recipe.chat else [ID[END]]
    model.generation_config.pad_token_id = ID[PAD]
    return model


def batches(recipe: Recipe, rules: task.Rules, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless fresh batches: ids [B, L], and labels [B, L] that are IGNORED on prompt and padding."""
    rng = np.random.default_rng(seed)
    while True:
        groups = []
        for n, share in ((4, recipe.four_numbers), (3, 1.0 - recipe.four_numbers)):
            rows = round(recipe.batch * share)
            for chat in (True, False) if recipe.chat else (False,):
                part = rows // 2 if recipe.chat else rows
                groups.append(encode(task.draw_side(rng, part, n, rules, held_out=False), chat=chat))
        width = max(ids.shape[1] for ids, _ in groups)
        ids = np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=ID[PAD]) for x, _ in groups])
        labels = np.where(ids == ID[PAD], IGNORED, ids)
        row = 0
        for x, prompt in groups:
            labels[row : row + len(x), :prompt] = IGNORED
            row += len(x)
        yield torch.from_numpy(ids), torch.from_numpy(labels)


def train(
    recipe: Recipe, rules: task.Rules, seed: int, report: Callable[[str], None], every: int = 100
) -> Qwen3ForCausalLM:
    """Train from scratch; ``report`` gets one line every ``every`` steps."""
    model = new_model(recipe, seed)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimisers: list[tuple[torch.optim.Optimizer, float]] = [
        (
            torch.optim.Muon(hidden, lr=recipe.matrix_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            recipe.matrix_lr,
        ),
        (torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.0), recipe.other_lr),
    ]
    data = batches(recipe, rules, seed + 1)
    started, losses = time.monotonic(), 0.0
    for step in range(recipe.steps):
        factor = min(1.0, (step + 1) / recipe.warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))
        for optimiser, lr in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr * factor
        ids, labels = next(data)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimiser, _ in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        losses += loss.item()
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            seconds = time.monotonic() - started
            left = seconds / (step + 1) * (recipe.steps - step - 1)
            report(f"step {step + 1}/{recipe.steps}  loss {losses / every:.4f}  {seconds:.0f} s, {left:.0f} s left")
            losses = 0.0
    return model.eval()
