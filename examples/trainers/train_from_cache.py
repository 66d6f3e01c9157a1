"""Train from a teacher cache with a plain transformers.Trainer, or with TRL's SFTTrainer (`--trainer trl`).

    python examples/trainers/train_from_cache.py --store store --scores scores/<key> --student FOLDER --output trained

The store is a folder or a URL (s3://..., hf://datasets/USER/NAME). The scores are found by key, which is needed only
where the store holds several; the rollouts that they belong to are in their identity. Only `eopd.storage` is imported.
The loss of a token is its forward KL to the teacher, up to a constant, unbiased over the draws:

    - sum_head p log q - c sum_draws log q

with the teacher's true probabilities p for the head, and the cache's draw weight c for every draw beyond it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from eopd.storage.artifacts import Artifact
from eopd.storage.coverage import DrawsNeed
from eopd.storage.listing import find
from eopd.storage.places import open_place
from eopd.storage.records import read_rollouts
from eopd.storage.sources import filled_parts
from eopd.storage.stacked import open_files
from eopd.storage.teacher_cache import TeacherCache


def responses(cache: TeacherCache) -> list[dict[str, int]]:
    """List the responses with at least one scored token by part and row, by which ``Collator`` reads them."""
    counts = {part: cache.token_counts(part) for part in filled_parts(cache.artifact)}
    return [{"part": part, "row": int(row)} for part, lengths in counts.items() for row in np.flatnonzero(lengths)]


class Collator:
    """Rows of ``responses`` -> padded ids, and the support of every response token with its target probability.

    ``position`` [N] is where in the flattened batch [B * L] the student predicts the token of support entry n;
    ``support`` [N] its id; ``target`` [N] its weight. One ``cache.read`` serves the batch.
    """

    def __init__(self, cache: TeacherCache, rollouts: Artifact) -> None:
        self.cache = cache
        self.rollouts = rollouts
        self.prompts: dict[int, list[list[int]]] = {}

    def _prompt(self, part: int, row: int) -> list[int]:
        if part not in self.prompts:
            table = read_rollouts(self.rollouts.part_folder(part), ["prompt_token_ids"])
            self.prompts[part] = table["prompt_token_ids"].to_pylist()
        return self.prompts[part][row]

    def __call__(self, examples: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        places = [(example["part"], example["row"]) for example in examples]
        rows = self.cache.read(places)
        prompts = [self._prompt(part, row) for part, row in places]
        lengths = np.diff(rows.response_offsets)
        width = max(len(prompt) + int(length) for prompt, length in zip(prompts, lengths, strict=True))
        ids = np.zeros((len(places), width), np.int64)
        labels = np.full((len(places), width), -100, np.int64)
        mask = np.zeros((len(places), width), np.int64)
        at = np.zeros(rows.tokens, np.int64)
        for b, prompt in enumerate(prompts):
            low, high = rows.response_offsets[b : b + 2]
            end = len(prompt) + int(high - low)
            ids[b, :end] = [*prompt, *rows.token_ids[low:high]]
            labels[b, len(prompt) : end] = rows.token_ids[low:high]
            mask[b, :end] = 1
            at[low:high] = b * width + np.arange(len(prompt) - 1, end - 1)  # a token is predicted from the one before
        position = [np.repeat(at, np.diff(offsets)) for offsets in (rows.head_offsets, rows.draw_offsets)]
        draw = np.full(len(rows.draw_ids), self.cache.coverage.head.min_prob, np.float32)
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),  # the trainer counts the tokens of an optimiser step in them
            "position": torch.from_numpy(np.concatenate(position)),
            "support": torch.from_numpy(np.concatenate([rows.head_ids, rows.draw_ids]).astype(np.int64)),
            "target": torch.from_numpy(np.concatenate([np.exp(rows.head_logprobs), draw])),
        }


class CacheLoss:
    """Forward KL to the cached teacher as the loss of a Trainer, averaged over the tokens of an optimiser step."""

    args: TrainingArguments
    accelerator: Any

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        logits = output.logits.float().flatten(0, 1)
        logprobs = logits[inputs["position"], inputs["support"]] - logits.logsumexp(dim=-1)[inputs["position"]]
        loss = -(inputs["target"] * logprobs).sum()
        if num_items_in_batch is None:  # not while training: evaluation
            loss = loss / inputs["labels"].ne(-100).sum()
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:  # gradients are averaged over devices, and the sum is wanted
                loss = loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss


def trainer_of(
    kind: str, rows: list[dict[str, int]], output: Path, student: str, **settings: Any
) -> tuple[type[Any], Any, dict[str, Any]]:
    """Return class, arguments and further keywords of the trainer. Both are subclassed in the same way."""
    common: dict[str, Any] = {
        "output_dir": str(output),
        "bf16": torch.cuda.is_available(),
        "report_to": [],
        "remove_unused_columns": False,  # the batch's own columns are no arguments of the model
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        **settings,
    }
    if kind == "transformers":
        return Trainer, TrainingArguments(**common), {"train_dataset": rows}
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    # the rows are tokenised: nothing is to be rendered, and cutting ids would not cut their targets
    arguments = SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
    further = {"train_dataset": Dataset.from_list(rows), "processing_class": AutoTokenizer.from_pretrained(student)}
    return SFTTrainer, arguments, further


def train(
    store: str,
    scores: str,
    student: str,
    output: Path,
    steps: int,
    batch: int,
    rate: float,
    accumulate: int = 1,
    trainer: str = "transformers",
) -> list[float]:
    """Train and save; returns the logged losses, nats a token."""
    place = open_place(store)
    artifact = find(place, scores)
    rollouts = open_files(place, "rollouts", artifact.identity.inputs["rollouts"], output / "fetched")
    cache = TeacherCache(artifact)
    cache.require([DrawsNeed("beyond_head")])
    base, arguments, further = trainer_of(
        trainer,
        responses(cache),
        output,
        student,
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        learning_rate=rate,
        logging_steps=max(steps // 10, 1),
    )
    training = type("CacheTrainer", (CacheLoss, base), {})(
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, use_safetensors=True),
        args=arguments,
        data_collator=Collator(cache, rollouts),
        **further,
    )
    training.train()
    training.save_model(str(output))
    return [entry["loss"] for entry in training.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="folder or URL of the store")
    parser.add_argument("--scores", default="scores/", help="key of the scores, or its beginning")
    parser.add_argument("--student", required=True, help="a model folder or hub id with the rollouts' tokenizer")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1, help="batches of an optimiser step")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--trainer", choices=("transformers", "trl"), default="transformers")
    losses = train(**vars(parser.parse_args()))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} nats a token (up to a constant)")


if __name__ == "__main__":
    main()
