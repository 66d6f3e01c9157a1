"""From artifacts to what the report shows, and to ``summary.json``.

Round 0 is the first student: its figures of entropy and divergence come from the first step of training, taken with
its weights on its own fresh rollouts. Round r > 0 is the student that training round r - 1 made: Avg@k and Pass@k are
its own; the others are means over the last epoch of that training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from eopd.stages.report.data import (
    CostRow,
    Estimate,
    Histogram,
    RolloutView,
    RoundData,
    RunData,
    StepRow,
)
from eopd.storage import evaluations
from eopd.storage.artifacts import Artifact
from eopd.storage.rollouts import read_rollouts
from eopd.storage.sources import filled_parts
from eopd.storage.teacher_cache import TeacherCache

ENTROPY_EDGES = [round(0.1 * i, 1) for i in range(41)]
ROLLOUTS_SHOWN = 12
BOOTSTRAP = 2000
FIGURES = ("student_entropy", "teacher_entropy", "gate_fraction", "rkl", "fkl")


@dataclass(frozen=True)
class RoundArtifacts:
    """What round ``round`` made; None where there is nothing complete."""

    round: int
    evaluation: Artifact | None  # of the student at the start of the round
    rollouts: Artifact | None = None
    scores: Artifact | None = None
    checkpoint: Artifact | None = None


@dataclass(frozen=True)
class RunArtifacts:
    name: str
    settings: dict[str, Any]
    rounds: Sequence[RoundArtifacts]
    tokenizer: str  # folder
    tau: float | None
    metrics: Path  # the run's metrics.jsonl, with timings
    jobs: Path  # the run's jobs.jsonl


def gather(run: RunArtifacts) -> RunData:
    """Everything that is complete. What is missing is left out, not guessed."""
    results = {found.round: _results(found.evaluation) for found in run.rounds if found.evaluation}
    rounds = [_round(found.round, results.get(found.round), run.rounds) for found in run.rounds]
    trained = [found for found in run.rounds if found.checkpoint]
    scored = [found for found in run.rounds if found.rollouts and found.scores]
    avg, passed = _gains(run.rounds)
    return RunData(
        name=run.name,
        settings=run.settings,
        rounds=rounds,
        training=_training(run, trained),
        entropy_histogram_teacher=_teacher_histogram(scored[-1].scores) if scored else None,
        entropy_histogram_student=_student_histogram(trained[-1].checkpoint) if trained else None,
        rollouts=[view for found in _first_and_last(scored) for view in _views(found, run.tokenizer)],
        cost=_costs(run),
        threshold=run.tau,
        interval="95 % bootstrap over problems",
        avg_gain=avg,
        pass_gain=passed,
    )


def summary_rows(data: RunData, k: int) -> list[dict[str, Any]]:
    """One row a round for ``summary.json``."""
    rows = []
    for found in data.rounds:
        row: dict[str, Any] = {"round": found.round}
        row[f"avg_at_{k}"] = found.avg_at_k.get(k)
        row[f"pass_at_{k}"] = found.pass_at_k.get(k)
        row.update({name: getattr(found, name) for name in FIGURES})
        row["distinct_correct"] = found.distinct_correct
        rows.append(row)
    return rows


def _results(evaluation: Artifact) -> dict[str, Any]:
    path = evaluation.part_folder(evaluation.parts - 1) / evaluations.RESULTS
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _round(number: int, results: dict[str, Any] | None, rounds: Sequence[RoundArtifacts]) -> RoundData:
    figures = _figures_of(number, rounds)
    if results is None:
        return RoundData(round=number, **figures)
    mean, benchmarks = results["mean"], list(results["benchmarks"].values())
    samples = benchmarks[0]["samples"]
    return RoundData(
        round=number,
        avg_at_k={samples: mean["avg_at_k"]},
        avg_interval={samples: tuple(mean["avg_interval"])},
        pass_at_k={int(k): value for k, value in mean["pass_at_k"].items()},
        pass_interval={int(k): tuple(value) for k, value in mean["pass_interval"].items()},
        truncation_rate=_mean(found["truncation_rate"] for found in benchmarks),
        response_length=_mean(found["response_tokens"]["mean"] for found in benchmarks),
        distinct_correct=mean["distinct_correct"],
        **figures,
    )


def _figures_of(number: int, rounds: Sequence[RoundArtifacts]) -> dict[str, Any]:
    trained = {found.round: found.checkpoint for found in rounds if found.checkpoint}
    source = trained.get(max(number - 1, 0))
    if source is None:
        return {}
    steps = _steps(source)
    chosen = steps[:1] if number == 0 else [row for row in steps if row["epoch"] == steps[-1]["epoch"]]
    weights = np.asarray([row["tokens"] for row in chosen])
    figures: dict[str, Any] = {}
    if number > 0:
        figures["tokens"] = int(sum(row["tokens"] for row in steps if row["epoch"] == 0))
    for name in FIGURES:
        if all(name in row for row in chosen):
            figures[name] = float(np.average([row[name] for row in chosen], weights=weights))
    return figures


def _steps(checkpoint: Artifact) -> list[dict[str, Any]]:
    path = checkpoint.remaining_folder(0) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _training(run: RunArtifacts, trained: Sequence[RoundArtifacts]) -> list[StepRow]:
    """Steps from the checkpoints; speed from the run's own file, where a step stands there."""
    speeds: dict[tuple[int, int], float] = {}
    if run.metrics.exists():
        for line in run.metrics.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            speeds[row["round"], row["step"]] = row.get("tokens_per_s")
    rows = []
    for found in trained:
        assert found.checkpoint is not None
        for row in _steps(found.checkpoint):
            rows.append(StepRow.of({**row, "tokens_per_s": speeds.get((row["round"], row["step"]))}))
    return rows


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _gains(rounds: Sequence[RoundArtifacts]) -> tuple[Estimate | None, Estimate | None]:
    """Last minus first Avg@k and Pass@k over the same problems, with a paired bootstrap over them."""
    evaluated = [found.evaluation for found in rounds if found.evaluation]
    if len(evaluated) < 2:
        return None, None
    first, last = (_problems(artifact) for artifact in (evaluated[0], evaluated[-1]))
    if first.keys() != last.keys():
        return None, None
    keys = sorted(first)
    pairs = np.asarray([[first[key], last[key]] for key in keys], np.float64)  # [problems, 2, (correct, samples)]
    share = pairs[:, :, 0] / pairs[:, :, 1]
    solved = pairs[:, :, 0] > 0
    weights = np.asarray([1.0 / sum(key[0] == other[0] for other in keys) for key in keys])
    return _paired(share[:, 1] - share[:, 0], weights), _paired(solved[:, 1] * 1.0 - solved[:, 0], weights)


def _paired(difference: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> Estimate:
    draws = np.random.default_rng(0).integers(0, len(difference), (BOOTSTRAP, len(difference)))
    means = (difference * weights)[draws].sum(axis=1) / weights[draws].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(np.average(difference, weights=weights)), float(low), float(high))


def _problems(evaluation: Artifact) -> dict[tuple[str, str], tuple[int, int]]:
    table = pq.read_table(evaluation.part_folder(evaluation.parts - 1) / evaluations.PROBLEMS).to_pylist()
    return {(row["benchmark"], row["problem_id"]): (row["correct"], row["samples"]) for row in table}


def _histogram(values: np.ndarray[Any, Any]) -> Histogram:
    edges = ENTROPY_EDGES if values.max(initial=0.0) < ENTROPY_EDGES[-1] else [*ENTROPY_EDGES, 20.0]
    counts, _ = np.histogram(np.clip(values, 0.0, 19.9), edges)
    return Histogram(list(edges), counts.tolist())


def _teacher_histogram(scores: Artifact | None) -> Histogram:
    assert scores is not None
    cache = TeacherCache(scores)
    return _histogram(np.concatenate([cache.read_part(part).entropy for part in filled_parts(scores)]))


def _student_histogram(checkpoint: Artifact | None) -> Histogram:
    from safetensors.numpy import load_file

    assert checkpoint is not None
    return _histogram(load_file(checkpoint.part_folder(1) / "round_start.safetensors")["entropy"])


def _first_and_last(found: Sequence[RoundArtifacts]) -> list[RoundArtifacts]:
    return list(found) if len(found) < 2 else [found[0], found[-1]]


def _views(found: RoundArtifacts, tokenizer_folder: str) -> list[RolloutView]:
    """The first rollouts of a round, token by token."""
    from transformers import AutoTokenizer

    assert found.rollouts is not None
    assert found.scores is not None
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    part = next(iter(filled_parts(found.scores)), None)
    if part is None:
        return []
    rows = read_rollouts(found.rollouts.part_folder(part)).slice(0, ROLLOUTS_SHOWN).to_pylist()
    teacher = TeacherCache(found.scores)
    views = []
    for number, row in enumerate(rows):
        scored = teacher.read([(part, number)])
        ids = row["response_token_ids"][: scored.tokens]
        views.append(
            RolloutView(
                prompt=str(tokenizer.decode(row["prompt_token_ids"])),
                tokens=[str(tokenizer.decode([token])) for token in ids],
                entropy=scored.entropy.tolist(),
                logprobs=list(row["logprobs"][: scored.tokens]) if row["logprobs"] else [],
                round=found.round,
                verdict=row["finish_reason"],
            )
        )
    return views


def _costs(run: RunArtifacts) -> list[CostRow]:
    """Seconds of the jobs this run did; a job it found complete was shared, or done by an earlier start of it."""
    seconds: dict[tuple[str, int], float] = {}
    if run.jobs.exists():
        for line in run.jobs.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            key = (row["stage"], row["round"])
            seconds[key] = seconds.get(key, 0.0) + row["seconds"]
    rows = []
    for found in run.rounds:
        stages = (
            ("evaluate", found.evaluation),
            ("rollout", found.rollouts),
            ("score", found.scores),
            ("train", found.checkpoint),
        )
        for stage, artifact in stages:
            if artifact is not None:
                took = seconds.get((stage, found.round))
                size = sum(artifact.marker(part).bytes for part in range(artifact.parts))
                rows.append(CostRow(stage, found.round, took, bytes=size, shared=took is None))
    return rows
