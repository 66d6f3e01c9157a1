"""The train stage: stored rollouts and scores in, a checkpoint out.

eopd train CONFIG --round R
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from numpy.typing import NDArray
from transformers import PreTrainedModel

from eopd.stages.models.lm_head import traits_of
from eopd.stages.models.loading import load_model
from eopd.stages.models.memory import give_back_gpu_memory
from eopd.stages.models.threads import torch_threads
from eopd.stages.rollout.settings import OFF_POLICY
from eopd.stages.train.checkpoint import carry_over, commit, rehearse_commit, set_generation_config
from eopd.stages.train.failures import TrainingStopped, save_failure
from eopd.stages.train.job import TrainJob
from eopd.stages.train.loop import Loop, Step
from eopd.stages.train.lora import add_adapters
from eopd.stages.train.metrics import Recorder, RecordingFailed, means, peak_memory_bytes
from eopd.stages.train.objectives.registry import make_objective
from eopd.stages.train.optimizer import Ema, load_optimizer_tensors, make_optimizer, optimizer_tensors
from eopd.stages.train.parallel import distribute, gather_weights, load_weights, student_of
from eopd.stages.train.responses import (
    Responses,
    load_responses,
    refuse_other_writers,
    refuse_truncated_sampling,
    region_of,
)
from eopd.stages.train.settings import StalenessSettings, TrainSettings, batch_of_step, require_extras, steps_per_round
from eopd.stages.train.states import RoundStart, States
from eopd.stages.train.stops import StopHandling
from eopd.stages.train.student import Student
from eopd.storage import stopping
from eopd.storage.claims import Patience, claim
from eopd.storage.errors import InputError
from eopd.storage.paths import WEIGHTS
from eopd.storage.records import Writer
from eopd.storage.teacher_cache import JointCache

# -- staleness --------------------------------------------------------------------------------------------------------

# Weights of responses that an older policy sampled. Fixed at the round's start.
#
# Letters: S responses, T tokens of the round.


def response_weights(
    settings: StalenessSettings,
    age: int,
    moved: NDArray[np.float32],
    counted: NDArray[np.bool_],
    offsets: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Return weights [T], equal within a response: 2^(-age / half-life) times min(1, max_kl / KL).

    KL is the k1 estimate, the mean of ``moved`` over a response's counted tokens; where it is not positive, or nothing
    counts, nothing is taken off.

    Args:
        age: rounds by which the policy that sampled is older than the student.
        moved: log q_sampled - log q_student [T] of the tokens, nats.
        counted: tokens [T] of which that is known.
        offsets: [S+1] tokens of response s are [offsets[s], offsets[s+1]); none is empty.
    """
    lengths = np.diff(offsets)
    weights = np.ones(len(lengths))
    if settings.half_life_rounds is not None:
        weights *= 2.0 ** (-age / settings.half_life_rounds)
    if settings.max_kl is not None:
        total = np.add.reduceat(np.where(counted, moved.astype(np.float64), 0.0), offsets[:-1])
        kl = total / np.maximum(np.add.reduceat(counted.astype(np.int64), offsets[:-1]), 1)
        weights *= np.where(kl > settings.max_kl, settings.max_kl / np.maximum(kl, settings.max_kl), 1.0)
    return np.repeat(weights, lengths).astype(np.float32)


# -- the stage --------------------------------------------------------------------------------------------------------

LONGEST_WAIT = timedelta(days=7)
"""Timeout of processes that train together: the first may wait for another job's claim or write large states.
The launcher ends all when one dies."""


def run(job: TrainJob) -> None:
    """Train one round. Does nothing when the checkpoint is complete; waits when another job trains it.

    Raises:
        NeedNotMet: the objective asks for what the scores do not hold.
        ValueError: settings that cannot work with each other or with these rollouts; before a model is loaded.
        TrainingStopped: sampler and trainer disagree, or a loss is not finite.
    """
    if job.output.is_complete():
        return
    accelerator = _accelerator(job.settings)
    if accelerator.device.type != "cpu":
        job.engines.close()
    with torch_threads(job.settings.cpu_threads), _sole_trainer(job, accelerator) as needed:
        if needed:
            with stopping.in_hand():  # in every process: they stop together, at the end of a step
                _train(job, accelerator)
    give_back_gpu_memory()


@contextmanager
def _sole_trainer(job: TrainJob, accelerator: Accelerator) -> Iterator[bool]:
    """Hold the claim on the checkpoint (the main process holds it for all); yields whether there is work to do."""
    needed = [False]
    patience = Patience(job.progress.line)
    while accelerator.is_main_process and not job.output.is_complete():
        with claim(job.output, WEIGHTS) as ours:
            if ours and not job.output.is_complete():
                broadcast_object_list([True])
                yield True
                return
        stopping.check()
        patience.wait_for(job.output, [WEIGHTS])
    broadcast_object_list(needed)
    yield needed[0]


def _train(job: TrainJob, accelerator: Accelerator) -> None:
    settings = job.settings
    require_extras(settings)
    cache = JointCache(job.scores) if job.scores else None
    has_prefixes = job.source == "prefix" and job.tokens == "own"
    objective = make_objective(settings.objective, has_prefixes=has_prefixes)
    refuse_truncated_sampling(objective, job.truncated_rollouts)
    refuse_other_writers(objective, job.source)
    stops = StopHandling(settings.objective.stops, job.student_stop_ids, job.teacher_stop_ids)
    if cache is not None and not cache.coverage.sampled:  # a capture has no log-probs of stops: each is a token
        stops = StopHandling(settings.objective.stops, job.student_stop_ids[:1], job.student_stop_ids[:1])
    if cache is not None:
        cache.require(objective.needs_with(stops.union))
    elif objective.needs:
        problem = f"objective {objective.name!r} reads the teacher's scores, and there are none of this round"
        raise InputError(problem, setting="train.objective.name")
    responses = load_responses(job.rollouts, cache, job.selection, region_of(job.tokens, job.source))
    if responses.left_out:
        job.progress.line(
            f"train {job.round}: {responses.left_out:,} responses have no token to train on (train.tokens: "
            f"{job.tokens})"
        )
    if responses.selection is not None:
        job.progress.line(f"train {job.round}: {responses.selection} (train.select)")
    alone = _steps_of_prefixes_alone(job, responses) if has_prefixes else 0
    if alone:
        job.progress.line(
            f"train {job.round}: warning: {alone:,} steps hold nothing but tokens that the teacher wrote. AdamW makes "
            "them full-size steps whatever train.objective.prefix_beta is; lower rollout.prefix.start, or raise "
            "train.batch_responses"
        )
    first_step, total_steps = schedule_of(job, len(responses))
    model, autocast = _load(job, accelerator), settings.autocast == "bf16"
    rehearse_commit(job, model)
    student = Student(model, objective, settings.head_chunk_tokens, autocast=autocast)
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
        first_step=first_step,
        total_steps=total_steps,
        temperature=job.temperature,
        ema=None if settings.ema is None else Ema(student_of(module), settings.ema),
        has_prefixes=has_prefixes,
    )
    if loop.layout.describe():
        job.progress.line(f"train {job.round}: the student reads {loop.layout.describe()}")
    states = States(job.progress_states, settings.keep_progress)
    start = None if job.source in OFF_POLICY else _round_start(job, loop, states, responses)
    rows = _resume(job, loop, states)
    _steps(job, loop, states, start, rows)
    commit(job, loop, rows, start, states)
    if accelerator.is_main_process:
        states.clear()
    accelerator.wait_for_everyone()


def _steps_of_prefixes_alone(job: TrainJob, responses: Responses) -> int:
    """Count the steps of the round without a token that the student wrote."""
    settings = job.settings
    ends = responses.offsets[1:] - 1  # the last token is the student's, if any is
    whole = responses.written[ends] == Writer.TEACHER
    steps = range(steps_per_round(len(responses), settings.batch_responses, settings.epochs))
    batches = (
        batch_of_step(len(responses), settings.batch_responses, step, seed=job.seed, round_=job.round)[1]
        for step in steps
    )
    return sum(bool(whole[chosen].all()) for chosen in batches) if whole.any() else 0


def schedule_of(job: TrainJob, responses: int) -> tuple[int, int]:
    """Return the position of the round's first step in the learning rate's schedule, and the steps that it spans.

    How many responses other rounds select is not known. So with a selection every round gets an equal share of the
    schedule, in which this round's steps are spread.
    """
    if job.selection is None:
        return job.first_step, job.total_steps
    steps = steps_per_round(responses, job.settings.batch_responses, job.settings.epochs)
    first = steps * job.round if job.settings.optimizer.carry_over else 0
    return first, steps * job.schedule_rounds


def _accelerator(settings: TrainSettings) -> Accelerator:
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:  # accelerate would take the CPU
        raise InputError(
            "train.device is cuda, but torch sees no GPU", setting="train.device", remedy="`eopd doctor` says why"
        )
    use_cpu = settings.device == "cpu" or not there
    waiting = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    # the Student sets the precision: accelerate would cover only modules that it wraps itself
    return Accelerator(cpu=use_cpu, kwargs_handlers=[waiting])


def _load(job: TrainJob, accelerator: Accelerator) -> PreTrainedModel:
    settings = job.settings
    model = load_model(replace(job.student, dtype=settings.param_dtype), accelerator.device)
    set_generation_config(job, model)
    _switch_noise_off(model)
    freeze_unread(model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    if settings.lora is not None:
        model = add_adapters(model, settings.lora, job.seed, job.round)
    return model


def freeze_unread(model: PreTrainedModel) -> None:
    """Freeze modules that play no part in reading text, such as the vision tower of a multimodal model."""
    read = {id(parameter) for parameter in traits_of(model).decoder.parameters()}
    read |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    for parameter in model.parameters():
        if id(parameter) not in read:
            parameter.requires_grad_(False)


def _switch_noise_off(model: PreTrainedModel) -> None:
    """Disable dropout: an importance ratio needs the policy itself, not a random thinning of it."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # attention keeps its dropout, a router its jitter, as a number
            if isinstance(value, float) and ("dropout" in name or "jitter" in name):
                setattr(module, name, 0.0)


def _round_start(job: TrainJob, loop: Loop, states: States, responses: Responses) -> RoundStart:
    start = states.round_start()
    if start is None:
        job.progress.start(f"train {job.round}: log-probs at the round's start", responses.tokens)
        start = loop.round_start(job.progress.advance)
        alone = _alone(loop, responses)
        if job.age:
            start = _as_sampled(job, start, responses, alone)
        else:
            _compare_with_sampler(job, start, responses, alone)
        if loop.accelerator.is_main_process:
            states.save_round_start(start)
        job.progress.close()
    return start


def _alone(loop: Loop, responses: Responses) -> NDArray[np.bool_]:
    """Return a mask [T] of tokens that the policy sampled as outcomes of their own.

    A merged stop is not: the sampler's log-prob is of one id, ours of all of them, so that the two cannot be compared.
    """
    merged = loop.stops.merged if loop.objective.plan.stops else ()
    return (responses.written == Writer.POLICY) & ~np.isin(responses.token_ids, merged)


def _as_sampled(job: TrainJob, start: RoundStart, responses: Responses, alone: NDArray[np.bool_]) -> RoundStart:
    """Return q_old for rollouts of an older policy: that policy's log-probs when it sampled the tokens.

    At a merged stop it is what the student says at the round's start: nobody knows what that policy gave the others.
    """
    spans = [slice(*pair) for pair in pairwise(responses.offsets)]
    unknown = zip(responses.sampler_logprobs, spans, strict=True)
    if any(logprobs is None and (responses.written[span] == Writer.POLICY).any() for logprobs, span in unknown):
        raise TrainingStopped(
            f"round {job.round}: its rollouts are of a policy {job.age} rounds old and hold no log-probs of it, so "
            "no importance ratio can be formed",
            setting="lag",
            remedy="Set lag=0 and refresh=1, or sample with an engine that gives log-probs.",
        )
    sampled = start.logprob.copy()
    for logprobs, span in zip(responses.sampler_logprobs, spans, strict=True):
        if logprobs is not None:
            sampled[span] = np.where(alone[span], logprobs, sampled[span])
    moved = float((sampled - start.logprob).sum() / max(alone.sum(), 1))
    job.progress.line(
        f"train {job.round}: the policy that sampled is {job.age} rounds old; its KL to this one, by its samples: "
        f"{moved:.4g} nats a token"
    )
    weight = None
    if job.settings.staleness is not None:
        weight = response_weights(job.settings.staleness, job.age, sampled - start.logprob, alone, responses.offsets)
        job.progress.line(f"train {job.round}: its responses weigh {weight.mean():.3f} on average (train.staleness)")
    return RoundStart(sampled.astype(np.float32), start.entropy, weight)


def _compare_with_sampler(job: TrainJob, start: RoundStart, responses: Responses, alone: NDArray[np.bool_]) -> None:
    """Check that sampler and trainer mean the same policy: their log-probs are equal up to engine noise."""
    gaps = [np.zeros(0, np.float32)]
    for number, sampled in enumerate(responses.sampler_logprobs):
        if sampled is not None:
            rows = slice(responses.offsets[number], responses.offsets[number + 1])
            gaps.append(np.abs(start.logprob[rows] - sampled)[alone[rows]])
    gap = np.concatenate(gaps)
    if not len(gap):
        job.progress.line(
            f"train {job.round}: the rollouts hold no log-probs of the sampler, so it was not checked that it had the "
            "trainer's weights, template and temperature"
        )
        return
    limit = job.settings.max_logprob_gap
    if not float(gap.mean()) <= limit:
        raise TrainingStopped(
            f"round {job.round}: the sampler's log-probs and the trainer's differ by {gap.mean():.4f} nats on "
            f"average (median {np.median(gap):.4f}, largest {gap.max():.4f}; limit {limit})",
            setting="train.max_logprob_gap",
            remedy="Wrong weights, template or temperature; or raise train.max_logprob_gap if the engines are known to "
            "differ this much.",
        )


def _resume(job: TrainJob, loop: Loop, states: States) -> list[dict[str, Any]]:
    """Load the newest state of this round, or what carries over from the previous one. Returns the steps taken."""
    inner = student_of(loop.student)
    state = states.newest()
    if state is not None:
        load_weights(inner, state.weights, job.progress_states.folder)
        load_optimizer_tensors(inner, loop.optimizer, state.optimizer)
        if loop.ema is not None:
            loop.ema.load(state.ema)
        job.progress.line(f"train {job.round}: resumed after step {state.step}")
        return state.metrics
    carry_over(job, loop)
    return []


def _steps(job: TrainJob, loop: Loop, states: States, start: RoundStart | None, rows: list[dict[str, Any]]) -> None:
    settings, main = job.settings, loop.accelerator.is_main_process
    total = steps_per_round(len(loop.responses), settings.batch_responses, settings.epochs)
    shown = settings.model_dump(mode="json")
    before = job.steps_before
    if before is None:
        before = job.first_step or job.round * total  # without carry_over the schedule restarts, but the axis does not
    recorder = Recorder(job.run_dir, job.round, before, len(rows), settings.trackers, shown) if main else None
    with ExitStack() as at_end:  # records are flushed even if a step fails
        at_end.callback(job.progress.close)
        if recorder is not None:
            at_end.callback(_close, recorder, job)
        _take_steps(job, loop, states, start, rows, recorder)


def _close(recorder: Recorder, job: TrainJob) -> None:
    try:
        recorder.close()
    except RecordingFailed as failed:  # after the last step: the checkpoint is still to be committed
        job.progress.line(f"train {job.round}: figures are incomplete in {failed}")


def _take_steps(
    job: TrainJob,
    loop: Loop,
    states: States,
    start: RoundStart | None,
    rows: list[dict[str, Any]],
    recorder: Recorder | None,
) -> None:
    settings, accelerator = job.settings, loop.accelerator
    total = steps_per_round(len(loop.responses), settings.batch_responses, settings.epochs)
    job.progress.start(f"train {job.round}", loop.responses.tokens * settings.epochs)
    job.progress.advance(int(sum(row["tokens"] for row in rows)))
    for step, waited in loop.steps(len(rows), total):
        began = time.perf_counter()
        figures = means(_take(job, loop, states, step, start))
        row = {"round": job.round, "step": step.number, "epoch": step.epoch, **figures}
        if job.age:
            row["age"] = job.age
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
        due = taken % settings.checkpoint_every_steps == 0
        stopped = taken < total and _stop_wished(accelerator)
        if taken < total and (due or stopped):
            _save_state(loop, states, taken, rows)
        if stopped:
            job.progress.line(f"train {job.round}: stopped after step {taken}, whose state is kept")
            raise stopping.Stopped


def _stop_wished(accelerator: Accelerator) -> bool:
    """True if any of the processes was asked to stop; the same answer in all of them."""
    if accelerator.num_processes == 1:
        return stopping.stop_wished()
    wished = torch.tensor(float(stopping.stop_wished()), device=accelerator.device)
    return float(accelerator.reduce(wished)) > 0


def _take(job: TrainJob, loop: Loop, states: States, step: Step, start: RoundStart | None) -> dict[str, float]:
    """Take one step; if it fails, save its reproduction in the run folder."""
    try:
        return loop.take(step, start)
    except TrainingStopped as stopped:
        if stopped.figures is None or not loop.accelerator.is_main_process:
            raise
        folder = save_failure(job, stopped, loop.responses, states)
        raise TrainingStopped(
            str(stopped),
            remedy=f"Reproduction: {folder}",
            step=stopped.step,
            responses=stopped.responses,
            figures=stopped.figures,
            folder=folder,
        ) from stopped


def _save_state(loop: Loop, states: States, step: int, rows: list[dict[str, Any]]) -> None:
    inner = student_of(loop.student)
    weights, moments = gather_weights(inner, trained_only=True), optimizer_tensors(inner, loop.optimizer)
    averages = {} if loop.ema is None else loop.ema.tensors()
    if loop.accelerator.is_main_process:
        states.save(step, weights, moments, averages, rows)
    loop.accelerator.wait_for_everyone()
