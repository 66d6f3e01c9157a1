"""Resumable states of a training job, under the commit rule of all artifacts.

Part 0 of the ``progress`` artifact holds the result of the round-start pass; part s holds the state after optimiser
step s: trained weights, optimiser moments, averaged weights if any, and the metrics of every step so far. An older
state is pruned once a newer one is committed; all are removed when the checkpoint is committed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from eopd.storage.artifacts import Artifact
from eopd.storage.jsonl import read_whole
from eopd.storage.paths import OPTIMIZER_FILE, ROUND_START_FILE

WEIGHTS_FILE = "weights.safetensors"
EMA_FILE = "ema.safetensors"
STEPS_FILE = "steps.jsonl"


@dataclass(frozen=True)
class RoundStart:
    """The policy's own log-probs and entropies before the round's first update."""

    logprob: NDArray[np.float32]  # [T of the round] q_old, nats
    entropy: NDArray[np.float32]  # [T of the round] nats
    weight: NDArray[np.float32] | None = None  # [T of the round] of each response's loss; None: all 1

    def save(self, folder: Path) -> None:
        weight = {} if self.weight is None else {"weight": self.weight}
        save_arrays({"logprob": self.logprob, "entropy": self.entropy, **weight}, folder / ROUND_START_FILE)


@dataclass(frozen=True)
class State:
    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor]  # empty where no average is kept
    metrics: list[dict[str, Any]]


class States:
    """Reads and writes the states of one training job."""

    def __init__(self, artifact: Artifact, keep: int) -> None:
        self._artifact = artifact
        self._keep = keep

    def round_start(self) -> RoundStart | None:
        if not self._artifact.is_committed(0):
            return None
        arrays = load_arrays(self._artifact.part_folder(0) / ROUND_START_FILE)
        return RoundStart(arrays["logprob"], arrays["entropy"], arrays.get("weight"))

    def save_round_start(self, start: RoundStart) -> None:
        with self._artifact.write_part(0) as folder:
            start.save(folder)

    def newest_step(self) -> int | None:
        return max(self._artifact.committed() - {0}, default=None)

    def folder(self, step: int) -> Path:
        return self._artifact.part_folder(step)

    def newest(self) -> State | None:
        """Return the state after the latest committed step, or None if there is none."""
        step = self.newest_step()
        if step is None:
            return None
        folder = self.folder(step)
        return State(
            step=step,
            weights=load_file(folder / WEIGHTS_FILE),
            optimizer=load_file(folder / OPTIMIZER_FILE),
            ema=load_file(folder / EMA_FILE) if (folder / EMA_FILE).exists() else {},
            metrics=read_whole(folder / STEPS_FILE),
        )

    def save(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        ema: Mapping[str, Tensor],
        metrics: list[Any],
    ) -> None:
        assert step > 0
        with self._artifact.write_part(step) as folder:
            save_file(dict(weights), folder / WEIGHTS_FILE)
            save_file(dict(optimizer), folder / OPTIMIZER_FILE)
            if ema:
                save_file(dict(ema), folder / EMA_FILE)
            write_jsonl(folder / STEPS_FILE, metrics)
        for old in sorted(self._artifact.committed() - {0})[: -self._keep]:
            self._artifact.drop_part(old)

    def clear(self) -> None:
        shutil.rmtree(self._artifact.folder, ignore_errors=True)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows), encoding="utf-8")
