"""Tasks that ended without doing their parts: whom to name, and which parts to give up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eopd.pipeline.ends import EXIT_FULL
from eopd.pipeline.launchers.base import few_parts
from eopd.pipeline.launchers.slurm import queue
from eopd.pipeline.launchers.slurm.arrays import Array, missing_parts
from eopd.pipeline.launchers.slurm.script import log_path
from eopd.pipeline.logs import ERROR, tail
from eopd.pipeline.node import Node

KILLED = 128  # a shell's exit codes from here on: a signal


@dataclass(frozen=True)
class Failure:
    """A task that began and left parts undone."""

    array: Array
    task: str  # as Slurm names it: 12_3
    asked: tuple[int, ...]
    undone: tuple[int, ...]
    state: str  # Slurm's word for its end
    log: Path
    code: int | None

    def __str__(self) -> str:
        what = f"{self.array.job.name}, {few_parts(self.undone)}"
        return f"{what}: task {self.task} {self.state}: {_last_words(self.log)} (log: {self.log})"

    @property
    def blames_a_part(self) -> bool:
        """It failed by itself (not killed, no full disk), and had one part only."""
        failed = self.code is not None and 0 < self.code < KILLED and self.code != EXIT_FULL
        return failed and len(self.asked) == 1 and self.array.job.stage != "train"


def failures(submitted: Mapping[int, Array]) -> Iterator[Failure]:
    """Of jobs that are no longer in the queue."""
    states = queue.look(submitted) or {}
    for job, array in submitted.items():
        missing = missing_parts(array.runner, array.job)
        for index, parts in array.chunks.items():
            undone = tuple(part for part in parts if part in missing)
            log = log_path(array, str(job), str(index))
            if undone and log.exists():  # without a log it never began: what it waited for has failed
                known = states.get((job, index))
                state = known.state if known else queue.ended_as(job, index)
                yield Failure(array, f"{job}_{index}", parts, undone, state, log, queue.exit_code(job, index))


def set_aside(failed: Sequence[Failure]) -> list[str]:
    """Give up the parts that are to blame, where all others of their job are done; says which."""
    told = []
    for array in {failure.array for failure in failed}:
        poisoned = {f.undone[0]: str(f) for f in failed if f.array is array and f.blames_a_part}
        node = Node(array.runner, array.job, poisoned=dict(poisoned))
        if poisoned and node.settle():
            told.append(f"{array.job.name}: {few_parts(sorted(poisoned))} set aside")
    return told


def _last_words(log: Path) -> str:
    """The error a task ended with, or else its last line; what Slurm adds comes after it."""
    lines = [line.strip() for line in tail(log, 200) if line.strip()]
    return next((line for line in reversed(lines) if ERROR.match(line)), lines[-1] if lines else "no output")
