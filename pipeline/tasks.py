"""Tasks and pools: how work is handed out.

A **job** (``stages.stage.Job``) makes one artifact. A **task** is some parts of a job, given to one worker. An
**outcome** says how a task ended. Tasks travel as JSON: any process that sees the store and the run's folder can do
one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from eopd.pipeline.errors import Outcome
from eopd.pipeline.run import Run
from eopd.stages.stage import Job, Stage

Work = Sequence[tuple[Run, Job]]
"""Jobs to be done, each with the run that asks for it."""


@dataclass(frozen=True)
class Task:
    """Some parts of a job, for one worker."""

    run: Run  # that asks for it; ``run.paths.config`` is its resolved config on disk
    job: Job
    parts: tuple[int, ...]

    @property
    def name(self) -> str:
        if len(self.parts) == self.job.output.parts:
            return self.job.name
        return f"{self.job.name} {few_parts(self.parts)}"

    @property
    def processes(self) -> int:
        """Number of processes that do the task together (torchrun)."""
        return self.job.stage.processes(self.run.settings)

    def to_json(self, *, events: Path | None = None, log: Path | None = None) -> str:
        """The task as it travels, in one line.

        Args:
            events: file that receives the worker's progress and, last, the outcome.
            log: file that receives what the worker prints; None: its own stdout and stderr.
        """
        return json.dumps(
            {
                "config": str(self.run.paths.config.absolute()),
                "stage": self.job.stage.name,
                "round": self.job.round,
                "variant": self.job.variant,
                "parts": list(self.parts),
                "events": str(events) if events else None,
                "log": str(log) if log else None,
            }
        )


class Pool(Protocol):
    """Workers that take one task each. Only the scheduler talks to it, from one thread."""

    def room(self, stage: Stage) -> int:
        """Return how many more tasks of this stage may start now."""

    def start(self, task: Task) -> None:
        """Give ``task`` to a worker, for which there is room. Raises StoreFull if its log cannot be written."""

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        """Return tasks that ended, each once, after at most about ``seconds``."""

    def close(self) -> None:
        """Let running tasks commit their current part, then stop them; a second signal stops them at once."""


def few_parts(parts: Sequence[int]) -> str:
    """ "part 3", "parts 1, 2, 7" or "parts 0, 1, 2, 3 and 12 more"."""
    shown = ", ".join(map(str, parts[:4]))
    more = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
    return f"part{'s' if len(parts) != 1 else ''} {shown}{more}"
