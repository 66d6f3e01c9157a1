"""A small training job on stored rollouts and scores of tiny models, in this process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eopd.stages.job import ModelRef, NullProgress
from eopd.stages.models.lm_head import lm_head_of
from eopd.stages.models.loading import load_model
from eopd.stages.models.packing import Sequence, final_hidden, pack
from eopd.stages.score.run import run as score
from eopd.stages.train.job import TrainJob
from eopd.stages.train.settings import TrainSettings
from eopd.storage.artifacts import Artifact
from eopd.storage.identity import Identity
from eopd.storage.paths import METRICS_FILE, WEIGHTS
from tests.stages.score_case import STOPS, random_responses, rollouts, score_job
from tests.stages.tiny_models import save_teacher

RESPONSES = 8


def make_world(folder: Path, student: str = "qwen3") -> None:
    """``student`` and ``teacher`` model folders, and a store with 8 responses in 2 parts and their scores."""
    save_teacher("qwen3", folder / "teacher", seed=0)
    save_teacher(student, folder / "student", seed=1)
    rows = random_responses(RESPONSES, seed=3, most=12)
    source = rollouts(folder / "store", [rows[:5], rows[5:]])
    score(score_job(folder / "store", folder / "teacher", source))


def train_job(folder: Path, name: str, **changes: Any) -> TrainJob:
    """Four steps over two epochs. ``changes`` are settings, unless they name a field of the job."""
    fields = {field: changes.pop(field) for field in list(changes) if field in TrainJob.__dataclass_fields__}
    store = folder / "store"
    source = Artifact(store, Identity("rollouts", 1, 2, settings={"name": "r"}))
    scores = score_job(store, folder / "teacher", source).output
    optimizer = {"lr": 1e-3, "schedule": "constant", **changes.pop("optimizer", {})}
    defaults = {"batch_responses": 4, "epochs": 2, "device": "cpu", "cpu_threads": 1, "checkpoint_every_steps": 1}
    job = TrainJob(
        output=Artifact(store, Identity("checkpoints", 1, 2, {"name": name})),
        progress_states=Artifact(store, Identity("progress", 1, 1000, {"name": name})),
        student=ModelRef(str(folder / "student"), fingerprint="student"),
        previous=None,
        rollouts=source,
        scores=(scores,),
        settings=TrainSettings.model_validate({**defaults, "optimizer": optimizer, **changes}),
        round=0,
        total_steps=4,
        first_step=0,
        seed=7,
        temperature=1.0,
        truncated_rollouts=False,
        student_stop_ids=STOPS[:1],
        teacher_stop_ids=STOPS[1:],
        progress=NullProgress(),
        run_dir=folder / "runs" / name,
    )
    return replace(job, **fields)


class Killed(Exception):
    """Stands for the end of the process."""


class KillAfter(NullProgress):
    """Ends the job when the bar has been moved ``steps`` times; the round-start pass and resuming count."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, n: int, **figures: float) -> None:
        if figures:
            self.left -= 1
        if self.left < 0:
            raise Killed


def logits_of(folder: Path) -> np.ndarray[Any, Any]:
    """Logits of one fixed sequence under the model in ``folder``."""
    model = load_model(ModelRef(str(folder)))
    (packed,) = pack([Sequence([5, 6, 7], [11, 12, 13, 14])], 64)
    with torch.no_grad():
        return lm_head_of(model).logits(final_hidden(model, packed)).numpy()


def part_bytes(artifact: Artifact, part: int) -> dict[str, bytes]:
    """File name -> content of a committed part."""
    folder = artifact.part_folder(part)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_rows(job: TrainJob) -> list[dict[str, Any]]:
    """Figures of every step, from the finished checkpoint."""
    text = (job.output.part_folder(WEIGHTS) / METRICS_FILE).read_text()
    return [json.loads(line) for line in text.splitlines()]
