"""Inputs of the alignment measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eopd.stages.engines.kept import Engines
from eopd.stages.evaluate.settings import EvaluateSettings
from eopd.stages.job import ModelRef, Progress
from eopd.stages.models.teacher_prompts import TeacherPromptSettings
from eopd.storage.artifacts import Artifact


@dataclass(frozen=True)
class AlignmentJob:
    """Measurement of complete evaluations' samples with teacher and student.

    ``output`` has a part for every part of every evaluation in ``sources``, in their order.
    """

    output: Artifact
    parts: Sequence[int]
    settings: EvaluateSettings  # with ``alignment``
    progress: Progress
    log_dir: Path
    sources: tuple[tuple[str, Artifact], ...]  # whose responses (own, first), and the evaluation that holds them
    student: ModelRef
    teacher: ModelRef
    teacher_prompt: TeacherPromptSettings
    stop_ids: tuple[int, ...]
    seed: int = 0  # of score.teacher_prompt.shuffled
    engines: Engines = field(default_factory=Engines)  # of this process: closed before a GPU is read on
