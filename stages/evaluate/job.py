"""What the evaluate stage is handed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eopd.stages.engines.kept import Engines
from eopd.stages.evaluate.settings import EvaluateSettings
from eopd.stages.job import ModelRef, Progress
from eopd.storage.artifacts import Artifact


@dataclass(frozen=True)
class EvaluateJob:
    """Sample and verify the problems of some benchmarks.

    Part i of ``output`` holds the samples of ``settings.chunks(...)[i]``; the last part is the summary, which is
    written by whoever finds all others committed.
    """

    output: Artifact
    parts: Sequence[int]
    settings: EvaluateSettings
    progress: Progress
    log_dir: Path
    policy: ModelRef
    stop_ids: tuple[int, ...]
    seed: int  # equal seeds give equal draws to equal problems, whatever the part
    engines: Engines = field(default_factory=Engines)
