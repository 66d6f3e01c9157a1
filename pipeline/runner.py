"""Runs planned jobs: skips what is committed, hands each stage what it reads, says one line per finished job."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.pipeline.config import ModelSettings, RunSettings
from eopd.pipeline.errors import RunError
from eopd.pipeline.launchers.processes import rank
from eopd.pipeline.models import ModelFacts
from eopd.pipeline.needs import refuse_unmet_needs
from eopd.pipeline.plan import (
    SUMMED_UP,
    WEIGHTS,
    Facts,
    Plan,
    PlannedJob,
    sampling_round,
    sampling_seed,
    steps_of_round,
)
from eopd.pipeline.provenance import other_teacher
from eopd.pipeline.pruning import Parts, prune_old, reads, rebuilds
from eopd.stages.job import ModelRef, Progress
from eopd.storage.artifacts import Artifact, Identity
from eopd.storage.errors import StoreError
from eopd.storage.files import naming_full_disks
from eopd.storage.jsonl import append_line
from eopd.storage.paths import RunPaths
from eopd.storage.pruning import revive
from eopd.storage.stacked import StackedStores

if TYPE_CHECKING:
    from eopd.stages.engines.kept import Engines
    from eopd.stages.train.job import TrainJob

PROGRESS_PARTS = 10**9  # resumable states are numbered by optimiser step; how many there will be is not known


@dataclass(frozen=True)
class Runner:
    """One run: its settings, what they name, and the plan they make."""

    settings: RunSettings
    facts: Facts
    plan: Plan
    progress: Progress
    engines: Engines | None = None  # of this process, kept between jobs; None: an engine a job

    @property
    def store(self) -> Path:
        return Path(self.settings.store)

    @property
    def paths(self) -> RunPaths:
        return RunPaths(Path(self.settings.runs) / self.settings.name)

    @cached_property
    def stores(self) -> StackedStores:
        return StackedStores.at(self.settings.store, self.settings.read_only_stores)

    def artifact(self, identity: Identity) -> Artifact:
        """Where this artifact is, or is to be made."""
        return self.stores.find(identity)

    def is_own(self, artifact: Artifact) -> bool:
        """Whether it lies, or is to be made, in the store that is written to."""
        return artifact.folder == self.store / artifact.kind / artifact.key

    def is_made(self, job: PlannedJob) -> bool:
        """Whether all of ``job`` was done once, be it pruned since."""
        made = self.artifact(job.output).is_complete()
        return made and (job.side is None or job.stage != "rollout" or self.artifact(job.side).is_complete())

    def is_done(self, job: PlannedJob) -> bool:
        """Whether nothing is left to do: all of it was made, and nothing of it has to be made again."""
        return self.is_made(job) and not self.called_back(job)

    @cached_property
    def _rebuilds(self) -> Parts:
        return rebuilds(self)

    def called_back(self, job: PlannedJob) -> list[int]:
        """Pruned parts of ``job``'s output that something which was not done when we began has to read."""
        pruned = self.artifact(job.output).pruned() if job.stage == "train" else set()
        return [part for part in sorted(pruned) if (job.output.key, part) in self._rebuilds]

    def lacks(self, job: PlannedJob, identity: Identity) -> list[int]:
        """Parts of the input ``identity`` that ``job`` reads and that are not there."""
        read = set(range(identity.parts))
        if identity.kind == "checkpoints":
            read = {part for key, part in reads(job, self.settings.train) if key == identity.key}
        committed = self.artifact(identity).committed()
        return sorted(read - committed)

    def states(self, job: PlannedJob) -> Artifact:
        """Resumable states of a training job, by optimiser step."""
        return self.artifact(states_of(job))

    def is_idle(self, job: PlannedJob, parts: Sequence[int] | None = None) -> bool:
        """Whether nothing is left to do of ``job``, or of ``parts`` of it."""
        if self.is_done(job):
            return True
        if parts is None or job.side is not None or job.stage in SUMMED_UP:  # who ends last sums up
            return False
        return self.artifact(job.output).committed().issuperset(parts)

    def run(self, job: PlannedJob, parts: Sequence[int] | None = None) -> bool:
        """Do what is missing of ``job`` (of ``parts`` of it). False when there was nothing to do.

        Raises:
            RunError: an input artifact is not complete yet; names the command that makes it.
        """
        if self.is_idle(job, parts):
            return False
        output = self.artifact(job.output)
        chosen = list(range(output.parts)) if parts is None else list(parts)
        committed = output.committed()
        self._check_inputs(job, chosen)
        for part in self.called_back(job):
            revive(output, part)
        self.paths.logs.mkdir(parents=True, exist_ok=True)
        steps = self._steps(job)
        began = time.monotonic()

        def close_books() -> float:
            seconds = time.monotonic() - began
            self.progress.close()
            made = len((output.committed() - committed) & set(chosen))
            if rank() == 0 and (made or self._steps(job) > steps):  # one process alone, where several train together
                self._log(job, seconds, made)
            return seconds

        try:
            START[job.stage](self, job, chosen)
        except BaseException:
            with suppress(StoreError, OSError):  # what it did before it was stopped, or failed, took its time too
                close_books()
            raise
        seconds = close_books()
        self.progress.line(f"{job.name}: done in {seconds:.1f} s -> {output.folder}")
        if rank() == 0 and job.stage != "score" and self.is_made(job):
            prune_old(self)
        return True

    def _steps(self, job: PlannedJob) -> int:
        """The last step that a training would resume from, plus one; 0 of everything else."""
        return max(self.states(job).committed(), default=-1) + 1 if job.stage == "train" else 0

    def _log(self, job: PlannedJob, seconds: float, parts: int) -> None:
        """One line a job that did something: what it cost. For the report's table and for estimates. No ``parts``:
        a training that was stopped on the way."""
        line = {"stage": job.stage, "round": job.round, "key": job.output.key, "seconds": seconds, "parts": parts}
        with naming_full_disks(self.paths.jobs):
            append_line(self.paths.jobs, line)

    def _check_inputs(self, job: PlannedJob, parts: Sequence[int]) -> None:
        for identity in job.inputs:
            artifact = self.artifact(identity)
            by_part = job.stage == "score" and identity.kind == "rollouts"
            missing = [p for p in self.lacks(job, identity) if not by_part or p in parts]
            if not missing:
                continue
            maker = self.plan.maker(identity)
            state = "were pruned" if artifact.pruned().issuperset(missing) else "are missing"
            raise RunError(
                f"{job.name} needs {artifact}, of which parts {missing[:8]} {state}. "
                f"Run `eopd {maker.stage} CONFIG --round {maker.round}` first, or `eopd run CONFIG` for everything."
            )

    # -- what the stages are handed ----------------------------------------------------------------------------

    def _external(self, settings: ModelSettings, facts: ModelFacts) -> ModelRef:
        return ModelRef(
            path=str(facts.folder),
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            fingerprint=facts.fingerprint,
            tokenizer=str(facts.tokenizer_folder),
        )

    def student(self, round_: int) -> ModelRef:
        """The policy at the start of ``round_``."""
        settings, facts = self.settings.student, self.facts.student
        checkpoint = self.plan.policy(round_)
        if checkpoint is None:
            return self._external(settings, facts)
        return ModelRef(
            path=str(self.artifact(checkpoint).part_folder(WEIGHTS)),
            dtype=settings.dtype if settings.dtype != "auto" else _dtype_of(facts.folder),
            trust_remote_code=settings.trust_remote_code,
            fingerprint=checkpoint.key,
            tokenizer=str(facts.tokenizer_folder),
        )

    def teacher(self) -> ModelRef:
        return self._external(self.settings.teacher, self.facts.teacher)


def states_of(job: PlannedJob) -> Identity:
    """What the resumable states of a training job are."""
    return Identity("progress", 1, PROGRESS_PARTS, inputs={"checkpoint": job.output.key})


def _dtype_of(folder: Path) -> str:
    """The precision a checkpoint says it was saved in; later rounds are sampled in the first student's."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _engines(runner: Runner) -> Engines:
    from eopd.stages.engines.kept import Engines

    return runner.engines or Engines()


def _start_rollout(runner: Runner, job: PlannedJob, parts: Sequence[int]) -> None:
    from eopd.stages.rollout.job import RolloutJob
    from eopd.stages.rollout.run import run

    refuse_unmet_needs(runner, job.round)
    run(
        RolloutJob(
            output=runner.artifact(job.output),
            parts=parts,
            settings=runner.settings.rollout,
            progress=runner.progress,
            log_dir=runner.paths.logs,
            policy=runner.student(sampling_round(runner.settings, job.round)),
            prompts=runner.settings.prompts,
            prompt_indices=job.prompt_indices,
            stop_ids=runner.facts.stop_ids,
            seed=sampling_seed(runner.settings, job.round),
            student_topk=runner.artifact(job.side) if job.side else None,
            engines=_engines(runner),
        )
    )


def _start_score(runner: Runner, job: PlannedJob, parts: Sequence[int]) -> None:
    from eopd.stages.score.job import ScoreJob
    from eopd.stages.score.run import run

    run(
        ScoreJob(
            output=runner.artifact(job.output),
            parts=parts,
            settings=runner.settings.score,
            progress=runner.progress,
            log_dir=runner.paths.logs,
            rollouts=runner.artifact(job.inputs[0]),
            teacher=runner.teacher(),
            student_tokenizer=str(runner.facts.student.tokenizer_folder),
            stop_ids=runner.facts.stop_ids,
            rollout_temperature=runner.settings.rollout.temperature,
            student_topk=runner.artifact(job.side) if job.side else None,
            engines=_engines(runner),
        )
    )


def _start_train(runner: Runner, job: PlannedJob, parts: Sequence[int]) -> None:
    from eopd.stages.train.run import run

    warning = other_teacher(runner.settings)
    if warning is not None:
        runner.progress.line(warning)
    run(train_job(runner, job))


def train_job(runner: Runner, job: PlannedJob) -> TrainJob:
    """What the train stage is handed for a planned job."""
    from eopd.stages.train.job import TrainJob

    settings, facts = runner.settings, runner.facts
    rollouts, scores = (runner.artifact(identity) for identity in job.inputs[:2])
    previous = runner.plan.policy(job.round)
    carries = settings.train.optimizer.carry_over
    steps = steps_of_round(settings, facts)
    return TrainJob(
        output=runner.artifact(job.output),
        progress_states=runner.states(job),
        student=runner.student(job.round),
        previous=runner.artifact(previous) if previous else None,
        rollouts=rollouts,
        scores=scores,
        settings=settings.train,
        round=job.round,
        age=job.round - sampling_round(settings, job.round),
        total_steps=steps * (settings.rounds if carries else 1),
        first_step=steps * job.round if carries else 0,
        seed=settings.seed,
        temperature=settings.rollout.temperature,
        truncated_rollouts=settings.rollout.parameters(()).truncates,
        student_stop_ids=facts.student.stop_ids,
        teacher_stop_ids=facts.teacher.stop_ids,
        progress=runner.progress,
        run_dir=runner.paths.folder,
        engines=_engines(runner),
    )


def _start_evaluate(runner: Runner, job: PlannedJob, parts: Sequence[int]) -> None:
    from eopd.stages.evaluate.job import EvaluateJob
    from eopd.stages.evaluate.run import run

    assert runner.settings.evaluate is not None
    run(
        EvaluateJob(
            output=runner.artifact(job.output),
            parts=parts,
            settings=runner.settings.evaluate,
            progress=runner.progress,
            log_dir=runner.paths.logs,
            policy=runner.student(job.round),
            stop_ids=runner.facts.stop_ids,
            seed=runner.settings.seed,
            engines=_engines(runner),
        )
    )


def _start_align(runner: Runner, job: PlannedJob, parts: Sequence[int]) -> None:
    from eopd.stages.evaluate.alignment.job import AlignmentJob
    from eopd.stages.evaluate.alignment.run import run

    evaluate = runner.settings.evaluate
    assert evaluate is not None
    assert evaluate.alignment is not None
    rounds = {"own": job.round, "first": 0}
    run(
        AlignmentJob(
            output=runner.artifact(job.output),
            parts=parts,
            settings=evaluate,
            progress=runner.progress,
            log_dir=runner.paths.logs,
            sources=tuple(
                (whose, runner.artifact(runner.plan.job("evaluate", rounds[whose]).output))
                for whose in evaluate.alignment.responses
            ),
            student=runner.student(job.round),
            teacher=runner.teacher(),
            teacher_prompt=runner.settings.score.teacher_prompt,
            stop_ids=runner.facts.stop_ids,
            engines=_engines(runner),
        )
    )


START: dict[str, Callable[[Runner, PlannedJob, Sequence[int]], None]] = {
    "rollout": _start_rollout,
    "score": _start_score,
    "train": _start_train,
    "evaluate": _start_evaluate,
    "align": _start_align,
}
