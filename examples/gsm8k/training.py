"""Training small language models on GSM8K text from scratch: plain torch, float32, resumable, deterministic.

Letters: B rows of a batch, L tokens of its longest row.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

IGNORED = -100
POOL = 32
"""Batches whose rows are sorted by length together: little padding, and still batches of mixed content."""


@dataclass(frozen=True)
class Recipe:
    """How one of the two models is made."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    feed_forward: int
    steps: int
    batch: int = 16  # texts a step
    matrix_lr: float = 0.02  # Muon, for the matrices of the layers
    other_lr: float = 5e-3  # AdamW, for embeddings and norms
    warmup: int = 50


TEACHER = Recipe(layers=4, width=256, heads=8, kv_heads=4, feed_forward=640, steps=1200)
STUDENT = Recipe(layers=3, width=128, heads=4, kv_heads=4, feed_forward=384, steps=300)


def new_model(recipe: Recipe, vocabulary: int, stop_id: int, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised model; head_dim is 32 because vLLM's CPU attention has no 24."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=32,
        max_position_embeddings=1024,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        pad_token_id=stop_id,
        bos_token_id=None,
        eos_token_id=stop_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = stop_id
    model.generation_config.pad_token_id = stop_id
    return model


def batch_of(texts: Sequence[Sequence[int]], step: int, batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of ``step``: ids [B, L] and labels [B, L], IGNORED on padding. A function of its arguments alone.

    Every epoch is a new order; within ``POOL`` batches the rows are sorted by length, and the batches shuffled.
    """
    per_epoch = len(texts) // batch
    if not per_epoch:
        raise ValueError(f"{len(texts)} texts are fewer than a batch of {batch}")
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(texts))
    pool, inside = divmod(place, POOL)
    rows = order[pool * POOL * batch : min((pool + 1) * POOL, per_epoch) * batch]
    rows = rows[np.argsort([len(texts[row]) for row in rows], kind="stable")].reshape(-1, batch)
    chosen = rows[np.random.default_rng([seed, epoch, pool]).permutation(len(rows))[inside]]
    return padded([texts[row] for row in chosen])


def padded(texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, L] (0 where there is nothing) and labels [B, L] (IGNORED there)."""
    width = max(len(text) for text in texts)
    ids = np.zeros((len(texts), width), np.int64)
    labels = np.full((len(texts), width), IGNORED, np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = labels[row, : len(text)] = text
    return torch.from_numpy(ids), torch.from_numpy(labels)


def token_losses(model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B, L - 1] cross-entropy of the next token, nats; 0 on padding."""
    logits = model(input_ids=ids, use_cache=False).logits
    flat = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(len(ids), -1)


class Optimisers:
    """Muon for the matrices of the layers, AdamW for the rest, one schedule for both."""

    def __init__(self, model: Qwen3ForCausalLM, recipe: Recipe) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        self.recipe = recipe
        self.all: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), recipe.matrix_lr),
            (torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0), recipe.other_lr),
        ]

    def step(self, step: int) -> None:
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


def train(
    recipe: Recipe,
    texts: Sequence[Sequence[int]],
    vocabulary: int,
    stop_id: int,
    seed: int,
    state: Path,
    report: Callable[[str], None],
    every: int = 100,
) -> Qwen3ForCausalLM:
    """Train from scratch, or on from ``state`` where an interrupted run of the same recipe on the same texts left it.

    Writes ``state`` every ``every`` steps (whole or not at all) and reports one line; an interruption changes nothing
    of the result.
    """
    model = new_model(recipe, vocabulary, stop_id, seed)
    optimisers = Optimisers(model, recipe)
    made_of = fingerprint(recipe, texts, vocabulary, seed)
    first, losses = 0, 0.0
    if state.exists():
        found = torch.load(state, weights_only=True)
        if found["made_of"] == made_of:
            model.load_state_dict(found["model"])
            optimisers.load(found["optimisers"])
            first = int(found["step"])
            report(f"goes on from step {first}")
    started = time.monotonic()
    for step in range(first, recipe.steps):
        ids, labels = batch_of(texts, step, recipe.batch, seed)
        loss = token_losses(model, ids, labels).sum() / (labels[:, 1:] != IGNORED).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimisers.step(step)
        losses += loss.item()
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            seconds = time.monotonic() - started
            left = seconds / (step + 1 - first) * (recipe.steps - step - 1)
            count = step + 1 - max(first, step // every * every)
            report(f"step {step + 1}/{recipe.steps}  loss {losses / count:.4f}  {seconds:.0f} s, {left:.0f} s left")
            losses = 0.0
            states = {"model": model.state_dict(), "optimisers": optimisers.state()}
            save_state(state, {"step": step + 1, "made_of": made_of, **states})
    return model.eval()


def fingerprint(recipe: Recipe, texts: Sequence[Sequence[int]], vocabulary: int, seed: int) -> str:
    """What a state can be continued with."""
    content = json.dumps([asdict(recipe), vocabulary, seed, [list(text) for text in texts]])
    return hashlib.sha256(content.encode()).hexdigest()


def save_state(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".new")
    torch.save(content, temporary)
    os.replace(temporary, path)


@torch.inference_mode()
def mean_losses(
    model: Qwen3ForCausalLM, texts: Sequence[Sequence[int]], prompts: Sequence[int], batch: int = 32
) -> tuple[float, float]:
    """(prompt tokens, response tokens): mean cross-entropy in nats; ``prompts`` are the lengths of the prompts."""
    sums, counts = [0.0, 0.0], [0, 0]
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    for low in range(0, len(order), batch):
        rows = order[low : low + batch]
        ids, labels = padded([texts[row] for row in rows])
        losses = token_losses(model, ids, labels)
        place = torch.arange(1, ids.shape[1])
        response = place >= torch.tensor([prompts[row] for row in rows])[:, None]
        real = labels[:, 1:] != IGNORED
        for side, mask in enumerate((real & ~response, real & response)):
            sums[side] += float(losses[mask].double().sum())
            counts[side] += int(mask.sum())
    return sums[0] / max(counts[0], 1), sums[1] / max(counts[1], 1)
