"""The train stage: stored rollouts and scores in, a checkpoint out.

eopd train CONFIG --round R
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from eopd.stages.models.loading import load_model, model_folder
from eopd.stages.train.errors import TrainingStopped
from eopd.stages.train.job import METRICS_FILE, OPTIMIZER, TRAINING_FILE, WEIGHTS, TrainJob
from eopd.stages.train.failures import save_failure
from eopd.stages.train.loop import Loop, Step
from eopd.stages.train.metrics import Recorder, means, peak_memory_bytes, summarise
from eopd.stages.train.objectives.registry import make_objective
from eopd.stages.train.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors
from eopd.stages.train.parallel import distribute, gather_weights, load_weights, student_of
from eopd.stages.train.responses import Responses, load_responses
from eopd.stages.train.schedule import steps_per_round
from eopd.stages.train.settings import TrainSettings
from eopd.stages.train.states import OPTIMIZER_FILE, RoundStart, States, write_jsonl
from eopd.stages.train.stops import StopHandling
from eopd.stages.train.student import Student
from eopd.storage.claims import claim
from eopd.storage.fingerprints import tokenizer_files
from eopd.storage.teacher_cache import TeacherCache

CLAIM_POLL_SECONDS = 1.0


def run(job: TrainJob) -> None:
    """Train one round. Does nothing when the checkpoint is complete; waits when another job trains it.

    Raises:
        NeedNotMet: the objective asks for what the scores do not hold.
        TrainingStopped: sampler and trainer disagree, or a loss is not finite.
    """
    if job.output.is_complete():
        return
    accelerator = _accelerator(job.settings)
    with _threads(job.settings.cpu_threads), _sole_trainer(job, accelerator) as needed:
        if needed:
            _train(job, accelerator)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _sole_trainer(job: TrainJob, accelerator: Accelerator) -> Iterator[bool]:
    """Hold the claim on the checkpoint (in the main process, for all of them); whether there is work to do."""
    with ExitStack() as held:
        needed = [False]
        if accelerator.is_main_process:
            while not job.output.is_complete():
                if held.enter_context(claim(job.output, WEIGHTS)):
                    needed = [not job.output.is_complete()]
                    break
                time.sleep(CLAIM_POLL_SECONDS)
        broadcast_object_list(needed)
        yield needed[0]


def _train(job: TrainJob, accelerator: Accelerator) -> None:
    settings = job.settings
    cache = TeacherCache(job.scores)
    objective = make_objective(settings.objective)
    cache.require(objective.needs)
    responses = load_responses(job.rollouts, cache)
    stops = StopHandling(settings.objective.stops, job.student_stop_ids, job.teacher_stop_ids)
    student = Student(_load(job, accelerator), objective, settings.head_chunk_tokens)
    module = distribute(student, accelerator, settings.sharding)
    loop = Loop(
        module,
        make_optimizer(module, settings.optimizer),
        objective,
        responses,
        cache,
        stops,
        accelerator,
        settings,
        seed=job.seed,
        round_=job.round,
        first_step=job.first_step,
        total_steps=job.total_steps,
        temperature=job.temperature,
    )
    states = States(job.progress_states, settings.keep_progress)
    start = _round_start(job, loop, states, responses)
    rows = _resume(job, loop, states)
    _steps(job, loop, states, start, rows)
    _commit(job, loop, rows, start)
    if accelerator.is_main_process:
        states.clear()
    accelerator.wait_for_everyone()


def _accelerator(settings: TrainSettings) -> Accelerator:
    use_cpu = settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available())
    return Accelerator(cpu=use_cpu, mixed_precision=settings.autocast)


def _load(job: TrainJob, accelerator: Accelerator) -> PreTrainedModel:
    settings = job.settings
    reference = type(job.student)(**{**vars(job.student), "dtype": settings.param_dtype})
    model = load_model(reference, accelerator.device)
    for module in model.modules():  # an importance ratio needs the policy itself, not a random thinning of it
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model


def _round_start(job: TrainJob, loop: Loop, states: States, responses: Responses) -> RoundStart:
    start = states.round_start()
    if start is None:
        job.progress.start(f"train {job.round}: log-probs at the round's start", responses.tokens)
        start = loop.round_start(job.progress.advance)
        _compare_with_sampler(job, start, responses)
        if loop.accelerator.is_main_process:
            states.save_round_start(start)
        job.progress.close()
    return start


def _compare_with_sampler(job: TrainJob, start: RoundStart, responses: Responses) -> None:
    """The sampler and the trainer must mean the same policy; engine noise aside, their log-probs are equal."""
    pairs = [
        (start.logprob[responses.offsets[s] : responses.offsets[s + 1]], sampled)
        for s, sampled in enumerate(responses.sampler_logprobs)
        if sampled is not None
    ]
    if not pairs:
        return
    gap = np.abs(np.concatenate([ours for ours, _ in pairs]) - np.concatenate([theirs for _, theirs in pairs]))
    limit = job.settings.max_logprob_gap
    if not float(gap.mean()) <= limit:
        raise TrainingStopped(
            f"round {job.round}: the sampler's log-probs and the trainer's differ by {gap.mean():.4f} nats on average "
            f"(median {np.median(gap):.4f}, largest {gap.max():.4f}; limit {limit}). Wrong weights, template or "
            "temperature; or raise train.max_logprob_gap if the engines are known to differ this much."
        )


def _resume(job: TrainJob, loop: Loop, states: States) -> list[dict[str, Any]]:
    """Load the newest state of this round, or the optimiser state of the round before. Returns the steps taken."""
    inner = student_of(loop.student)
    state = states.newest()
    if state is not None:
        load_weights(inner, state.weights)
        load_optimizer_tensors(inner, loop.optimizer, state.optimizer)
        job.progress.line(f"train {job.round}: resumed after step {state.step}")
        return state.metrics
    if job.previous is not None and job.settings.optimizer.carry_over:
        found = load_file(job.previous.part_folder(OPTIMIZER) / OPTIMIZER_FILE)
        load_optimizer_tensors(inner, loop.optimizer, found)
    return []


def _steps(job: TrainJob, loop: Loop, states: States, start: RoundStart, rows: list[dict[str, Any]]) -> None:
    settings, accelerator = job.settings, loop.accelerator
    total = steps_per_round(len(loop.responses), settings.batch_responses, settings.epochs)
    main = accelerator.is_main_process
    recorder = Recorder(job.run_dir, job.round, job.first_step, len(rows)) if main else None
    job.progress.start(f"train {job.round}", loop.responses.tokens * settings.epochs)
    job.progress.advance(int(sum(row["tokens"] for row in rows)))
    for step, waited in loop.steps(len(rows), total):
        began = time.perf_counter()
        figures = means(_take(job, loop, states, step, start))
        row = {"round": job.round, "step": step.number, "epoch": step.epoch, **figures}
        rows.append(row)
        seconds = time.perf_counter() - began + waited
        if recorder is not None:
            timing = {
                "tokens_per_s": step.tokens / seconds,
                "loader_wait_fraction": waited / seconds,
                "peak_memory_gib": peak_memory_bytes(accelerator.device) / 2**30,
            }
            recorder.record({**row, **timing})
        job.progress.advance(step.tokens, loss=figures["loss"], gate=figures.get("gate_fraction", 0.0))
        taken = step.number + 1
        if taken % settings.checkpoint_every_steps == 0 and taken < total:
            _save_state(loop, states, taken, rows)
    job.progress.close()
    if recorder is not None:
        recorder.close()


def _take(job: TrainJob, loop: Loop, states: States, step: Step, start: RoundStart) -> dict[str, float]:
    """One step; one that breaks leaves its reproduction in the run folder."""
    try:
        return loop.take(step, start)
    except TrainingStopped as stopped:
        if stopped.figures is None or not loop.accelerator.is_main_process:
            raise
        folder = save_failure(job, stopped, loop.responses, states)
        raise TrainingStopped(
            f"{stopped}. Reproduction: {folder}",
            step=stopped.step,
            responses=stopped.responses,
            figures=stopped.figures,
            folder=folder,
        ) from stopped


def _save_state(loop: Loop, states: States, step: int, rows: list[dict[str, Any]]) -> None:
    inner = student_of(loop.student)
    weights, moments = gather_weights(inner), optimizer_tensors(inner, loop.optimizer)
    if loop.accelerator.is_main_process:
        states.save(step, weights, moments, rows)
    loop.accelerator.wait_for_everyone()


def _commit(job: TrainJob, loop: Loop, rows: list[dict[str, Any]], start: RoundStart) -> None:
    """Optimiser first, weights last: who finds the weights finds the round finished."""
    inner = student_of(loop.student)
    weights, moments = gather_weights(inner.model), optimizer_tensors(inner, loop.optimizer)
    if not loop.accelerator.is_main_process:
        return
    if not job.output.is_committed(OPTIMIZER):
        with job.output.write_part(OPTIMIZER) as folder:
            save_file(moments, folder / OPTIMIZER_FILE)
            start.save(folder)
    summary = {"round": job.round, "responses": len(loop.responses), **summarise(rows)}
    if not job.output.is_committed(WEIGHTS):
        with job.output.write_part(WEIGHTS, info={"steps": len(rows)}) as folder:
            inner.model.save_pretrained(folder, state_dict=weights)
            _copy_tokenizer(job, folder)
            write_jsonl(folder / METRICS_FILE, rows)
            (folder / TRAINING_FILE).write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    job.progress.line(
        f"train {job.round}: {len(rows)} steps, {int(summary['tokens']):,} tokens, loss {summary['loss']:.4f}"
    )


def _copy_tokenizer(job: TrainJob, folder: Path) -> None:
    """The student's tokenizer and generation settings as they are, so that the folder loads on its own."""
    source = model_folder(job.student.tokenizer_path)
    for file in tokenizer_files(source):
        shutil.copyfile(file, folder / file.name)
    generation = model_folder(job.student.path) / "generation_config.json"
    if generation.exists() and not (folder / generation.name).exists():
        shutil.copyfile(generation, folder / generation.name)
