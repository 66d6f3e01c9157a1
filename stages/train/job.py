"""Inputs of the train stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from eopd.stages.engines.kept import Engines
from eopd.stages.job import ModelRef, Progress
from eopd.stages.rollout.settings import Source
from eopd.stages.train.selection import Selection
from eopd.stages.train.settings import TrainedTokens, TrainSettings
from eopd.storage.artifacts import Artifact


@dataclass(frozen=True)
class TrainJob:
    output: Artifact  # the checkpoint
    progress_states: Artifact  # resumable states on the way there; removed at the end
    student: ModelRef  # the policy at the round's start; where `age` is 0, the one that sampled the rollouts
    previous: Artifact | None  # checkpoint whose optimiser state carries on
    rollouts: Artifact
    scores: tuple[Artifact, ...]  # of each teacher; none if the objective reads none
    settings: TrainSettings
    round: int
    total_steps: int  # of the schedule
    first_step: int  # schedule position of this round's step 0
    seed: int
    temperature: float  # of rollouts and scores
    truncated_rollouts: bool  # top-p, top-k or min-p cut the sampling distribution
    student_stop_ids: tuple[int, ...]
    teacher_stop_ids: tuple[int, ...]
    progress: Progress
    run_dir: Path  # metrics with timings, TensorBoard
    source: Source = "student"  # who wrote the responses
    tokens: TrainedTokens = "own"  # those of a response that are trained on
    age: int = 0  # rounds by which the policy that sampled is older than the one at the round's start
    selection: Selection | None = None  # which responses are trained on; None: all
    schedule_rounds: int = 1  # rounds that the schedule spans; read with a selection, see ``train.run.schedule_of``
    steps_before: int | None = None  # of earlier rounds, on the axis of figures; None: by ``first_step`` and ``round``
    engines: Engines = field(default_factory=Engines)  # of this process: closed before a GPU is trained on

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which the run's responses end, the student's main one first."""
        return tuple(dict.fromkeys((*self.student_stop_ids, *self.teacher_stop_ids)))
