"""What a launcher is: workers that take one task each. Slurm alone brings a whole plan to its end by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from eopd.pipeline.plan import PlannedJob, Stage
from eopd.pipeline.runner import Runner

Kind = Literal["done", "failed", "refused", "full", "lost"]
"""refused: it would fail in the same way again; full: no space left where it writes; lost: the worker vanished (its
node is gone, it was killed)."""


@dataclass(frozen=True)
class Task:
    """What one worker is told: do these parts of this job."""

    runner: Runner  # of the run that wants it; ``runner.paths.config`` is its resolved config on disk
    job: PlannedJob
    parts: tuple[int, ...]  # rollout, score, evaluate: some of the output's; train: all

    @property
    def name(self) -> str:
        if self.job.stage == "train" or len(self.parts) == self.job.output.parts:
            return self.job.name
        return f"{self.job.name} {few_parts(self.parts)}"

    def arguments(self) -> list[str]:
        """Of the ``eopd`` command that does it, on any machine that sees the store and the run's folder."""
        parts = [] if self.job.stage == "train" else ["--parts", ",".join(map(str, self.parts))]
        return [self.job.stage, str(self.runner.paths.config), "--round", str(self.job.round), *parts]


@dataclass(frozen=True)
class Outcome:
    task: Task
    kind: Kind
    message: str = ""  # the last line the worker said of its end, for people


class Pool(Protocol):
    """Workers that take one task each. The scheduler alone talks to it, from one thread."""

    def room(self, stage: Stage) -> int:
        """How many more tasks of this stage may start now."""

    def start(self, task: Task) -> None:
        """Give ``task`` to a worker; there is room for it."""

    def wait(self, seconds: float) -> list[Outcome]:
        """The tasks that have ended, after at most about ``seconds``. Each is told once."""

    def close(self) -> None:
        """Let what runs commit the part in hand, then stop it; an interruption meanwhile stops it at once."""


def few_parts(parts: Sequence[int]) -> str:
    """ "part 3", "parts 1, 2, 7" or "parts 0, 1, 2, 3 and 12 more"."""
    shown = ", ".join(map(str, parts[:4]))
    more = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
    return f"part{'s' if len(parts) != 1 else ''} {shown}{more}"
