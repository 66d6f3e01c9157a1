"""A step that stops training: its error, and all inputs of the step, saved for inspection.

<run>/failures/round-R-step-S/failure.json     seed, settings, figures, which tensors are not finite, where to start
<run>/failures/round-R-step-S/responses.jsonl  the step's responses: token ids, and where their teacher rows are
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from eopd.stages.train.job import TrainJob
from eopd.stages.train.responses import Responses
from eopd.stages.train.states import States, write_jsonl
from eopd.storage.errors import UserError
from eopd.storage.files import fsync_folder, fsync_tree, naming_full_disks

FAILURE_FILE = "failure.json"
RESPONSES_FILE = "responses.jsonl"
NAMES_KEPT = 50  # of tensors: after an overflow all of a model's are broken


class TrainingStopped(UserError, RuntimeError):
    """Training cannot continue: the message says where and why. Nothing committed is lost.

    ``figures``: numbers of a step that broke, for its reproduction; ``folder``: where that was saved.
    """

    def __init__(
        self,
        problem: str,
        *,
        remedy: str = "",
        setting: str | None = None,
        step: int | None = None,
        responses: Sequence[str] = (),
        figures: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__(problem, remedy=remedy, setting=setting)
        self.step = step
        self.responses = tuple(responses)
        self.figures = figures
        self.folder = folder


def broken_tensors(module: nn.Module) -> dict[str, list[str]]:
    """Return names of the first parameters (``weights``) and gradients that are not finite; for shards, this
    process's."""
    weights, gradients = [], []
    for name, parameter in module.named_parameters():
        if not _is_finite(parameter):
            weights.append(name)
        if parameter.grad is not None and not _is_finite(parameter.grad):
            gradients.append(name)
    return {"weights": weights[:NAMES_KEPT], "gradients": gradients[:NAMES_KEPT]}


def _is_finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(local.detach().isfinite().all())


def save_failure(job: TrainJob, stopped: TrainingStopped, responses: Responses, states: States) -> Path:
    """Write the failed step's folder atomically; an earlier one of the same step is replaced."""
    assert stopped.step is not None
    folder = job.run_dir / "failures" / f"round-{job.round}-step-{stopped.step}"
    staging = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    with naming_full_disks(folder):
        staging.mkdir(parents=True)
        try:
            _write(staging, job, stopped, responses, states)
            fsync_tree(staging)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(staging, folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        fsync_folder(folder.parent)
    return folder


def _write(folder: Path, job: TrainJob, stopped: TrainingStopped, responses: Responses, states: States) -> None:
    report = {
        "message": str(stopped),
        "round": job.round,
        "step": stopped.step,
        "seed": job.seed,
        "temperature": job.temperature,
        "rollouts": str(job.rollouts.folder),
        "scores": [str(scores.folder) for scores in job.scores],
        "weights": _weights(job, states),
        "figures": stopped.figures,
        "settings": job.settings.model_dump(mode="json"),
    }
    text = json.dumps(_plain(report), indent=1, sort_keys=True, allow_nan=False)
    (folder / FAILURE_FILE).write_text(text + "\n", encoding="utf-8")
    numbers = {name: number for number, name in enumerate(responses.names)}
    rows = []
    for name in stopped.responses:
        sequence, (part, row) = responses.sequences[numbers[name]], responses.locations[numbers[name]]
        rows.append(
            {
                "name": name,
                "part": part,
                "row": row,
                "prompt_token_ids": list(sequence.context_ids),
                "response_token_ids": list(sequence.response_ids),
            }
        )
    write_jsonl(folder / RESPONSES_FILE, rows)


def _weights(job: TrainJob, states: States) -> dict[str, Any]:
    """Return where the same command starts from: it repeats the steps up to the failed one bit for bit."""
    step = states.newest_step()
    return {
        "student": job.student.path,
        "fingerprint": job.student.fingerprint,
        "state_after_step": step or 0,
        "state": None if step is None else str(states.folder(step)),
    }


def _plain(value: Any) -> Any:
    """Replace infinity and NaN, which JSON lacks, by text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
