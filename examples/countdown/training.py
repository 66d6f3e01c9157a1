"""Supervised training of a small Qwen3 on random solution traces, in plain torch.

Letters: B rows of a batch, L tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Qwen3ForCausalLM

from eopd.examples.countdown import task
from eopd.examples.countdown.tokenizer import END, ID, PAD, TURN_END, VOCABULARY, encode
from eopd.examples.small_models import IGNORED, Optimisers, SmallModel, StepReport, new_model


@dataclass(frozen=True, kw_only=True)
class Recipe(SmallModel):
    """How one of the two models is made. ``chat``: half of the rows are rendered by the chat template."""

    chat: bool
    batch: int = 256
    four_numbers: float = 0.6  # share of rows with four numbers, the rest have three


TEACHER = Recipe(layers=4, width=128, heads=4, kv_heads=2, feed_forward=384, steps=1500, chat=True)
STUDENT = Recipe(layers=3, width=96, heads=3, kv_heads=3, feed_forward=256, steps=250, chat=False)


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
    stops = [ID[END], ID[TURN_END]] if recipe.chat else [ID[END]]
    model = new_model(recipe, vocabulary=len(VOCABULARY), positions=256, pad_id=ID[PAD], stop_ids=stops, seed=seed)
    optimisers = Optimisers(model, recipe)
    data = batches(recipe, rules, seed + 1)
    progress = StepReport(recipe.steps, every, report)
    for step in range(recipe.steps):
        ids, labels = next(data)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()  # type: ignore[no-untyped-call]
        optimisers.step(step)
        progress.add(step, loss.item())
    return model.eval()
