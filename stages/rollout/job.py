"""What the rollout stage is handed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eopd.stages.engines.kept import Engines
from eopd.stages.job import ModelRef, Progress
from eopd.stages.models.prompts import PromptSettings
from eopd.stages.rollout.settings import RolloutSettings
from eopd.storage.artifacts import Artifact


@dataclass(frozen=True)
class RolloutJob:
    """Sample the responses of one round.

    Part i of ``output`` holds the samples of the prompts ``prompt_indices[i]``. ``stop_ids`` are those of student
    and teacher together: every response ends at the first of them.
    """

    output: Artifact
    parts: Sequence[int]
    settings: RolloutSettings
    progress: Progress
    log_dir: Path
    policy: ModelRef
    prompts: PromptSettings
    prompt_indices: Sequence[Sequence[int]]  # rows of the prompt source, per part of the artifact
    stop_ids: tuple[int, ...]
    seed: int  # of this round: equal seeds give equal draws to equal prompts
    student_topk: Artifact | None = None  # side artifact of the same parts; None: not asked for
    engines: Engines = field(default_factory=Engines)
