"""What was measured: tokens and bytes of committed parts, seconds of finished jobs. What plans are estimated from.

A store may hold hundreds of thousands of markers, so a sample of them is read, spread evenly over what is committed,
and of each stage's jobs only the latest ones.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eopd.pipeline.plan import STAGES, Stage
from eopd.pipeline.survey import JobState
from eopd.storage.artifacts import Artifact, Identity, open_artifact
from eopd.storage.errors import StoreError
from eopd.storage.jsonl import read_lines
from eopd.storage.paths import RunPaths
from eopd.storage.untrusted import MISFITS, read_plain

MARKERS_PER_STAGE = 64
MARKERS_PER_JOB = 8
JOBS_PER_STAGE = 8
OTHER_RUNS = 16


@dataclass(frozen=True)
class Sizes:
    """Sums over the parts that were looked at."""

    parts: int = 0
    responses: int = 0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(
            self.parts + other.parts,
            self.responses + other.responses,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
        )


@dataclass(frozen=True)
class Rate:
    """Seconds of one worker a token, start-up included, and where that was measured."""

    seconds_per_token: float
    source: str


def read_sizes(artifact: Artifact, parts: Iterable[int]) -> Sizes:
    """Of the committed ones of ``parts``; what cannot be read is passed over, `verify` reports it."""
    total = Sizes()
    for part in parts:
        try:
            marker = artifact.marker(part)
        except StoreError:
            continue
        total += Sizes(1, _count(marker.info.get("responses")), _count(marker.info.get("tokens")), marker.bytes)
    return total


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def sample_sizes(find: Callable[[Identity], Artifact], states: Sequence[JobState]) -> dict[str, Sizes]:
    """Artifact key -> sums over some of its committed parts, for jobs spread evenly over those that have any."""
    by_stage: dict[Stage, list[JobState]] = defaultdict(list)
    for state in states:
        if state.done:
            by_stage[state.job.stage].append(state)
    found: dict[str, Sizes] = {}
    for begun in by_stage.values():
        per_job = max(1, min(MARKERS_PER_JOB, MARKERS_PER_STAGE // len(begun)))
        for state in _spread(begun, MARKERS_PER_STAGE):
            artifact = find(state.job.output)
            parts = range(artifact.parts) if state.is_done else sorted(artifact.committed())
            found[artifact.key] = read_sizes(artifact, _spread(parts, per_job))
    return found


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    if len(items) <= most:
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * most)] for i in range(most)]


def measure_rates(store: Path, runs: Path, own: Sequence[str], models: Mapping[Stage, str]) -> dict[Stage, Rate]:
    """Seconds a token of each stage: from these runs' own jobs, else from other runs of the same model below ``runs``.

    Args:
        models: stage -> path of the model it works with, as a resolved config states it.
    """
    rates = _rates(store, [RunPaths(runs / name) for name in own], "this run" if len(own) == 1 else "these runs")
    lacking = [stage for stage in STAGES if stage in models and stage not in rates]
    if not lacking:
        return rates
    others = [path.parent for path in runs.glob("*/jobs.jsonl") if path.parent.name not in own]
    others.sort(key=lambda folder: (folder / "jobs.jsonl").stat().st_mtime, reverse=True)
    for folder in others[:OTHER_RUNS]:
        run = RunPaths(folder)
        usable = [stage for stage in lacking if stage not in rates and _model_of(run, stage) == models[stage]]
        if usable:
            found = _rates(store, [run], f"run {folder.name}")
            rates |= {stage: rate for stage, rate in found.items() if stage in usable}
    return rates


def _model_of(run: RunPaths, stage: Stage) -> str | None:
    try:
        found = yaml.safe_load(read_plain(run.config).decode())
        return str(found["teacher" if stage == "score" else "student"]["path"])
    except (OSError, StoreError, yaml.YAMLError, *MISFITS):
        return None


def _rates(store: Path, runs: Sequence[RunPaths], source: str) -> dict[Stage, Rate]:
    latest: dict[Stage, deque[dict[str, Any]]] = {stage: deque(maxlen=JOBS_PER_STAGE) for stage in STAGES}
    for run in runs:
        before: dict[str, float] = {}  # seconds of a training that was stopped on the way, by key
        for line in read_lines(run.jobs):
            took, parts = line.get("seconds"), line.get("parts")
            if line.get("stage") not in STAGES or not isinstance(took, (int, float)) or not 0 < took < math.inf:
                continue
            key = str(line.get("key"))
            seconds = before.pop(key, 0.0) + took
            if isinstance(parts, int) and parts > 0:
                latest[line["stage"]].append({**line, "seconds": seconds})
            else:
                before[key] = seconds
    rates: dict[Stage, Rate] = {}
    for stage, lines in latest.items():
        seconds, tokens, jobs = 0.0, 0.0, 0
        for line in lines:
            done = _tokens_of(store, stage, str(line["key"]), int(line["parts"]))
            if done:
                seconds, tokens, jobs = seconds + float(line["seconds"]), tokens + done, jobs + 1
        if jobs:
            rates[stage] = Rate(seconds / tokens, f"{source}, {jobs} job{'s' if jobs > 1 else ''}")
    return rates


def _tokens_of(store: Path, stage: Stage, key: str, parts: int) -> float:
    """Tokens of a finished job (of ``parts`` of it), from a few of its markers; 0 where they are gone."""
    kinds = {"rollout": "rollouts", "score": "scores", "train": "rollouts", "evaluate": "evaluations"}
    kind, epochs = kinds.get(stage, "alignments"), 1
    try:
        if stage == "train":
            identity = open_artifact(store, "checkpoints", key).identity
            key, epochs = identity.inputs["rollouts"], int(identity.settings["train"]["epochs"])
        artifact = open_artifact(store, kind, key)
    except (StoreError, KeyError, TypeError, ValueError):
        return 0.0
    committed = sorted(artifact.committed())
    sizes = read_sizes(artifact, _spread(committed, MARKERS_PER_JOB))
    if not sizes.parts:
        return 0.0
    return sizes.tokens / sizes.parts * (artifact.parts * epochs if stage == "train" else parts)
