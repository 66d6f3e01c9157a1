"""Tasks on a Ray cluster under our scheduler: Ray places them; tasks of a lost node run elsewhere.

Training on several nodes is torchrun on each node of a placement group. Ray Train would bring a loop, reports and
checkpoints of its own around ours, which already resume exactly; torchrun is what every other launcher uses, too.
"""

from __future__ import annotations

import math
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eopd.pipeline.config import ConfigError, RunSettings
from eopd.pipeline.errors import Outcome
from eopd.pipeline.launchers.settings import RayResources, RaySettings
from eopd.pipeline.logs import log_name
from eopd.pipeline.processes import Leader, last_line, worker_command
from eopd.pipeline.progress import Display, Replay
from eopd.pipeline.tasks import Task
from eopd.stages.stage import Stage
from eopd.storage.errors import installing
from eopd.storage.files import is_full

GIB = 1024**3
LOOK_SECONDS = 0.2
NODE_POLL_SECONDS = 0.1
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # pages of a dead node's state on stdout; the scheduler says that it is lost
}
Need = Mapping[str, float]  # Ray's names of resources -> how much


@dataclass
class Running:
    """A task that Ray is running."""

    task: Task
    need: Need
    slot: int
    log: Path
    log_start: int  # bytes that were in the log before
    events: Path
    replay: Replay
    answers: dict[Any, int]  # Ray's references -> rank of the node, for training on several
    group: Any = None  # placement group
    outcome: Outcome | None = None


class RayPool:
    """A pool in which each task is one Ray task, or one per node."""

    def __init__(self, settings: RunSettings, display: Display) -> None:
        self._ray = connect(settings.launcher.ray)
        self._settings, self._display = settings, display
        self._running: list[Running] = []
        self._had_room: set[str] = set()

    # -- the pool ------------------------------------------------------------------------------------------------

    def room(self, stage: Stage) -> int:
        """Return how many more tasks the live nodes can hold; Ray queues tasks that come too early.

        Raises:
            ConfigError: no node is large enough.
        """
        most = self._settings.launcher.ray.workers
        if most is not None:
            return max(most - len(self._running), 0)
        need, ray = self._need(stage), self._settings.launcher.ray
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        fit = sum(min(math.floor(node.get(name, 0) / amount) for name, amount in need.items()) for node in nodes)
        fit //= self._nodes(stage)
        if fit:
            self._had_room.add(stage.name)
        elif stage.name not in self._had_room:
            largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in need}
            raise ConfigError(
                f"{stage.name} asks for {_words(need)} on a node, more than any of the Ray cluster's {len(nodes)} "
                f"nodes has (at most {_words(largest)})",
                setting=f"launcher.ray.{ray.group(stage.command)}",
                remedy=f"Lower launcher.ray.{ray.group(stage.command)}, or set launcher.ray.workers if nodes come "
                "by autoscaling.",
            )
        busy = sum(max(one.need.get(name, 0) / amount for name, amount in need.items()) for one in self._running)
        return max(math.floor(fit - busy), 0)

    def start(self, task: Task) -> None:
        paths, stage = task.run.paths, task.job.stage
        slot = min(set(range(len(self._running) + 1)) - {running.slot for running in self._running})
        paths.logs.mkdir(parents=True, exist_ok=True)
        log = (paths.logs / log_name(task.job, slot)).absolute()
        events = (paths.logs / f".events-{secrets.token_hex(4)}.jsonl").absolute()
        start = log.stat().st_size if log.exists() else 0
        need = self._need(stage)
        running = Running(task, need, slot, log, start, events, Replay(events, self._display.open()), {})
        if self._nodes(stage) == 1:
            command = worker_command(task.processes, task.to_json(events=events))
            running.answers[self._submit(running, command)] = 0
        else:
            self._start_together(running)
        self._running.append(running)

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        waited = 0.0
        while True:
            for running in self._running:
                running.replay.catch_up()
                self._collect(running)
            ended = [one for one in self._running if one.outcome is not None and not one.answers]
            if ended or waited >= seconds:
                return [(running.task, self._end(running)) for running in ended]
            answers = [answer for running in self._running for answer in running.answers]
            self._ray.wait(answers, num_returns=1, timeout=LOOK_SECONDS) if answers else time.sleep(LOOK_SECONDS)
            waited += LOOK_SECONDS

    def close(self) -> None:
        try:
            for running in self._running:
                self._cancel(running)
            while self._running:
                self.wait(1.0)
        finally:
            for running in self._running:
                self._cancel(running, force=True)
                running.events.unlink(missing_ok=True)
            self._ray.shutdown()

    # -- tasks ---------------------------------------------------------------------------------------------------

    def _submit(self, running: Running, command: Sequence[str], meeting: Any = None, **place: Any) -> Any:
        options = _options(running.need) | {"max_retries": 0, "name": running.task.name} | place
        remote = self._ray.remote(run_on_node).options(**options)
        return remote.remote(list(command), os.getcwd(), str(running.log), meeting)

    def _start_together(self, running: Running) -> None:
        """Start torchrun on several nodes; the processes meet at the first one."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        task, nodes = running.task, self._nodes(running.task.job.stage)
        running.group = placement_group([dict(running.need)] * nodes, strategy="STRICT_SPREAD")
        on = [PlacementGroupSchedulingStrategy(running.group, placement_group_bundle_index=n) for n in range(nodes)]
        meeting = self._ray.remote(meeting_place).options(num_cpus=0, scheduling_strategy=on[0]).remote()
        text = task.to_json(events=running.events)
        for rank in range(nodes):
            torchrun = (f"--nnodes={nodes}", f"--node-rank={rank}", "--master-addr={host}", "--master-port={port}")
            command = worker_command(max(task.processes, 1), text, torchrun=torchrun)
            running.answers[self._submit(running, command, meeting, scheduling_strategy=on[rank])] = rank

    def _collect(self, running: Running) -> None:
        """Collect results from Ray. If one of several nodes fails, stop the others."""
        if not running.answers:
            return
        done, _ = self._ray.wait(list(running.answers), num_returns=len(running.answers), timeout=0)
        for answer in done:
            del running.answers[answer]
            outcome = self._outcome(running, answer)
            if running.outcome is None or running.outcome.kind == "done":
                running.outcome = outcome
            if outcome.kind != "done":
                self._cancel(running)

    def _outcome(self, running: Running, answer: Any) -> Outcome:
        from ray.exceptions import RayError, RayTaskError

        try:
            code = self._ray.get(answer)
        except RayTaskError as error:  # the worker could not be started on that node
            return Outcome("full" if is_full(error.cause) else "failed", f"{error.cause!r} (log: {running.log})")
        except RayError as error:  # its node or its process is gone, or it was cancelled
            return Outcome("lost", first_sentence(error))
        running.replay.catch_up()
        outcome = running.replay.outcome
        if outcome is None or (code and outcome.kind == "done"):
            outcome = Outcome.from_exit(code, last_line(running.log, running.log_start, code) if code else "")
        if outcome.kind == "done":
            return outcome
        return replace(outcome, message=f"{outcome.message} (log: {running.log})")

    def _cancel(self, running: Running, *, force: bool = False) -> None:
        for answer in running.answers:
            self._ray.cancel(answer, force=force)

    def _end(self, running: Running) -> Outcome:
        from ray.util.placement_group import remove_placement_group

        self._running.remove(running)
        running.replay.close()
        running.events.unlink(missing_ok=True)
        if running.group is not None:
            remove_placement_group(running.group)
        assert running.outcome is not None
        return running.outcome

    # -- resources -----------------------------------------------------------------------------------------------

    def _resources(self, stage: Stage) -> RayResources:
        return self._settings.launcher.ray.of(stage.command)

    def _nodes(self, stage: Stage) -> int:
        return self._resources(stage).nodes if stage.spans_nodes and stage.gpus(self._settings) else 1

    def _need(self, stage: Stage) -> Need:
        resources, needed = self._resources(stage), stage.gpus(self._settings)
        gpus = resources.gpus if needed else 0
        if gpus is None:
            gpus = needed if self._ray.cluster_resources().get("GPU") else 0
        memory = (resources.memory_gib or 0) * GIB
        need = {"CPU": resources.cpus, "GPU": gpus, "memory": memory, **resources.custom}
        return {name: amount for name, amount in need.items() if amount} or {"CPU": 0.001}


def _options(need: Need) -> dict[str, Any]:
    """Return the arguments of a remote function's ``.options``."""
    names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    options: dict[str, Any] = {"num_cpus": 0}
    options |= {names[name]: amount for name, amount in need.items() if name in names}
    return options | {"resources": {name: amount for name, amount in need.items() if name not in names}}


def _words(amounts: Need) -> str:
    return ", ".join(f"{amount / GIB if name == 'memory' else amount:g} {name}" for name, amount in amounts.items())


# -- on the nodes ----------------------------------------------------------------------------------------------------


def run_on_node(arguments: Sequence[str], folder: str, log: str, meeting: tuple[str, int] | None) -> int:
    """Run ``python ARGUMENTS`` in ``folder``, its output appended to ``log``; returns its exit code.

    A separate process frees memory and GPUs whatever happens, and loses no more than its current part if it is killed.

    Args:
        meeting: host and port at which processes of several nodes meet, for {host} and {port} in options.
    """
    if meeting is not None:
        host, port = meeting
        arguments = [
            argument.format(host=host, port=port) if argument.startswith("--master-") else argument
            for argument in arguments
        ]
    with open(log, "ab") as output:
        process = Leader(arguments, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    stopped = False
    while True:
        try:
            while process.poll() is None:
                time.sleep(NODE_POLL_SECONDS)  # not wait(): Ray's cancellation comes between two instructions
            return process.returncode
        except KeyboardInterrupt:  # cancelled: the current part is committed, then the process exits
            if not stopped:  # Ray may say it again, and a second signal would stop the worker at once
                process.send_signal(signal.SIGTERM)  # Ray's processes ignore SIGINT, and so do their children
            stopped = True


def meeting_place() -> tuple[str, int]:
    """Return the address of this node and a port that is free on it now."""
    import ray

    host: str = ray.util.get_node_ip_address()
    with socket.socket() as one:
        one.bind((host, 0))
        port: int = one.getsockname()[1]
    return host, port


# -- the cluster -----------------------------------------------------------------------------------------------------


def connect(settings: RaySettings) -> Any:
    """The `ray` module, connected to the cluster of the settings.

    Raises:
        ConfigError: ray is not installed, or there is no cluster at the address.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"launcher.kind is ray, but ray is not installed. To add it, {installing('ray')}", setting="launcher.kind"
        ) from error
    if not ray.is_initialized():
        handler = signal.getsignal(signal.SIGTERM)  # Ray puts a handler of its own in its place
        try:
            ray.init(
                address=settings.address,
                runtime_env=settings.runtime_env or None,
                log_to_driver=False,  # workers write to the run's logs
                logging_level="ERROR",
                include_dashboard=False if settings.address == "local" else None,
            )
        except (ConnectionError, RuntimeError) as error:
            raise ConfigError(
                f"launcher.ray.address {settings.address!r}: {first_sentence(error)}",
                setting="launcher.ray.address",
                remedy="Start a cluster with `ray start --head`, or use address: local.",
            ) from error
        finally:
            signal.signal(signal.SIGTERM, handler)
    return ray


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error of Ray, which continues with advice to developers."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line.partition(". ")[0] for line in lines if line), type(error).__name__)
