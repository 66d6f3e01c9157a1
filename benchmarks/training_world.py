"""A small world to train in: a teacher, a student, random rollouts, and scores that the score stage made of them.

Every sequence has the same length, so that no side of a comparison computes padding. The teacher's final norm is scaled
(``teacher_logit_std``), so that a random model is sure of some tokens and not of others, as a trained one is.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from eopd.stages.job import ModelRef, NullProgress
from eopd.stages.models.loading import no_progress_bars
from eopd.stages.score.responses import ScoreJob
from eopd.stages.score.run import run as score
from eopd.stages.score.settings import ScoreSettings
from eopd.stages.train.job import TrainJob
from eopd.stages.train.settings import TrainSettings
from eopd.storage.artifacts import Artifact
from eopd.storage.identity import Identity
from eopd.storage.records import write_rollouts

TOKENIZER = Path(__file__).parent.parent / "examples" / "countdown" / "teacher"
STOP_ID = 1
SEED = 7


@dataclass(frozen=True)
class Shape:
    """Sizes of the models, the data and the steps, and how the student is trained."""

    vocab: int = 32_000
    hidden: int = 256
    heads: int = 4
    key_value_heads: int = 2
    head_dim: int = 64
    mlp: int = 768
    teacher_layers: int = 12
    student_layers: int = 3
    prompt_tokens: int = 16
    response_tokens: int = 112
    batch_responses: int = 8
    steps: int = 13
    lr: float = 1e-4
    teacher_logit_std: float = 7.0
    head: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "fkl", "support": "sampled"})

    @property
    def responses(self) -> int:
        return self.steps * self.batch_responses

    @property
    def tokens_per_step(self) -> int:
        return self.batch_responses * self.response_tokens


def save_model(folder: Path, given: Shape, layers: int, logit_std: float, seed: int) -> None:
    config = Qwen3Config(
        vocab_size=given.vocab,
        hidden_size=given.hidden,
        intermediate_size=given.mlp,
        num_hidden_layers=layers,
        num_attention_heads=given.heads,
        num_key_value_heads=given.key_value_heads,
        head_dim=given.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=STOP_ID,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # a normed state has length sqrt(hidden), an embedding an entry of initializer_range
        model.model.norm.weight.fill_(logit_std / (config.initializer_range * given.hidden**0.5))
    with no_progress_bars():
        model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TOKENIZER / name, folder / name)


def make_rollouts(store: Path, given: Shape) -> Artifact:
    """Random prompts and responses, one part."""
    rng = np.random.default_rng(SEED)
    rows = [
        {
            "prompt_id": f"p{number}",
            "prompt_index": number,
            "sample": 0,
            "prompt_token_ids": rng.integers(2, given.vocab, given.prompt_tokens).tolist(),
            "response_token_ids": rng.integers(2, given.vocab, given.response_tokens).tolist(),
            "finish_reason": "length",
            "seed": number,
        }
        for number in range(given.responses)
    ]
    artifact = Artifact(store, Identity("rollouts", 1, 1, {"benchmark": asdict(given)}))
    with artifact.write_part(0) as folder:
        write_rollouts(folder, rows)
    return artifact


def make_scores(store: Path, teacher: Path, rollouts: Artifact, given: Shape) -> Artifact:
    settings = ScoreSettings.model_validate({"engine": "transformers", "head": given.head})
    output = Artifact(store, Identity("scores", 1, 1, {"of": rollouts.key}, coverage=settings.coverage()))
    job = ScoreJob(
        output=output,
        parts=range(1),
        settings=settings,
        progress=NullProgress(),
        log_dir=store / "logs",
        rollouts=rollouts,
        teacher=ModelRef(str(teacher), fingerprint="teacher"),
        student_tokenizer=str(teacher),
        stop_ids=(STOP_ID,),
        rollout_temperature=1.0,
    )
    score(job)
    return output


@dataclass(frozen=True)
class World:
    """Where everything of one comparison lies."""

    folder: Path
    given: Shape
    rollouts: Artifact
    scores: Artifact

    @property
    def student(self) -> Path:
        return self.folder / "student"

    def model(self, name: str) -> PreTrainedModel:
        with no_progress_bars():
            model: PreTrainedModel = Qwen3ForCausalLM.from_pretrained(
                self.folder / name, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True
            )
        return model


@contextmanager
def make_world(given: Shape) -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="eopd-training-") as name:
        folder = Path(name)
        save_model(folder / "teacher", given, given.teacher_layers, given.teacher_logit_std, seed=0)
        save_model(folder / "student", given, given.student_layers, 1.0, seed=1)
        rollouts = make_rollouts(folder / "store", given)
        yield World(folder, given, rollouts, make_scores(folder / "store", folder / "teacher", rollouts, given))


class StepClock(NullProgress):
    """Notes when each optimiser step was done."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def advance(self, n: int, **figures: float) -> None:
        if figures:
            self.at.append(time.perf_counter())


def train_settings(given: Shape) -> TrainSettings:
    return TrainSettings.model_validate(
        {
            "objective": given.objective,
            "batch_responses": given.batch_responses,
            "optimizer": {"lr": given.lr, "schedule": "constant"},
            "cpu_threads": torch.get_num_threads(),
            "row_tokens": given.prompt_tokens + given.response_tokens - 1,
            "checkpoint_every_steps": 10**6,
        }
    )


def train_job(where: World, name: str, clock: StepClock) -> TrainJob:
    store = where.folder / "store"
    return TrainJob(
        output=Artifact(store, Identity("checkpoints", 1, 2, {"name": name})),
        progress_states=Artifact(store, Identity("progress", 1, 10**6, {"name": name})),
        student=ModelRef(str(where.student), fingerprint="student"),
        previous=None,
        rollouts=where.rollouts,
        scores=where.scores,
        settings=train_settings(where.given),
        round=0,
        total_steps=where.given.steps,
        first_step=0,
        seed=SEED,
        temperature=1.0,
        truncated_rollouts=False,
        student_stop_ids=(STOP_ID,),
        teacher_stop_ids=(STOP_ID,),
        progress=clock,
        run_dir=where.folder / "runs" / name,
    )
