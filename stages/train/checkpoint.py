"""A finished round's checkpoint: the model as a folder that transformers and vLLM load, and what trains it further.

Part 0 (weights): the model, its tokenizer, the steps' figures. Part 1 (optimiser): moments, log-probs at the round's
start, with LoRA the adapter alone (``adapter/``), with an average of weights that model (``ema/``).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from eopd.stages.job import ModelRef
from eopd.stages.models.lm_head import unwrap
from eopd.stages.models.loading import load_model, model_folder, no_progress_bars
from eopd.stages.train.job import (
    ADAPTER_FOLDER,
    METRICS_FILE,
    OPTIMIZER,
    OPTIMIZER_FILE,
    TRAINING_FILE,
    WEIGHTS,
    TrainJob,
)
from eopd.stages.train.loop import Loop
from eopd.stages.train.lora import merged_weights, save_adapter
from eopd.stages.train.metrics import summarise
from eopd.stages.train.optimizer import load_optimizer_tensors, optimizer_tensors
from eopd.stages.train.parallel import gather_weights, student_of
from eopd.stages.train.states import RoundStart, write_jsonl
from eopd.storage.fingerprints import tokenizer_files
from eopd.storage.sources import filled_parts

EMA_FOLDER = "ema"


def carry_over(job: TrainJob, loop: Loop) -> None:
    """Go on from the round before: moments (none with LoRA, whose adapters are new) and averaged weights."""
    settings = job.settings
    if job.previous is None or not settings.optimizer.carry_over or settings.lora is not None:
        return
    folder, student = job.previous.part_folder(OPTIMIZER), student_of(loop.student)
    load_optimizer_tensors(student, loop.optimizer, load_file(folder / OPTIMIZER_FILE))
    if loop.ema is not None:
        reference = ModelRef(str(folder / EMA_FOLDER), dtype="float32", trust_remote_code=job.student.trust_remote_code)
        loop.ema.load({f"model.{name}": value for name, value in load_model(reference).named_parameters()})


def commit(job: TrainJob, loop: Loop, rows: list[dict[str, Any]], start: RoundStart) -> None:
    """Optimiser first, weights last: who finds the weights finds the round finished. Every process must call it."""
    inner = student_of(loop.student)
    weights, moments = gather_weights(inner.model), optimizer_tensors(inner, loop.optimizer)
    averages = None if loop.ema is None else loop.ema.tensors()
    if not loop.accelerator.is_main_process:
        return
    if not job.output.is_committed(OPTIMIZER):
        with job.output.write_part(OPTIMIZER) as folder:
            save_file(moments, folder / OPTIMIZER_FILE)
            start.save(folder)
            if job.settings.lora is not None:
                save_adapter(inner.model, weights, folder / ADAPTER_FOLDER)
            if averages is not None:
                _save_model(job, inner.model, _named_in_model(averages), folder / EMA_FOLDER)
    if job.settings.lora is not None:
        weights = merged_weights(inner.model, weights)
    left_out = sorted(set(range(job.scores.parts)) - set(filled_parts(job.scores)))
    summary: dict[str, Any] = {"round": job.round, "responses": len(loop.responses), **summarise(rows)}
    info: dict[str, Any] = {"steps": len(rows)}
    if left_out:  # a checkpoint that saw less than its key says must say so
        info["left_out"] = summary["left_out"] = left_out
    if not job.output.is_committed(WEIGHTS):
        with job.output.write_part(WEIGHTS, info=info) as folder:
            _save_model(job, inner.model, weights, folder)
            write_jsonl(folder / METRICS_FILE, rows)
            (folder / TRAINING_FILE).write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    job.progress.line(
        f"train {job.round}: {len(rows)} steps, {int(summary['tokens']):,} tokens, loss {summary['loss']:.4f}"
    )


def _named_in_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names within the student's model, from names within the student."""
    return {name.removeprefix("model."): value for name, value in tensors.items()}


def _save_model(job: TrainJob, model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """A folder that loads on its own: the student's tokenizer and generation settings are copied as they are."""
    with no_progress_bars():
        unwrap(model).save_pretrained(folder, state_dict=weights)
    for file in tokenizer_files(model_folder(job.student.tokenizer_path, job.student.tokenizer_revision)):
        shutil.copyfile(file, folder / file.name)
    generation = model_folder(job.student.path, job.student.revision) / "generation_config.json"
    if generation.exists() and not (folder / generation.name).exists():
        shutil.copyfile(generation, folder / generation.name)
