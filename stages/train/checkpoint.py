"""A finished round's checkpoint: the model as a folder that transformers and vLLM load, and what trains it further.

Part 0 (weights): the model, its tokenizer, the steps' figures. Part 1 (optimiser): moments, log-probs at the round's
start, with LoRA the adapter alone (``adapter/``), with an average of weights that model (``ema/``). Generation from
any of the models ends where the run's responses did: at the stop ids in its ``generation_config.json``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eopd.stages.job import ModelRef
from eopd.stages.models.lm_head import unwrap
from eopd.stages.models.loading import load_model, model_folder, no_progress_bars
from eopd.stages.models.model_config import GENERATION_FILE, stop_ids_in, with_stop_ids
from eopd.stages.train.job import TrainJob
from eopd.stages.train.loop import Loop
from eopd.stages.train.lora import merged_weights, save_adapter
from eopd.stages.train.metrics import summarise
from eopd.stages.train.optimizer import load_optimizer_tensors, optimizer_tensors
from eopd.stages.train.parallel import gather_weights, student_of
from eopd.stages.train.states import RoundStart, States, write_jsonl
from eopd.storage.errors import InputError, StoreFull
from eopd.storage.files import free_of
from eopd.storage.identity import tokenizer_files
from eopd.storage.paths import ADAPTER_FOLDER, METRICS_FILE, OPTIMIZER, OPTIMIZER_FILE, TRAINING_FILE, WEIGHTS
from eopd.storage.sources import filled_parts

EMA_FOLDER = "ema"


def carry_over(job: TrainJob, loop: Loop) -> None:
    """Continue from the round before: moments (none with LoRA, whose adapters are new) and averaged weights."""
    settings = job.settings
    if job.previous is None or not settings.optimizer.carry_over or settings.lora is not None:
        return
    folder, student = job.previous.part_folder(OPTIMIZER), student_of(loop.student)
    load_optimizer_tensors(student, loop.optimizer, load_file(folder / OPTIMIZER_FILE))
    if loop.ema is not None:
        reference = ModelRef(str(folder / EMA_FOLDER), dtype="float32", trust_remote_code=job.student.trust_remote_code)
        loop.ema.load({f"model.{name}": value for name, value in load_model(reference).named_parameters()})


def set_generation_config(job: TrainJob, model: Any) -> None:
    """Give ``model`` the generation settings that its checkpoint is saved with."""
    if not model.can_generate():
        return
    model.generation_config, changes = with_stop_ids(model.generation_config, job.stop_ids)
    for change in changes:
        job.progress.line(f"train {job.round}: in the checkpoint's {GENERATION_FILE} {change}")


class _Rehearsed(Exception):
    """Ends a part that is written only to test that it can be."""


def rehearse_commit(job: TrainJob, model: Any) -> None:
    """Write and drop all of the checkpoint except its tensors, so that anything that would fail at the end fails now.

    Raises:
        StoreFull: there is less space than the checkpoint takes.
        ValueError: transformers or peft cannot save this model.
    """
    _require_space(job, model)
    # tensors without data go through renaming, merging and sharding, and fail only where they are written
    weights = {name: torch.empty_like(value, device="meta") for name, value in model.named_parameters()}
    states = job.progress_states
    try:
        # the number of the last state, which is never reached, so that no part of the checkpoint appears to be begun
        with suppress(_Rehearsed), states.write_part(states.parts - 1) as folder:
            if job.settings.lora is not None:
                # only the adapter is small enough to be written in full
                adapter = {name: torch.zeros_like(weights[name], device="cpu") for name in weights if ".lora_" in name}
                save_adapter(model, weights | adapter, folder / ADAPTER_FOLDER)
                weights = merged_weights(model, weights)
            with suppress(NotImplementedError):
                _save_weights(model, weights, folder)
            _save_companions(job, folder)
            raise _Rehearsed
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
        raise InputError(
            f"{job.student.path}: the trained student could not be saved, so it is not trained: "
            f"{type(error).__name__}: {error}",
            file=job.student.path,
        ) from error


def _require_space(job: TrainJob, model: Any) -> None:
    """Refuse a training whose checkpoint would not fit, by the bytes of its tensors alone."""
    sizes = [(value.numel() * value.element_size(), value) for value in model.parameters()]
    frozen = job.settings.lora is not None
    needed = 0 if job.output.is_committed(WEIGHTS) else sum(size for size, _ in sizes)
    if not job.output.is_committed(OPTIMIZER):
        trained = sum(size for size, value in sizes if value.requires_grad)
        averages = 0 if job.settings.ema is None or frozen else sum(4 * value.numel() for _, value in sizes)
        needed += 2 * trained + averages
    job.output.begin()
    free = free_of(job.output.folder)
    if free.bytes < needed:
        raise StoreFull(
            f"no space left for the checkpoint of train {job.round}: it takes {needed:,} bytes, and "
            f"{job.output.folder} has {free}",
            file=job.output.folder,
            remedy="Free space, then run the same command again.",
        )


def commit(job: TrainJob, loop: Loop, rows: list[dict[str, Any]], start: RoundStart | None, states: States) -> None:
    """Write the optimiser first and the weights last, so that a round whose weights exist is complete.

    Every process must call it. Where it fails, the state after the last step is kept, so that no step is taken again;
    where that fails too, a line says so.
    """
    inner = student_of(loop.student)
    weights, moments = gather_weights(inner.model), optimizer_tensors(inner, loop.optimizer)
    averages = None if loop.ema is None else loop.ema.tensors()
    if not loop.accelerator.is_main_process:
        return
    try:
        _write_parts(job, loop, rows, start, weights, moments, averages)
    except Exception:  # any error is raised again
        if states.newest_step() != len(rows):
            trained = {name for name, value in inner.model.named_parameters() if value.requires_grad}
            kept = {f"model.{name}": value for name, value in weights.items() if name in trained}
            try:
                states.save(len(rows), kept, moments, averages or {}, rows)
            except Exception as error:  # the first error says more, and is raised
                job.progress.line(
                    f"train {job.round}: the state after step {len(rows)} could not be kept either, so steps since the "
                    f"last one that was will be taken again: {type(error).__name__}: {error}"
                )
        raise


def _write_parts(
    job: TrainJob,
    loop: Loop,
    rows: list[dict[str, Any]],
    start: RoundStart | None,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    averages: dict[str, Tensor] | None,
) -> None:
    inner = student_of(loop.student)
    if not job.output.is_committed(OPTIMIZER):
        with job.output.write_part(OPTIMIZER) as folder:
            save_file(moments, folder / OPTIMIZER_FILE)
            if start is not None:
                start.save(folder)
            if job.settings.lora is not None:
                save_adapter(inner.model, weights, folder / ADAPTER_FOLDER)
                _save_ends(job, inner.model, folder / ADAPTER_FOLDER)
            if averages is not None:
                _save_weights(inner.model, _named_in_model(averages), folder / EMA_FOLDER)
                _save_companions(job, folder / EMA_FOLDER)
    if job.settings.lora is not None:
        weights = merged_weights(inner.model, weights)
    parts = set(range(job.rollouts.parts))
    left_out = sorted(set().union(*(parts.difference(filled_parts(one)) for one in job.scores or (job.rollouts,))))
    summary: dict[str, Any] = {"round": job.round, "responses": len(loop.responses), **summarise(rows)}
    info: dict[str, Any] = {"steps": len(rows)}
    if loop.responses.selection is not None:
        summary["selection"] = loop.responses.selection
    if left_out:  # a checkpoint that saw less than its key says must say so
        info["left_out"] = summary["left_out"] = left_out
    if not job.output.is_committed(WEIGHTS):
        with job.output.write_part(WEIGHTS, info=info) as folder:
            _save_weights(inner.model, weights, folder)
            _save_companions(job, folder)
            write_jsonl(folder / METRICS_FILE, rows)
            (folder / TRAINING_FILE).write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    job.progress.line(
        f"train {job.round}: {len(rows)} steps, {int(summary['tokens']):,} tokens, loss {summary['loss']:.4f}"
    )


def _named_in_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map names within the student to names within the student's model."""
    return {name.removeprefix("model."): value for name, value in tensors.items()}


def _save_weights(model: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Save weights, config and generation settings as transformers does."""
    with no_progress_bars():
        unwrap(model).save_pretrained(folder, state_dict=dict(weights))  # it removes tensors from its argument


def _save_ends(job: TrainJob, model: Any, folder: Path) -> None:
    """Save the generation settings with an adapter if its base model ends at other ids than the run's responses."""
    base = stop_ids_in(model_folder(job.student.path, job.student.revision))
    if set(base) != set(job.stop_ids):
        unwrap(model).generation_config.save_pretrained(folder)


def _save_companions(job: TrainJob, folder: Path) -> None:
    """Copy the student's tokenizer, so that the folder loads on its own."""
    for file in tokenizer_files(model_folder(job.student.tokenizer_path, job.student.tokenizer_revision)):
        shutil.copyfile(file, folder / file.name)
    generation = model_folder(job.student.path, job.student.revision) / GENERATION_FILE
    if generation.exists() and not (folder / generation.name).exists():
        shutil.copyfile(generation, folder / generation.name)
