"""A warm worker: a process that does one task after another and keeps what they share.

    python -m eopd.pipeline.worker ANSWERS        ANSWERS: the number of an inherited file descriptor

Tasks come on stdin and answers go to ANSWERS, one JSON line each, in turn:

    {"stage": "rollout", "config": "runs/x/config.yaml", "round": 3, "parts": [0, 1], "events": ..., "log": ...}
    {"code": 0}                                   as the exit code of `eopd STAGE` would be

Imports, engines and their weights stay between tasks. After IDLE_SECONDS without a task the engines give their
memory back; after a task that failed and at the end of stdin the process ends. What a task prints goes to its log,
its progress to its events.
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.pipeline.launchers.processes import end_with_parent_if_spawned

if TYPE_CHECKING:
    from eopd.pipeline.plan import Stage
    from eopd.stages.engines.kept import Engines

end_with_parent_if_spawned()

IDLE_SECONDS = 120.0


@dataclass(frozen=True)
class Order:
    """A task as it travels."""

    stage: Stage
    config: str  # path of the run's resolved settings
    round: int
    parts: list[int] | None  # null: all
    events: str | None  # file that progress goes to
    log: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Order:
        return cls(**json.loads(line))


def main() -> None:
    from eopd.pipeline.ends import EXIT_INTERRUPTED, be_quiet
    from eopd.pipeline.temporary import temporary_folder
    from eopd.stages.engines.kept import Engines
    from eopd.storage.stopping import Stopped, stopping_on_signals

    be_quiet()
    engines = Engines(keep=True)
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as answers:
        try:
            with stopping_on_signals(_tell_stop), temporary_folder():
                for order in _orders(engines):
                    code = do(order, engines)
                    answers.write(json.dumps({"code": code}) + "\n")
                    answers.flush()
                    if code:  # who knows what a failure left in this process, or on its GPU
                        break
        except (Stopped, KeyboardInterrupt):
            sys.exit(EXIT_INTERRUPTED)
    engines.close()


def do(order: Order, engines: Engines) -> int:
    """Do a task; the exit code that tells how it ended."""
    from eopd.pipeline.config import load_config
    from eopd.pipeline.ends import log_end, tell_end
    from eopd.pipeline.planning import plan_run
    from eopd.pipeline.progress import EventProgress
    from eopd.pipeline.runner import Runner
    from eopd.stages.job import NullProgress
    from eopd.stages.output import output_to

    progress = EventProgress(Path(order.events)) if order.events else NullProgress()
    with output_to(Path(order.log)):
        try:
            settings = load_config(order.config)
            runner = Runner(settings, *plan_run(settings), progress, engines)
            job = runner.plan.job(order.stage, order.round)
            runner.run(job, order.parts)
            sys.stdout.write(f"{job.name}: done\n")  # `logs.errors` shows none from before
        except Exception as error:  # the boundary: who gave the task decides what becomes of the run
            log_end(error)
            return tell_end(error, progress)
    return 0


def _orders(engines: Engines) -> Iterator[Order]:
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], IDLE_SECONDS if engines.any_open else None)
        if not ready:
            engines.close()
            continue
        line = sys.stdin.readline()
        if not line:
            return
        yield Order.from_json(line)


def _tell_stop() -> None:
    # not through sys.stderr: the signal may have come while something was being written to it
    os.write(2, b"stopping: what is in hand is finished first\n")


if __name__ == "__main__":
    main()
