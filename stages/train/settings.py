"""Settings of the train stage."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from eopd.stages.settings import COUNT, ENTRIES, FACTOR, LENGTH, PROCESSES, THREADS, Settings, setting
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.storage.errors import InputError, installing, is_installed

# -- schedule ---------------------------------------------------------------------------------------------------------

# Learning rate and training order as pure functions, so that resuming needs no state for either.


def learning_rate(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """Return the learning rate of 0-based optimiser ``step`` of ``total_steps`` (over all rounds if they carry
    over)."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    span = max(1, total_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else 1 - progress
    return settings.lr * (settings.final + (1 - settings.final) * falling)


def steps_per_round(responses: int, batch_responses: int, epochs: int) -> int:
    return epochs * math.ceil(responses / batch_responses)


def batch_of_step(responses: int, batch_responses: int, step: int, *, seed: int, round_: int) -> tuple[int, list[int]]:
    """Return (epoch, response numbers) of 0-based ``step`` within a round, from the arguments alone."""
    per_epoch = math.ceil(responses / batch_responses)
    epoch, within = divmod(step, per_epoch)
    order = np.random.default_rng([seed, round_, epoch]).permutation(responses)
    return epoch, order[within * batch_responses : (within + 1) * batch_responses].tolist()


# -- settings ---------------------------------------------------------------------------------------------------------

TrainedTokens = Literal["all", "own", "after_text"]
Tracker = Literal["wandb", "trackio"]
Value = bool | Annotated[int, Field(ge=-(2**63), lt=2**63)] | Annotated[float, Field(ge=-1e300, le=1e300)] | str
PerPrompt = Annotated[int, Field(ge=1, le=COUNT)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Settings):
    lr: float = setting(3e-6, "Peak learning rate of AdamW (paper: 3e-6).", gt=0, le=1000.0)
    schedule: Literal["cosine", "linear", "constant"] = setting(
        "cosine", "Shape of the learning rate after warm-up, over all rounds; cosine and linear end at `lr * final`."
    )
    final: float = setting(0.0, "Learning rate at the end, as a fraction of `lr`.", ge=0, le=1)
    warmup_steps: int = setting(0, "Optimiser steps of linear warm-up, at the start of round 0.", ge=0, le=COUNT)
    betas: tuple[Decay, Decay] = setting((0.9, 0.999), "AdamW's decay rates.")
    eps: float = setting(1e-8, "AdamW's epsilon.", gt=0, le=1.0)
    weight_decay: float = setting(0.0, "Decoupled weight decay of matrices; vectors have none.", ge=0, le=1000.0)
    max_grad_norm: float = setting(1.0, "Gradients are scaled down to this global norm; 0: never.", ge=0, le=FACTOR)
    carry_over: bool = setting(
        True,
        "Moments and schedule carry on from round to round (with lora the schedule alone: adapters are new); "
        "false: each starts anew.",
    )


class LoraSettings(Settings):
    rank: int = setting(16, "Rank of the adapters.", ge=1, le=ENTRIES)
    alpha: float = setting(32.0, "Scale of the adapters: alpha / rank.", gt=0, le=FACTOR)
    target_modules: tuple[str, ...] | Literal["all-linear"] = setting(
        "all-linear", "Linear layers that get an adapter, by the end of their names; the LM head never does."
    )

    @field_validator("target_modules")
    @classmethod
    def _names_something(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        if not value:
            raise ValueError("names no module: there would be nothing to train")
        return value


class StalenessSettings(Settings):
    """Weights of responses that an older policy sampled (`lag`, `refresh`); fresh ones always weigh 1."""

    half_life_rounds: float | None = setting(
        None,
        "A response weighs 2^(-age / this); age: rounds since its policy was the student. None: 1.",
        gt=0,
        le=FACTOR,
    )
    max_kl: float | None = setting(
        None,
        "A response weighs at most this over its KL, nats a token: how far the student at the round's start is from "
        "the policy that sampled it (k1 estimate over the response). None: 1.",
        gt=0,
        le=FACTOR,
    )


class WeightSettings(Settings):
    """Weights of the loss by the position in the response."""

    kind: Literal["linear", "head"] = setting(
        ..., "linear: from `start` at the first token to `end` at the last; head: the first `fraction` of the tokens."
    )
    start: float | None = setting(None, "With linear: weight of the first token.", ge=0, le=FACTOR)
    end: float | None = setting(None, "With linear: weight of the last token.", ge=0, le=FACTOR)
    fraction: float | None = setting(
        None, "With head: this share of the response's tokens, rounded up, weighs 1, and the others 0.", gt=0, lt=1
    )

    @model_validator(mode="after")
    def _its_own_numbers_are_given(self) -> WeightSettings:
        own = {"linear": ("start", "end"), "head": ("fraction",)}[self.kind]
        missing = [name for name in own if getattr(self, name) is None]
        if missing:
            raise InputError(
                f"kind {self.kind} needs {' and '.join(missing)}, which have no default", setting=missing[0]
            )
        others = [name for name in ("start", "end", "fraction") if name not in own and getattr(self, name) is not None]
        if others:
            raise InputError(
                f"kind {self.kind} does not use {' or '.join(others)}: it takes {' and '.join(own)}", setting=others[0]
            )
        if self.kind == "linear" and self.start == self.end:
            raise InputError(
                f"start and end are both {self.start:g}: every token would weigh the same",
                setting="start",
                remedy="Set weights to null, or change one of them",
            )
        return self

    def semantic(self) -> dict[str, Any]:
        """Return the kind and its own numbers."""
        return {name: value for name, value in super().semantic().items() if value is not None}


class SelectSettings(Settings):
    """Selection of a round's responses for training. Rollouts and scores cover all of them."""

    verdict: Literal["any", "right", "wrong"] = setting(
        "any", "Responses that `prompts.verifier` judges so. right or wrong: the round's rollouts are judged."
    )
    per_prompt: Literal["all", "first"] | PerPrompt = setting(
        "all",
        "Responses to each prompt, of those that the other settings leave: all, the first (by sample number), or a "
        "number: the first that many.",
    )
    where: dict[str, tuple[Value, ...]] = setting(
        {},
        "Prompts with one of these values in each of these columns of the prompts' file, such as {topic: [algebra]}.",
    )

    @field_validator("per_prompt", mode="before")
    @classmethod
    def _is_a_number(cls, value: object) -> object:
        if value not in ("all", "first") and (type(value) is not int or value < 1):
            raise ValueError("expected all, first, or a whole number from 1")
        return value

    @field_validator("where", mode="before")
    @classmethod
    def _names_values(cls, where: object) -> object:
        for column, values in where.items() if isinstance(where, dict) else ():
            is_list = isinstance(values, (list, tuple)) and len(values) > 0
            if not is_list or not all(isinstance(value, (bool, int, float, str)) for value in values):
                raise ValueError(f"{column}: expected a list of texts, numbers, or true and false, such as [algebra]")
        return where

    @property
    def is_everything(self) -> bool:
        return self.verdict == "any" and self.most_per_prompt is None and not self.where

    @property
    def most_per_prompt(self) -> int | None:
        """Responses to one prompt at most; None: any number."""
        match self.per_prompt:
            case "all":
                return None
            case "first":
                return 1
            case number:
                return number

    def semantic(self) -> dict[str, Any]:
        """Equal for settings that select the same."""
        where = {column: sorted(set(map(json.dumps, values))) for column, values in self.where.items()}
        return {"verdict": self.verdict, "per_prompt": self.most_per_prompt, "where": where}


class TrainSettings(Settings):
    objective: ObjectiveSettings = setting(ObjectiveSettings, "The loss.")
    select: SelectSettings = setting(SelectSettings, "Which responses are trained on.")
    tokens: TrainedTokens | None = setting(
        None,
        "Which tokens of a response are trained on. all; own: those that the student sampled as itself, and with "
        "rollout.source: prefix the teacher's by prefix_beta; after_text: those after the phrase of "
        "rollout.source: revise. None: own if the source is student, prefix or revise, else all.",
    )
    epochs: int = setting(1, "Passes over a round's responses.", ge=1, le=100_000)
    batch_responses: int = setting(
        32, "Responses of one optimiser step, over all processes (paper: 32).", ge=1, le=COUNT
    )
    optimizer: OptimizerSettings = setting(OptimizerSettings, "AdamW and its schedule.")
    lora: LoraSettings | None = setting(None, "Train low-rank adapters instead of all weights.")
    ema: float | None = setting(
        None,
        "Also keep an average of the weights, this decay a step; saved as `ema/` beside the optimiser's state.",
        gt=0,
        lt=1,
    )
    staleness: StalenessSettings | None = setting(
        None, "Weigh the loss of responses down that an older policy sampled. None: all weigh 1."
    )
    weights: WeightSettings | None = setting(
        None, "Weigh the loss of a token by its position in the response. None: all weigh 1."
    )
    param_dtype: Literal["float32", "bfloat16"] = setting("float32", "Precision of the trained weights.")
    autocast: Literal["no", "bf16"] = setting("no", "Precision of the forward and backward passes.")
    max_logprob_gap: float = setting(
        0.2,
        "Largest mean |log-prob of the sampler - log-prob of the trainer| at the start of a round, nats. More means "
        "wrong weights, template or temperature, and stops the run. It is not asked of rollouts of an earlier student, "
        "whose distance is real.",
        keyed=False,
        gt=0,
        le=FACTOR,
    )
    max_staleness: float | None = setting(
        None,
        "Stop when the policy's KL to the one that sampled the round exceeds this, nats a token (figure "
        "`staleness_k3`: mean of r - 1 - log r over a step's tokens, r = q/q_old). None: never.",
        keyed=False,
        gt=0,
        le=FACTOR,
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "Where to train.", keyed=False)
    cpu_threads: int | None = setting(
        None,
        "Threads of the training process on a CPU (None: torch's choice). Tiny models are fastest with 1.",
        keyed=False,
        ge=1,
        le=THREADS,
    )
    processes: int = setting(
        1, "Processes (one GPU each) that train together on this machine.", keyed=False, ge=1, le=PROCESSES
    )
    sharding: Literal["none", "fsdp"] = setting(
        "none",
        "With several processes: a copy of the student on each (none: DDP), or shards of it (fsdp: FSDP2).",
        keyed=False,
    )
    micro_batch_tokens: int = setting(
        16384,
        "Tokens of one forward pass on one device; longer batches are split and accumulated.",
        keyed=False,
        ge=1,
        le=COUNT,
    )
    row_tokens: int = setting(
        1024, "Length of a packed row; a longer sequence gets a row of its own.", keyed=False, ge=8, le=LENGTH
    )
    head_chunk_tokens: int | None = setting(
        None,
        "Rows of logits alive at once in the sparse head; None: by the vocabulary and the GPU's memory.",
        keyed=False,
        ge=1,
        le=COUNT,
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations in backward to save memory.", keyed=False)
    checkpoint_every_steps: int = setting(
        50, "Optimiser steps between resumable states; a killed job loses at most these.", keyed=False, ge=1, le=COUNT
    )
    trackers: tuple[Tracker, ...] = setting(
        (), "Trackers besides TensorBoard and metrics.jsonl: wandb, trackio (installed by you).", keyed=False
    )
    keep_checkpoints: int | None = setting(
        None,
        "Newest checkpoints whose weights stay; older ones are pruned once nothing that is to be done, in any run, "
        "reads them. None: all stay.",
        keyed=False,
        ge=1,
        le=COUNT,
    )
    keep_optimizer_states: int | None = setting(
        1,
        "Newest checkpoints whose optimiser state stays (twice the size of the weights); only the next round's "
        "training reads it. None: all stay.",
        keyed=False,
        ge=1,
        le=COUNT,
    )
    keep_progress: int = setting(1, "Resumable states kept while a round trains.", keyed=False, ge=1, le=COUNT)

    def semantic(self) -> dict[str, Any]:
        """``select`` enters keys only if it leaves something out, and ``weights`` only if it is set."""
        kept = super().semantic()
        if self.select.is_everything:
            del kept["select"]
        if self.weights is None:
            del kept["weights"]
        del kept["tokens"]  # the stage adds what they are by source, if that differs from the default
        return kept

    @model_validator(mode="after")
    def _precisions_agree(self) -> TrainSettings:
        if self.param_dtype == "bfloat16" and self.autocast == "no" and self.optimizer.lr < 1e-5:
            raise InputError(
                f"train.param_dtype bfloat16 loses updates at train.optimizer.lr {self.optimizer.lr:g} (a weight "
                "moves in steps of 0.4 %)",
                setting="train.param_dtype",
                remedy="keep float32 weights and autocast: bf16",
            )
        return self

    @model_validator(mode="after")
    def _averages_have_a_meaning(self) -> TrainSettings:
        if self.ema is not None and self.lora is not None:
            raise InputError(
                f"train.ema={self.ema:g} with train.lora is refused: every round begins with new adapters, of which "
                "no average over the rounds exists",
                setting="train.ema",
                remedy="unset one of them",
            )
        return self


def require_extras(settings: TrainSettings) -> None:
    """Raise ValueError naming the first package that is not installed, the setting that needs it and the remedy."""
    if settings.lora is not None and not is_installed("peft"):
        raise InputError(
            "train.lora needs peft, which is not installed",
            setting="train.lora",
            remedy=f"To add it, {installing('peft')}; or unset train.lora",
        )
    for name in settings.trackers:
        if not is_installed(name):
            raise InputError(
                f"train.trackers names {name!r}, which is not installed",
                setting="train.trackers",
                remedy=f"To add it, {installing('trackers')}; or leave it out (TensorBoard and metrics.jsonl are "
                "written anyway)",
            )
