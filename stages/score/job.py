"""Inputs of the score stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eopd.stages.engines.kept import Engines
from eopd.stages.job import ModelRef, Progress
from eopd.stages.models.prompts import PromptSettings
from eopd.stages.score.settings import ScoreSettings
from eopd.storage.artifacts import Artifact


@dataclass(frozen=True)
class ScoreJob:
    """Scoring of rollouts with the teacher: part i of ``output`` comes from part i of ``rollouts``."""

    output: Artifact
    parts: Sequence[int]
    settings: ScoreSettings
    progress: Progress
    log_dir: Path
    rollouts: Artifact
    teacher: ModelRef
    student_tokenizer: str  # folder or hub id: its ids must mean the same bytes as the teacher's
    stop_ids: tuple[int, ...]  # union of student's and teacher's
    rollout_temperature: float
    student_topk: Artifact | None = None  # the student's own top-k: ids whose teacher log-probs are stored too
    prompts: PromptSettings | None = None  # the prompt source, where contexts hold solutions
    prompt_rows: frozenset[int] | None = None  # the prompts whose responses are scored, by their rows; None: all
    verdicts: Artifact | None = None  # on the rollouts, where contexts depend on them
    seed: int = 0  # of score.teacher_prompt.shuffled
    engines: Engines = field(default_factory=Engines)
