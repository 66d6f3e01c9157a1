"""Figures of a step: token sums become means; timings are kept apart, since they never repeat exactly.

Artifacts must be the same after a crash and a resume, so only figures that are a function of the data go there;
tokens/s, waiting and memory go to the run folder and TensorBoard.
"""

from __future__ import annotations

import importlib
import json
import resource
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from eopd.stages.train.settings import Tracker
from eopd.storage.files import create_exclusively
from eopd.storage.jsonl import read_lines
from eopd.storage.paths import RunPaths

PROJECT = "eopd"  # in W&B and Trackio
IDS_FILE = "trackers.json"
PER_STEP = ("tokens", "lr", "grad_norm")  # figures that are no sums over tokens
RENAMED = {"gate": "gate_fraction"}


def sum_metrics(into: dict[str, Tensor], figures: Mapping[str, Tensor]) -> None:
    """Add one micro-batch's sums."""
    for name, value in figures.items():
        value = value.detach().double()
        into[name] = into[name] + value if name in into else value


def means(totals: Mapping[str, float]) -> dict[str, float]:
    """Divide sums over tokens by the tokens, under the names that people read."""
    tokens = totals["tokens"]
    figures = {name: totals[name] for name in PER_STEP}
    for name, value in totals.items():
        if name not in PER_STEP:
            figures[RENAMED.get(name, name)] = value / tokens
    if "ratio_squared" in figures:
        variance = figures.pop("ratio_squared") - figures["ratio"] ** 2
        figures["ratio_std"] = max(variance, 0.0) ** 0.5
    return figures


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return token-weighted means of every figure over the steps of a round."""
    weights = [row["tokens"] for row in rows]
    names = sorted({name for row in rows for name in row} - {"tokens", "step", "round", "epoch"})
    figures = {"tokens": float(sum(weights)), "steps": float(len(rows))}
    for name in names:
        pairs = [(row[name], weight) for row, weight in zip(rows, weights, strict=True) if name in row]
        figures[name] = sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
    return figures


def peak_memory_bytes(device: torch.device) -> int:
    """Return this process's peak memory: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Trackers:
    """One run in each of ``names`` (Weights & Biases, Trackio), which have the same three calls.

    All rounds of a run are one run there: its id is in `<run>/trackers.json`, made when the first step is recorded.
    Where the figures go (project server, offline folder, keys) is set by the packages' own environment variables, such
    as WANDB_MODE=offline.
    """

    def __init__(self, names: Sequence[Tracker], run_dir: Path, config: Mapping[str, Any]) -> None:
        """``config``: settings to show beside the figures."""
        self._modules: list[Any] = [importlib.import_module(name) for name in names]
        if not names:
            return
        run_id = _run_id(run_dir)
        for name, module in zip(names, self._modules, strict=True):
            if name == "wandb":
                where = {"id": run_id, "name": run_dir.name, "dir": str(run_dir)}
            else:  # of Trackio's runs, the name is the id
                where = {"name": f"{run_dir.name}-{run_id}"}
            module.init(project=PROJECT, config=dict(config), resume="allow", **where)

    def record(self, figures: Mapping[str, float], step: int) -> None:
        """Record a step; ``step`` counts the optimiser steps of all rounds."""
        for module in self._modules:
            module.log({f"train/{name}": value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        for module in self._modules:
            module.finish()


def _run_id(run_dir: Path) -> str:
    """Return the run's id there, the same in every round and after every restart."""
    path = run_dir / IDS_FILE
    create_exclusively(path, json.dumps({"id": secrets.token_hex(4)}) + "\n")
    run_id: str = json.loads(path.read_text(encoding="utf-8"))["id"]
    return run_id


class RecordingFailed(Exception):
    """A tracker or TensorBoard could not be completed; metrics.jsonl is not affected."""


def _wait_for_a_second_of_its_own(folder: Path) -> None:
    """Wait until no event file of this second can be in ``folder``.

    TensorBoard reads the files of a folder in the order of their names, which begin with the second and end with a
    number that is sorted as text: the tenth file of a process would come before its ninth, and take its steps away.
    """
    deadline = time.monotonic() + 1.5  # a clock that was set back is not waited for
    while time.monotonic() < deadline and any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.05)


class Recorder:
    """Writes a line and TensorBoard scalars per step to the run folder, for people to watch."""

    def __init__(
        self,
        run_dir: Path,
        round_: int,
        first_step: int,
        resumed_at: int,
        trackers: Sequence[Tracker] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        paths = RunPaths(run_dir)
        self._path = paths.metrics
        self._round, self._first = round_, first_step
        run_dir.mkdir(parents=True, exist_ok=True)
        self._recorded = self._forget_steps_from(resumed_at)
        _wait_for_a_second_of_its_own(paths.tensorboard)
        self._board = SummaryWriter(paths.tensorboard, purge_step=first_step + resumed_at)
        self._trackers = Trackers(trackers, run_dir, config or {})

    def _forget_steps_from(self, resumed_at: int) -> int:
        """Drop lines of steps that will be taken again, and of later rounds. Returns how many stay."""
        if not self._path.exists():
            return 0
        kept = []
        for row in read_lines(self._path):  # but the last line of a killed run
            if (row.get("round", 0), row.get("step", 0)) < (self._round, resumed_at):
                kept.append(json.dumps(row, sort_keys=True))
        self._path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        return len(kept)

    def record(self, row: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(row), sort_keys=True) + "\n")
        figures = {name: value for name, value in row.items() if isinstance(value, float)}
        for name, value in figures.items():
            self._board.add_scalar(f"train/{name}", value, self._first + row["step"])
        # trackers drop a step below the last one, so steps are counted over all rounds, whatever the schedule does
        self._trackers.record({**figures, "round": row["round"]}, self._recorded)
        self._recorded += 1

    def close(self) -> None:
        """Flush what was recorded.

        Raises:
            RecordingFailed: a tracker or TensorBoard could not; what was recorded before may be incomplete there.
        """
        failures = []
        for name, close in (("trackers", self._trackers.close), ("TensorBoard", self._board.close)):
            try:
                close()
            except Exception as error:  # a service's own errors; figures are no reason to lose a training
                failures.append(f"{name}: {type(error).__name__}: {error}")
        if failures:
            raise RecordingFailed("; ".join(failures))
