"""Predicted peak memory of each stage, against the GPU or the memory at hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.stages.experiment_settings import ExperimentSettings
from eopd.stages.format import size
from eopd.stages.memory import Memory, ModelSize
from eopd.stages.models.memory import nvidia_smi
from eopd.stages.stage import Models
from eopd.stages.table import STAGES

if TYPE_CHECKING:
    from eopd.pipeline.run import Run

ELSEWHERE_BYTES = 80 * 2**30
"""Memory of the GPU that is assumed if there is none."""
SMALLER = "gradient checkpointing, smaller micro-batches, lora, sharding or a smaller dtype need less"


@dataclass(frozen=True)
class Need:
    """Memory that a stage needs, and memory that is available."""

    stage: str
    memory: Memory
    available: int

    @property
    def fits(self) -> bool:
        return self.memory.bytes <= self.available

    def __str__(self) -> str:
        text = f"needs about {size(self.memory.bytes)} of {size(self.available)}"
        if self.memory.taken is not None:
            text += f", vLLM takes {size(round(self.memory.taken * self.available))}"
        largest = sorted(self.memory.parts.items(), key=lambda part: -part[1])[:3]
        return f"{text} ({', '.join(f'{name} {size(taken)}' for name, taken in largest)})"


def gpu_bytes() -> int:
    """Return the memory of this machine's smallest GPU, by nvidia-smi; 0 if there is none."""
    return min((int(size) for size in nvidia_smi("memory.total") or () if size.isdigit()), default=0) * 2**20


def models_of(student: Path, teacher: Path) -> Models | None:
    """Return the shapes of two model folders; None if one is of a kind whose memory is not predicted."""
    one, other = ModelSize.read(student), ModelSize.read(teacher)
    return None if one is None or other is None else Models(one, other)


def needs(settings: ExperimentSettings, models: Models, gpu: int, available: int | None = None) -> Iterator[Need]:
    """Yield what each stage of a plan needs.

    Args:
        gpu: bytes of the GPU; 0: a CPU.
        available: bytes that may be taken; None: all of the GPU.
    """
    for stage in STAGES:
        memory = stage.memory(settings, models, gpu)
        if memory is not None:
            yield Need(stage.name, memory, gpu if available is None else available)


def needs_of(runs: Sequence[Run], gpu: int) -> list[Need]:
    """Return the most that each stage of some runs needs on a GPU."""
    experiments = [experiment for run in runs for experiment in run.experiment.by_teacher.values()]
    shapes = [models_of(one.facts.student.folder, one.facts.teacher.folder) for one in experiments]
    return largest(
        need
        for experiment, models in zip(experiments, shapes, strict=True)
        if models is not None
        for need in needs(experiment.settings, models, gpu)
    )


def largest(needed: Iterable[Need]) -> list[Need]:
    """Return the largest need of each stage."""
    by_stage: dict[str, Need] = {}
    for need in needed:
        if need.stage not in by_stage or by_stage[need.stage].memory.bytes < need.memory.bytes:
            by_stage[need.stage] = need
    return list(by_stage.values())


def lines(needed: Sequence[Need]) -> Iterator[str]:
    """Yield a line for each need, the largest first."""
    for need in sorted(needed, key=lambda need: -need.memory.bytes):
        yield f"Memory of `{need.stage}`: {need}{'' if need.fits else ': NOT ENOUGH'}."
