"""Training small language models on GSM8K text from scratch: plain torch, float32, resumable, deterministic.

Letters: B rows of a batch, L tokens of its longest row.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Qwen3ForCausalLM

from eopd.examples.small_models import IGNORED, Optimisers, SmallModel, StepReport, new_model

POOL = 32
"""Batches whose rows are sorted by length together: little padding, and still batches of mixed content."""


@dataclass(frozen=True, kw_only=True)
class Recipe(SmallModel):
    """How one of the two models is made."""

    batch: int = 16


TEACHER = Recipe(layers=4, width=256, heads=8, kv_heads=4, feed_forward=640, steps=1200)
STUDENT = Recipe(layers=3, width=128, heads=4, kv_heads=4, feed_forward=384, steps=300)


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
    model = new_model(recipe, vocabulary=vocabulary, positions=1024, pad_id=stop_id, stop_ids=[stop_id], seed=seed)
    optimisers = Optimisers(model, recipe)
    made_of = fingerprint(recipe, texts, vocabulary, seed)
    first = 0
    if state.exists():
        loaded = torch.load(state, weights_only=True)
        if loaded["made_of"] == made_of:
            model.load_state_dict(loaded["model"])
            optimisers.load(loaded["optimisers"])
            first = int(loaded["step"])
            report(f"goes on from step {first}")
    progress = StepReport(recipe.steps, every, report, first)
    for step in range(first, recipe.steps):
        ids, labels = batch_of(texts, step, recipe.batch, seed)
        loss = token_losses(model, ids, labels).sum() / (labels[:, 1:] != IGNORED).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimisers.step(step)
        if progress.add(step, loss.item()):
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
