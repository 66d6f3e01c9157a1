"""One training step with the teacher cached here against one with the teacher live there.

The peer is TRL's ``GKDTrainer`` with ``lmbda=0``: fixed responses, the teacher's forward pass in every step. Both sides
train the same 3-layer student with the same teacher of 12 layers on the same responses in the same order, in float32,
with the same AdamW (fused, constant rate, gradients clipped at 1.0), on the same threads. Every sequence has the same
length, so neither side computes padding; ours gets rows of one sequence, so nothing is packed that the peer could not
have. Ours is the whole train stage over a real Zarr cache that the score stage made (reading, decoding, figures to
TensorBoard and JSONL included); theirs is its whole ``Trainer.train`` without logging. A step lasts from the end of one
to the end of the next; medians over all steps of all repeats after the warm-up, the sides taking turns.

* ``vocab_32000``: the cache keeps heads and draws (the default rule) and the loss is ``fkl`` with ``support: sampled``;
  ``support_per_token`` is how many ids of a token the student is evaluated at.
* ``vocab_32`` (Countdown's): the cache keeps all 32 log-probs, the loss is ``fkl`` over all of them, which is TRL's
  with ``beta=0`` (its beta weighs the teacher in the mixture; 0 is KL(p || q)); both divide by the step's response
  tokens. ``loss_difference`` is the largest of the compared steps, with the teacher's log-probs as they were before
  they were stored; ``loss_difference_through_cache`` with the stored ones, which are rounded by up to 1/256 nat.

Sizes: hidden 256, 4 heads of 64, 2 key-value heads, MLP 768, tied embeddings: about Qwen3-0.6B's proportions at a
quarter of its width, so that head and layers weigh against each other as they do there while a step takes seconds on
one core. 8 responses of 112 tokens after 16 prompt tokens: TRL computes logits of the prompt too, so it is kept short.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from benchmarks.training_world import SEED, STOP_ID, Shape, StepClock, World, make_world, train_job, train_settings
from eopd.stages.models.packing import Sequence as TokenSequence
from eopd.stages.train.loop import Loop
from eopd.stages.train.metrics import means
from eopd.stages.train.objectives.registry import make_objective
from eopd.stages.train.optimizer import make_optimizer
from eopd.stages.train.responses import load_responses
from eopd.stages.train.run import run as train
from eopd.stages.train.settings import batch_of_step
from eopd.stages.train.stops import StopHandling
from eopd.stages.train.student import Student
from eopd.storage.errors import installing
from eopd.storage.jsonl import read_whole
from eopd.storage.paths import METRICS_FILE, WEIGHTS
from eopd.storage.records import read_rollouts
from eopd.storage.teacher_cache import TeacherCache
from eopd.storage.teacher_record import TeacherRows

WARM_UP = 3


@dataclass
class Curve:
    losses: list[float]
    seconds: list[float]  # of each step after the first


def whole_vocabulary(given: Shape) -> Shape:
    """The same with every log-prob stored and read, which makes the two losses one formula."""
    head = {"k_max": given.vocab, "full_head_above": -1.0, "draws": "none"}
    objective = {"name": "fkl", "support": "bucket", "k": given.vocab}
    return replace(given, head=head, objective=objective, teacher_logit_std=3.0)


# -- ours ------------------------------------------------------------------------------------------------------


def ours(where: World, name: str) -> Curve:
    clock = StepClock()
    job = train_job(where, name, clock)
    train(job)
    losses = [row["loss"] for row in read_whole(job.output.part_folder(WEIGHTS) / METRICS_FILE)]
    return Curve(losses, np.diff(clock.at).tolist())


class Unrounded(TeacherCache):
    """The cache with the live teacher's log-probs in place of the stored ones; for heads that hold the vocabulary."""

    def __init__(self, where: World) -> None:
        super().__init__(where.scores)
        teacher, self._logprobs = where.model("teacher").eval(), []
        for row in read_rollouts(where.rollouts.part_folder(0)).to_pylist():
            sequence = TokenSequence(row["prompt_token_ids"], row["response_token_ids"])
            with torch.no_grad():
                logits = teacher(input_ids=torch.tensor([[*sequence.context_ids, *sequence.response_ids]])).logits
            predicting = logits[0, len(sequence.context_ids) - 1 : -1]
            self._logprobs.append(predicting.log_softmax(dim=1).numpy())

    def read(self, responses: Sequence[tuple[int, int]]) -> TeacherRows:
        rows = super().read(responses)
        exact = np.concatenate([self._logprobs[row] for _, row in responses])
        token = np.repeat(np.arange(rows.tokens), np.diff(rows.head_offsets))
        return replace(rows, head_logprobs=exact[token, rows.head_ids])


def unrounded_losses(where: World) -> list[float]:
    """Our loop's losses on log-probs that were never stored."""
    given, settings = where.given, train_settings(where.given)
    cache, objective = Unrounded(where), make_objective(settings.objective)
    student = Student(where.model("student").train(), objective, None)
    loop = Loop(
        student,
        make_optimizer(student, settings.optimizer),
        objective,
        load_responses(where.rollouts, cache),
        cache,
        StopHandling(settings.objective.stops, (STOP_ID,), (STOP_ID,)),
        Accelerator(cpu=True),
        settings,
        seed=SEED,
        round_=0,
        first_step=0,
        total_steps=given.steps,
        temperature=1.0,
    )
    start = loop.round_start(lambda tokens: None)
    return [means(loop.take(step, start))["loss"] for step, _ in loop.steps(0, given.steps)]


# -- theirs ----------------------------------------------------------------------------------------------------


def examples_in_our_order(where: World) -> list[dict[str, Any]]:
    """The responses as both sides meet them, step after step."""
    given = where.given
    table = read_rollouts(where.rollouts.part_folder(0)).to_pylist()
    order = [
        number
        for step in range(given.steps)
        for number in batch_of_step(given.responses, given.batch_responses, step, seed=SEED, round_=0)[1]
    ]
    return [
        {
            "prompt": table[number]["prompt_id"],
            "input_ids": table[number]["prompt_token_ids"] + table[number]["response_token_ids"],
            "completion_mask": [0] * given.prompt_tokens + [1] * given.response_tokens,
        }
        for number in order
    ]


def theirs(where: World, name: str) -> Curve:
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    given = where.given
    at: list[float] = []
    losses: list[torch.Tensor] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            at.append(time.perf_counter())

    class Noting(GKDTrainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            losses.append(loss)
            return loss

    arguments = GKDConfig(
        output_dir=str(where.folder / "trl" / name),
        lmbda=0.0,
        beta=0.0,  # KL(teacher || student)
        temperature=1.0,
        per_device_train_batch_size=given.batch_responses,
        max_steps=given.steps,
        train_sampling_strategy="sequential",
        learning_rate=given.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=False,
        gradient_checkpointing=False,
        max_length=given.prompt_tokens + given.response_tokens,
        use_cpu=not torch.cuda.is_available(),
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=SEED,
    )
    trainer = Noting(
        model=where.model("student"),
        teacher_model=where.model("teacher"),
        args=arguments,
        train_dataset=Dataset.from_list(examples_in_our_order(where)),
        processing_class=AutoTokenizer.from_pretrained(where.student),
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)  # it writes to stdout
    trainer.train()
    return Curve([float(loss) for loss in losses], np.diff(at).tolist())


# -- the comparison --------------------------------------------------------------------------------------------


def compare(given: Shape, repeats: int = 2) -> dict[str, Any]:
    """Medians in seconds and their ratio; where everything is stored, also how far the losses are apart."""
    sides = {"theirs": theirs, "ours": ours}
    curves: dict[str, list[Curve]] = {name: [] for name in sides}
    with make_world(given) as where:
        rows = TeacherCache(where.scores).read_part(0)
        for repeat in range(repeats):
            for name, side in sides.items():
                curves[name].append(side(where, f"{name}-{repeat}"))
        unrounded = unrounded_losses(where) if given.head.get("k_max") == given.vocab else None
    seconds = {name: [value for curve in some for value in curve.seconds[WARM_UP:]] for name, some in curves.items()}
    middle = {name: median(values) for name, values in seconds.items()}
    result: dict[str, Any] = {
        "step_time_ratio": round(middle["theirs"] / middle["ours"], 3),
        "step_seconds": {name: round(value, 5) for name, value in middle.items()},
        "tokens_per_step": given.tokens_per_step,
        "tokens_per_s": {name: round(given.tokens_per_step / value, 1) for name, value in middle.items()},
        "steps_measured": len(seconds["ours"]),
        "support_per_token": round((len(rows.head_ids) + len(rows.draw_ids)) / rows.tokens, 2),
        "settings": asdict(given),
    }
    if unrounded is not None:
        peers = curves["theirs"][0].losses
        result["losses"] = [round(loss, 6) for loss in peers]
        result["loss_difference"] = _largest_gap(unrounded, peers)
        result["loss_difference_through_cache"] = _largest_gap(curves["ours"][0].losses, peers)
    return result


def _largest_gap(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def measure(steps: int, repeats: int) -> dict[str, Any]:
    """The figures of both vocabularies; ``step_time_ratio`` is the large one's.

    Raises:
        ValueError: TRL is not installed.
    """
    if find_spec("trl") is None:
        raise ValueError(f"the comparison needs TRL, which is not installed. To add it, {installing('peers')}")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    large = compare(Shape(steps=steps), repeats)
    small = compare(whole_vocabulary(Shape(steps=steps, vocab=32)), repeats)
    return {
        "step_time_ratio": large["step_time_ratio"],
        "loss_difference": small["loss_difference"],
        "against_trl": {"vocab_32000": large, "vocab_32": small},
    }
