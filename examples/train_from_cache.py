"""Train with a plain transformers.Trainer from a teacher cache. Of this project it uses `eopd.storage` only.

    python examples/train_from_cache.py --store store --scores scores/<key> --student FOLDER --output trained

The scores are found by key (`--scores`; needed only where the store holds several); the rollouts that they belong to
are in the scores' identity. The loss of a token is its forward KL to the teacher, up to a constant, unbiased over the
draws:

    - sum_head p log q - c sum_draws log q

with the teacher's true probabilities p for the head, and the cache's draw weight c for every draw beyond it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.listing import find
from eopd.storage.needs import DrawsNeed
from eopd.storage.rollouts import read_rollouts
from eopd.storage.sources import filled_parts
from eopd.storage.teacher_cache import TeacherCache


class Scored(Dataset[tuple[int, int]]):
    """Responses with at least one scored token, as (part, row): what a batch is read by."""

    def __init__(self, cache: TeacherCache) -> None:
        counts = {part: cache.token_counts(part) for part in filled_parts(cache.artifact)}
        self.places = [(part, int(row)) for part, found in counts.items() for row in np.flatnonzero(found)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.places[index]


class Collator:
    """(part, row)s -> padded ids, and the support of every response token with its target probability.

    ``position`` [N] is where in the flattened batch [B * L] the student predicts the token of support entry n;
    ``support`` [N] its id; ``target`` [N] its weight. One ``cache.read`` serves the batch.
    """

    def __init__(self, cache: TeacherCache, rollouts: Artifact) -> None:
        self.cache = cache
        self.rollouts = rollouts
        self.prompts: dict[int, Any] = {}

    def _prompt(self, part: int, row: int) -> list[int]:
        if part not in self.prompts:
            table = read_rollouts(self.rollouts.part_folder(part), ["prompt_token_ids"])
            self.prompts[part] = table["prompt_token_ids"].to_pylist()
        found: list[int] = self.prompts[part][row]
        return found

    def __call__(self, places: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        rows = self.cache.read(places)
        weight = self.cache.coverage.head.min_prob
        prompts = [self._prompt(part, row) for part, row in places]
        lengths = np.diff(rows.response_offsets)
        width = max(len(prompt) + int(length) for prompt, length in zip(prompts, lengths, strict=True))
        ids = np.zeros((len(places), width), np.int64)
        mask = np.zeros((len(places), width), np.int64)
        at = np.zeros(rows.tokens, np.int64)
        for b, prompt in enumerate(prompts):
            low, high = rows.response_offsets[b : b + 2]
            end = len(prompt) + int(high - low)
            ids[b, :end] = [*prompt, *rows.token_ids[low:high]]
            mask[b, :end] = 1
            at[low:high] = b * width + np.arange(len(prompt) - 1, end - 1)  # a token is predicted from the one before
        position = [np.repeat(at, np.diff(offsets)) for offsets in (rows.head_offsets, rows.draw_offsets)]
        target = [np.exp(rows.head_logprobs), np.full(len(rows.draw_ids), weight, np.float32)]
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "position": torch.from_numpy(np.concatenate(position)),
            "support": torch.from_numpy(np.concatenate([rows.head_ids, rows.draw_ids]).astype(np.int64)),
            "target": torch.from_numpy(np.concatenate(target).astype(np.float32)),
            "tokens": torch.tensor(rows.tokens),
        }


class CacheTrainer(Trainer):
    """A Trainer whose loss is the forward KL to the cached teacher."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        logits = output.logits.float().flatten(0, 1)
        logprobs = logits[inputs["position"], inputs["support"]] - logits.logsumexp(dim=-1)[inputs["position"]]
        loss = -(inputs["target"] * logprobs).sum() / inputs["tokens"]
        return (loss, output) if return_outputs else loss


def train(store: Path, scores: str, student: str, output: Path, steps: int, batch: int, rate: float) -> list[float]:
    """Train and save; returns the logged losses, nats a token."""
    artifact = find(store, scores)
    rollouts = open_artifact(store, "rollouts", artifact.identity.inputs["rollouts"])
    cache = TeacherCache(artifact)
    cache.require([DrawsNeed("beyond_head")])
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        logging_steps=max(steps // 10, 1),
        report_to=[],
        dataloader_pin_memory=False,
        remove_unused_columns=False,  # the batch's own columns are no arguments of the model
        save_strategy="no",
    )
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, use_safetensors=True)
    trainer = CacheTrainer(
        model=model, args=arguments, train_dataset=Scored(cache), data_collator=Collator(cache, rollouts)
    )
    trainer.train()
    trainer.save_model(str(output))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--scores", default="scores/", help="key of the scores, or its beginning")
    parser.add_argument("--student", required=True, help="a model folder or hub id with the rollouts' tokenizer")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-4)
    chosen = vars(parser.parse_args())
    losses = train(**chosen)
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} nats a token (up to a constant)")


if __name__ == "__main__":
    main()
