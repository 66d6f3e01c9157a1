"""Train from a Parquet file of top-k log-probs, without eopd: with transformers.Trainer, or TRL's SFTTrainer.

    eopd store export scores/<key> kd.parquet --format axolotl
    python examples/trainers/train_from_export.py --data kd.parquet --student FOLDER --output trained --trainer trl

The columns are those of axolotl's KD plugin (docs/your-own.md). The loss of a token is its forward KL to the teacher,
up to a constant, with everything outside the stored entries as one entry more:

    - sum_stored p log q - (1 - sum_stored p) log (1 - sum_stored q)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

PADDING = {
    "input_ids": 0,
    "attention_mask": 0,
    "labels": -100,
    "target_token_ids": 0,
    "target_logprobs": -1e9,
    "target_mask": 0,
}
SMALLEST = 1e-6
"""Mass outside the stored entries is not read as less: its log-prob and gradient stay finite."""


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad sequences to the longest one, and lists of top-k entries to the widest one."""
    widest = max(len(example["target_mask"][0]) for example in examples)
    batch = {}
    for name, padding in PADDING.items():
        columns = [torch.tensor(example[name]) for example in examples]
        if name.startswith("target_"):
            columns = [
                torch.nn.functional.pad(column, (0, widest - column.shape[1]), value=padding) for column in columns
            ]
        batch[name] = pad_sequence(columns, batch_first=True, padding_value=padding)
    return batch


class ExportLoss:
    """Forward KL to the stored log-probs as the loss of a Trainer, averaged over the tokens of an optimiser step."""

    args: TrainingArguments
    accelerator: Any

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        described = inputs["target_mask"].bool().any(dim=-1)  # [B, L]; the list at position j is of token j + 1
        there = inputs["target_mask"][described].bool()
        logits = output.logits[described].float()
        logprobs = logits.gather(1, inputs["target_token_ids"][described].long()) - logits.logsumexp(1, keepdim=True)
        p = inputs["target_logprobs"][described].float().exp() * there
        rest = (1 - p.sum(1)).clamp(min=0)
        rest_of_student = (1 - (logprobs.exp() * there).sum(1)).clamp(min=SMALLEST)
        loss = -((p * logprobs).sum(1) + rest * rest_of_student.log()).sum()
        if num_items_in_batch is None:  # not while training: evaluation
            loss = loss / described.sum()
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:  # gradients are averaged over devices, and the sum is wanted
                loss = loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss


def train(
    data: Path, student: str, output: Path, steps: int, batch: int, rate: float, trainer: str = "transformers"
) -> list[float]:
    """Train and save; returns the logged losses, nats a token."""
    common: dict[str, Any] = {
        "output_dir": str(output),
        "bf16": torch.cuda.is_available(),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": rate,
        "logging_steps": max(steps // 10, 1),
        "report_to": [],
        "remove_unused_columns": False,  # the targets are no arguments of the model
        "dataloader_pin_memory": False,
        "save_strategy": "no",
    }
    sequences: Dataset = load_dataset(
        "parquet", data_files=str(data), split="train", cache_dir=str(output / "datasets")
    )
    base: type[Any] = Trainer
    further: dict[str, Any] = {"args": TrainingArguments(**common)} if trainer == "transformers" else {}
    if trainer == "trl":
        from trl import SFTConfig, SFTTrainer

        base = SFTTrainer
        # the rows are tokenised: nothing is to be rendered, and cutting ids would not cut their targets
        further["args"] = SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
        further["processing_class"] = AutoTokenizer.from_pretrained(student)
    training = type("ExportTrainer", (ExportLoss, base), {})(
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, use_safetensors=True),
        train_dataset=sequences,
        data_collator=collate,
        **further,
    )
    training.train()
    training.save_model(str(output))
    return [entry["loss"] for entry in training.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the exported file")
    parser.add_argument("--student", required=True, help="a model folder or hub id with the same tokenizer")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--trainer", choices=("transformers", "trl"), default="transformers")
    losses = train(**vars(parser.parse_args()))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} nats a token (up to a constant)")


if __name__ == "__main__":
    main()
