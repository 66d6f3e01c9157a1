"""From artifacts to what the report shows, and to ``summary.json``.

Round r is the student at its start: the first one, or the one that training round r - 1 made. Its figures of entropy
and divergence are those of the round's first step, taken with its weights before any update; the student that the last
training made has none.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eopd.stages.report import aligned, evaluated, heads, words
from eopd.stages.report.data import Histogram, ProblemScores, RoundData, RunData, StepRow
from eopd.stages.report.expenses import Job, costs, seconds_by_key
from eopd.stages.report.scores import asked, gains
from eopd.stages.report.views import TOKENIZER, Judge, nobody, rollout_views
from eopd.storage import evaluations
from eopd.storage.artifacts import Artifact
from eopd.storage.jsonl import read_lines
from eopd.storage.sources import filled_parts
from eopd.storage.teacher_cache import TeacherCache

ENTROPY_EDGES = [round(0.1 * i, 1) for i in range(41)]
_BENCHMARK = "benchmark "  # before its name among an evaluation's inputs
FIGURES = ("student_entropy", "teacher_entropy", "gate_fraction", "rkl", "fkl")


@dataclass(frozen=True)
class RoundArtifacts:
    """What round ``round`` made; None where there is nothing complete."""

    round: int
    evaluation: Artifact | None  # of the student at the start of the round
    rollouts: Artifact | None = None
    scores: Artifact | None = None
    checkpoint: Artifact | None = None
    alignment: Artifact | None = None
    measured: bool = True  # whether the run evaluates that student at all (evaluate.every)


@dataclass(frozen=True)
class RunArtifacts:
    name: str
    settings: dict[str, Any]
    rounds: Sequence[RoundArtifacts]
    tokenizer: str  # folder
    tau: float | None
    metrics: Path  # the run's metrics.jsonl, with timings
    jobs: Path  # the run's jobs.jsonl
    seed: int = 0
    kin: str = ""  # equal for runs that differ in nothing but their seed
    judge: Judge = nobody
    elsewhere: Sequence[Path] = ()  # jobs.jsonl of the other runs on the page
    also_read: Collection[str] = ()  # keys of artifacts that other runs on the page read too


def gather(run: RunArtifacts) -> RunData:
    """Everything that is complete. What is missing is left out, not guessed."""
    results = {found.round: _results(found.evaluation) for found in run.rounds if found.evaluation}
    rounds = [_round(found.round, results.get(found.round), run.rounds) for found in run.rounds]
    trained = [found for found in run.rounds if found.checkpoint]
    scored = [found for found in run.rounds if found.rollouts and found.scores]
    scores = [_scores(found.evaluation, found.round, run.seed) for found in run.rounds if found.evaluation]
    comparable = len(scores) > 1 and asked(scores[0]) == asked(scores[-1])
    avg, passed = (
        gains(scores[0], scores[-1], evaluated.confidence(results[scores[-1].round])) if comparable else (None, None)
    )
    measured = [aligned.read_alignment(found.alignment) for found in run.rounds if found.alignment]
    teacher, student = _histograms(run.rounds)
    readable = (Path(run.tokenizer) / TOKENIZER).exists()
    return RunData(
        name=run.name,
        settings=run.settings,
        rounds=rounds,
        training=_training(run, trained),
        entropy_histogram_teacher=teacher,
        entropy_histogram_student=student,
        by_entropy_bin=aligned.binned(measured[-1], "own") if measured else {},
        first_by_entropy_bin=aligned.binned(measured[-1], "first") if measured else {},
        read_with=aligned.read_with(measured[-1]) if measured else {},
        rollouts=[
            view
            for found in _first_and_last(scored)
            if found.rollouts and found.scores and readable
            for view in rollout_views(found.rollouts, found.scores, found.round, run.tokenizer, run.judge)
        ],
        cost=costs(_jobs(run), seconds_by_key(run.jobs), seconds_by_key(*run.elsewhere), run.also_read),
        threshold=run.tau,
        interval=evaluated.interval(results),
        avg_gain=avg,
        pass_gain=passed,
        scores=scores,
        seed=run.seed,
        kin=run.kin,
        graders=sorted({name for found in results.values() for name in evaluated.graders(found)}),
        head=_heads(run, trained),
        warnings=evaluated.warnings(results),
        notes=[] if readable or not scored else [f"Rollouts are not shown: {run.tokenizer} has no {TOKENIZER}."],
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
    for found in rounds:
        if found.round == number and found.alignment is not None:
            values, figures["intervals"] = aligned.round_figures(aligned.read_alignment(found.alignment))
            figures.update(values)
    figures["measured"] = all(found.measured for found in rounds if found.round == number)
    if results is not None:
        measured, intervals = evaluated.round_figures(results)
        figures |= {**measured, "intervals": {**figures.get("intervals", {}), **intervals}}
        figures["benchmarks"] = evaluated.by_benchmark(number, results)
    return RoundData(round=number, **figures)


def _figures_of(number: int, rounds: Sequence[RoundArtifacts]) -> dict[str, Any]:
    trained = next((found.checkpoint for found in rounds if found.round == number and found.checkpoint), None)
    if trained is None:
        return {}
    steps = _steps(trained)
    first = {name: float(steps[0][name]) for name in FIGURES if name in steps[0]}
    return {**first, "tokens": int(sum(row["tokens"] for row in steps if row["epoch"] == 0))}


def _steps(checkpoint: Artifact) -> list[dict[str, Any]]:
    path = checkpoint.remaining_folder(0) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _training(run: RunArtifacts, trained: Sequence[RoundArtifacts]) -> list[StepRow]:
    """Steps from the checkpoints; speed from the run's own file, where a step stands there."""
    speeds: dict[tuple[int, int], float | None] = {}
    for row in read_lines(run.metrics):
        speeds[row["round"], row["step"]] = row.get("tokens_per_s")
    rows = []
    for found in trained:
        assert found.checkpoint is not None
        for row in _steps(found.checkpoint):
            rows.append(StepRow.of({**row, "tokens_per_s": speeds.get((row["round"], row["step"]))}))
    return rows


def _heads(run: RunArtifacts, trained: Sequence[RoundArtifacts]) -> str:
    """Of all its rounds."""
    read = [heads.read_head(found.scores, run.settings["train"]["objective"]) for found in trained if found.scores]
    return words.joined(sorted(set(read)))


def _scores(evaluation: Artifact, round_: int, seed: int) -> ProblemScores:
    folder = evaluation.part_folder(evaluation.parts - 1)
    columns = ["benchmark", "problem_id", "correct", "samples"]
    table = evaluations.read_problems(folder, columns).to_pylist()
    rows = sorted(table, key=lambda row: (row["benchmark"], row["problem_id"]))
    inputs = evaluation.identity.inputs
    return ProblemScores(
        round=round_,
        names=[f"{row['benchmark']}/{row['problem_id']}" for row in rows],
        benchmarks=[row["benchmark"] for row in rows],
        samples=max(row["samples"] for row in rows),
        seeds=[seed],
        correct=[[row["correct"] for row in rows]],
        sources={key.removeprefix(_BENCHMARK): inputs[key] for key in inputs if key.startswith(_BENCHMARK)},
    )


def _histogram(values: np.ndarray[Any, Any]) -> Histogram:
    edges = ENTROPY_EDGES if values.max(initial=0.0) < ENTROPY_EDGES[-1] else [*ENTROPY_EDGES, 20.0]
    counts, _ = np.histogram(np.clip(values, 0.0, 19.9), edges)
    return Histogram(list(edges), counts.tolist())


def _histograms(rounds: Sequence[RoundArtifacts]) -> tuple[Histogram | None, Histogram | None]:
    """Of the teacher and of the student, on the tokens of one round: the last that has both, else that has either."""
    either = [found for found in rounds if found.scores or _round_start(found)]
    both = [found for found in either if found.scores and _round_start(found)]
    if not either:
        return None, None
    chosen = (both or either)[-1]
    return _teacher_histogram(chosen.scores), _student_histogram(chosen)


def _teacher_histogram(scores: Artifact | None) -> Histogram | None:
    """None where nothing of the scores is left."""
    if scores is None:
        return None
    cache = TeacherCache(scores)
    entropies = [cache.read_part(part).entropy for part in filled_parts(scores)]
    return _histogram(np.concatenate(entropies)) if entropies else None


def _student_histogram(found: RoundArtifacts) -> Histogram | None:
    from safetensors.numpy import load_file

    path = _round_start(found)
    return _histogram(load_file(path)["entropy"]) if path else None


def _round_start(found: RoundArtifacts) -> Path | None:
    """What the student said of the round's tokens at its start; None once it was pruned."""
    if found.checkpoint is None or not found.checkpoint.is_committed(1):
        return None
    return found.checkpoint.part_folder(1) / "round_start.safetensors"


def _first_and_last(found: Sequence[RoundArtifacts]) -> list[RoundArtifacts]:
    return list(found) if len(found) < 2 else [found[0], found[-1]]


def _jobs(run: RunArtifacts) -> list[Job]:
    rows: list[Job] = []
    for found in run.rounds:
        read = sum(row["tokens"] for row in _steps(found.checkpoint)) if found.checkpoint else None
        stages = (
            ("evaluate", found.evaluation, None),
            ("align", found.alignment, None),
            ("rollout", found.rollouts, None),
            ("score", found.scores, None),
            ("train", found.checkpoint, read),
        )
        rows += [(stage, found.round, artifact, tokens) for stage, artifact, tokens in stages if artifact is not None]
    return rows
