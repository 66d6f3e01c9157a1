"""Figures in Weights & Biases or Trackio, if `train.trackers` names them. Both have the same three calls.

All rounds of a run are one run there: its id stands in `<run>/trackers.json`, made when the first step is recorded.
Where the figures go (project server, offline folder, keys) is up to the packages' own environment variables, such as
WANDB_MODE=offline.
"""

from __future__ import annotations

import importlib
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eopd.stages.train.settings import Tracker
from eopd.storage.files import create_exclusively

PROJECT = "eopd"
IDS_FILE = "trackers.json"


class Trackers:
    """One run in each of ``names``; does nothing if there are none."""

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
