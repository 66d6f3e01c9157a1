"""Tasks on a Ray cluster, under the scheduler: Ray places them; those of a lost node are done elsewhere.

Training on several nodes is torchrun on each node of a placement group. Ray Train would bring its own loop, reports
and checkpoints around ours, which already resumes exactly; torchrun is what every other launcher uses, too.
"""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eopd.pipeline.config import ConfigError, RunSettings
from eopd.pipeline.launchers.base import Kind, Outcome, Task
from eopd.pipeline.launchers.processes import TORCHRUN, gpus_of, kind_of, last_words, stage_command
from eopd.pipeline.launchers.ray.cluster import connect, first_sentence
from eopd.pipeline.launchers.ray.settings import RayResources
from eopd.pipeline.logs import log_name
from eopd.pipeline.plan import Stage
from eopd.pipeline.progress import EVENTS_VARIABLE, Display, Replay
from eopd.storage.files import is_full

GIB = 1024**3
LOOK_SECONDS = 0.2
Need = Mapping[str, float]  # Ray's names of resources -> how much


@dataclass
class Worker:
    task: Task
    need: Need
    slot: int
    log: Path
    log_start: int  # bytes that were in the log before
    events: Path
    replay: Replay
    running: dict[Any, int]  # what Ray will answer with -> rank of the node, for training on several
    group: Any = None  # placement group
    outcome: Outcome | None = None


class RayPool:
    """Ray tasks, one a worker."""

    def __init__(self, settings: RunSettings, display: Display) -> None:
        self._ray = connect(settings.launcher.ray)
        self._settings, self._display = settings, display
        self._workers: list[Worker] = []
        self._had_room: set[Stage] = set()

    def room(self, stage: Stage) -> int:
        """As many as the nodes hold, by what is alive and what runs; Ray itself queues what comes too early.

        Raises:
            ConfigError: no node is large enough.
        """
        most = self._settings.launcher.ray.workers
        if most is not None:
            return max(most - len(self._workers), 0)
        need = self._need(stage)
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        fit = sum(min(math.floor(node.get(name, 0) / amount) for name, amount in need.items()) for node in nodes)
        fit //= self._resources(stage).nodes if stage == "train" else 1
        if fit:
            self._had_room.add(stage)
        elif stage not in self._had_room:
            largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in need}
            raise ConfigError(
                f"{stage} asks for {_words(need)} on a node, more than any of the Ray cluster's {len(nodes)} nodes has "
                f"(at most {_words(largest)}). Lower launcher.ray.{stage}, or set launcher.ray.workers where nodes "
                "come by autoscaling."
            )
        busy = sum(max(worker.need.get(name, 0) / amount for name, amount in need.items()) for worker in self._workers)
        return max(math.floor(fit - busy), 0)

    def start(self, task: Task) -> None:
        paths, job = task.runner.paths, task.job
        slot = min(set(range(len(self._workers) + 1)) - {worker.slot for worker in self._workers})
        paths.logs.mkdir(parents=True, exist_ok=True)
        log = (paths.logs / log_name(job.stage, job.round, slot)).absolute()
        events = (paths.logs / f".events-{secrets.token_hex(4)}.jsonl").absolute()
        start = log.stat().st_size if log.exists() else 0
        need = self._need(job.stage)
        worker = Worker(task, need, slot, log, start, events, Replay(events, self._display.open()), {})
        nodes = self._resources(job.stage).nodes if job.stage == "train" else 1
        if nodes == 1:
            worker.running[self._submit(worker, stage_command(task), need)] = 0
        else:
            self._start_together(worker, nodes)
        self._workers.append(worker)

    def wait(self, seconds: float) -> list[Outcome]:
        waited = 0.0
        while True:
            for worker in self._workers:
                worker.replay.catch_up()
                self._take_in(worker)
            ended = [worker for worker in self._workers if worker.outcome is not None and not worker.running]
            if ended or waited >= seconds:
                return [self._end(worker) for worker in ended]
            running = [answer for worker in self._workers for answer in worker.running]
            self._ray.wait(running, num_returns=1, timeout=LOOK_SECONDS) if running else time.sleep(LOOK_SECONDS)
            waited += LOOK_SECONDS

    def close(self) -> None:
        try:
            for worker in self._workers:
                self._cancel(worker)
            while self._workers:
                self.wait(1.0)
        finally:
            for worker in self._workers:
                self._cancel(worker, force=True)
                worker.events.unlink(missing_ok=True)
            self._ray.shutdown()

    # -- tasks -------------------------------------------------------------------------------------------------

    def _submit(self, worker: Worker, arguments: Sequence[str], need: Need, meeting: Any = None, **place: Any) -> Any:
        from eopd.pipeline.launchers.ray.node import do

        options = _options(need) | {"max_retries": 0, "name": worker.task.name} | place
        environment = {EVENTS_VARIABLE: str(worker.events)}
        return (
            self._ray.remote(do)
            .options(**options)
            .remote(list(arguments), os.getcwd(), str(worker.log), environment, meeting)
        )

    def _start_together(self, worker: Worker, nodes: int) -> None:
        """torchrun on ``nodes`` nodes of their own; they meet at the first one."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from eopd.pipeline.launchers.ray.node import meeting_place

        worker.group = placement_group([dict(worker.need)] * nodes, strategy="STRICT_SPREAD")
        on = [PlacementGroupSchedulingStrategy(worker.group, placement_group_bundle_index=n) for n in range(nodes)]
        meeting = self._ray.remote(meeting_place).options(num_cpus=0, scheduling_strategy=on[0]).remote()
        processes = worker.task.runner.settings.train.processes
        for rank in range(nodes):
            torchrun = [
                *(*TORCHRUN, f"--nnodes={nodes}", f"--node-rank={rank}"),
                *(f"--nproc-per-node={processes}", "--master-addr={host}", "--master-port={port}"),
                *("-m", "eopd.pipeline.cli", *worker.task.arguments()),
            ]
            answer = self._submit(worker, torchrun, worker.need, meeting, scheduling_strategy=on[rank])
            worker.running[answer] = rank

    def _take_in(self, worker: Worker) -> None:
        """What Ray has answered meanwhile. When one of several nodes fails, the others are stopped."""
        if not worker.running:
            return
        done, _ = self._ray.wait(list(worker.running), num_returns=len(worker.running), timeout=0)
        for answer in done:
            del worker.running[answer]
            outcome = self._outcome(worker, answer)
            if worker.outcome is None or worker.outcome.kind == "done":
                worker.outcome = outcome
            if outcome.kind != "done":
                self._cancel(worker)

    def _outcome(self, worker: Worker, answer: Any) -> Outcome:
        from ray.exceptions import RayError, RayTaskError

        try:
            code = self._ray.get(answer)
        except RayTaskError as error:  # the command could not be started on that node
            kind: Kind = "full" if is_full(error.cause) else "failed"
            return Outcome(worker.task, kind, f"{error.cause!r} (log: {worker.log})")
        except RayError as error:  # its node or its process is gone, or it was cancelled
            return Outcome(worker.task, "lost", first_sentence(error))
        worker.replay.catch_up()
        kind, message = worker.replay.end or (kind_of(code), "")
        if kind == "done" or code == 0:
            return Outcome(worker.task, "done")
        words = message or last_words(worker.log, worker.log_start, code)
        return Outcome(worker.task, kind, f"{words} (log: {worker.log})")

    def _cancel(self, worker: Worker, *, force: bool = False) -> None:
        for answer in worker.running:
            self._ray.cancel(answer, force=force)

    def _end(self, worker: Worker) -> Outcome:
        from ray.util.placement_group import remove_placement_group

        self._workers.remove(worker)
        worker.replay.close()
        worker.events.unlink(missing_ok=True)
        if worker.group is not None:
            remove_placement_group(worker.group)
        assert worker.outcome is not None
        return worker.outcome

    # -- resources ---------------------------------------------------------------------------------------------

    def _resources(self, stage: Stage) -> RayResources:
        resources: RayResources = getattr(self._settings.launcher.ray, stage)
        return resources

    def _need(self, stage: Stage) -> Need:
        asked = self._resources(stage)
        gpus = asked.gpus
        if gpus is None:
            gpus = gpus_of(self._settings, stage) if self._ray.cluster_resources().get("GPU") else 0
        need = {"CPU": asked.cpus, "GPU": gpus, "memory": (asked.memory_gib or 0) * GIB, **asked.custom}
        return {name: amount for name, amount in need.items() if amount} or {"CPU": 0.001}


def _options(need: Need) -> dict[str, Any]:
    """As ``.options`` of a remote function wants them."""
    named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    options: dict[str, Any] = {"num_cpus": 0}
    options |= {named[name]: amount for name, amount in need.items() if name in named}
    return options | {"resources": {name: amount for name, amount in need.items() if name not in named}}


def _words(amounts: Need) -> str:
    return ", ".join(f"{amount / GIB if name == 'memory' else amount:g} {name}" for name, amount in amounts.items())
