"""One result: a whole run of the real stages in this process, over a store that is emptied as it goes.

A killed run goes on after the last round it trained. The rollouts and scores of round 0 do not depend on the
objective: they stay in the seed's store for the other settings. Everything else is deleted once it was used.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eopd.pipeline.config import parse_settings
from eopd.pipeline.inputs import gather_facts
from eopd.pipeline.plan import make_plan
from eopd.pipeline.run import Run
from eopd.pipeline.worker import execute
from eopd.stages.experiment import Experiment
from eopd.stages.train.objectives.settings import own_file_hash
from eopd.storage import records as evaluations
from eopd.storage.artifacts import Artifact
from eopd.storage.jsonl import append_line, read_lines
from eopd.storage.stacked import StackedStores
from examples.study import alignment, results
from examples.study.design import HERE, Task

STAGES: tuple[str, ...] = ("rollout", "score", "train")  # of a round
COUNTS: dict[str, tuple[str, ...]] = {"rollout": ("responses", "tokens"), "score": ("score_bytes",)}
WINDOWS = 8  # a run's training figures are kept as means over this many equal stretches
FIGURES = ("loss", "gate_fraction", "student_entropy", "teacher_entropy", "fkl", "rkl", "top1_agreement", "clipped")


def run(task: Task, work: Path, folder: Path) -> Path:
    """Make the result of ``task`` below ``folder``; intermediate files lie below ``work``. Returns its path."""
    opened = open_task(task, work)
    settings = opened.settings
    first, jobs = _first_missing(opened), _read_jobs(opened)
    for round_ in range(first, settings.rounds):
        for stage in STAGES:
            _do(opened, stage, round_, jobs)
        _sweep(opened, round_)
    _do(opened, "evaluate", settings.rounds, jobs)
    _do(opened, "evaluation_summary", settings.rounds, jobs)
    clock = Clock()
    content = _content(task, opened)
    content["made"] = made(row["commit"] for row in jobs.values() if "commit" in row)
    content["cost"] = _cost(settings.rounds, jobs) | {"resumed_at_round": first}
    for name, spent in clock.spent().items():
        content["cost"][name] = round(content["cost"][name] + spent, 1)
    path = results.write(task, content, folder)
    _clear(opened)
    return path


Jobs = dict[tuple[int, str], dict[str, Any]]
"""A run's rounds.jsonl: one row a job, by round and stage."""


class Clock:
    """Seconds since it was made, on the wall and of this process's CPU."""

    def __init__(self) -> None:
        self._began = time.monotonic(), time.process_time()

    def spent(self) -> dict[str, float]:
        wall, cpu = self._began
        return {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}


def _do(opened: Run, stage: str, round_: int, jobs: Jobs) -> None:
    """Do a job if it is not done, and write down what it cost and what its artifacts say, before they are deleted.

    That it is begun is written down before: where a process is killed, its own jobs are told from those that another
    setting's run did.
    """
    job = opened.plan.job(stage, round_)
    row: dict[str, Any] = {"round": round_, "stage": stage, "made": not opened.is_done(job), "commit": commit()}
    if row["made"]:
        row["parts_before"] = len(opened.artifact(job.output).committed())
        _write_down(opened, row, jobs)
        clock = Clock()
        row["made"] = execute(opened, job)
        row |= clock.spent()
    elif (round_, stage) in jobs:
        row = jobs[round_, stage]
    _write_down(opened, row | _counts(opened, stage, round_), jobs)


def _write_down(opened: Run, row: dict[str, Any], jobs: Jobs) -> None:
    """A job's row; it takes the place of an earlier one."""
    jobs[row["round"], row["stage"]] = row
    # nothing else may have made the folder: round 0 is often there already, made for another setting
    opened.paths.folder.mkdir(parents=True, exist_ok=True)
    append_line(_jobs_file(opened), row)


def _jobs_file(opened: Run) -> Path:
    return opened.paths.folder / "rounds.jsonl"


def _read_jobs(opened: Run) -> Jobs:
    """What earlier processes wrote down; the last of a job."""
    jobs: Jobs = {}
    for row in read_lines(_jobs_file(opened)):
        if "stage" in row:
            jobs[row["round"], row["stage"]] = row
        else:  # one row a round, of what was stored and not of what it cost: what was written at first
            for stage, names in COUNTS.items():
                counted = {name: row[name] for name in names}
                jobs[row["round"], stage] = {"round": row["round"], "stage": stage, "made": False, **counted}
    return jobs


def _counts(opened: Run, stage: str, round_: int) -> dict[str, int]:
    if stage not in COUNTS:
        return {}
    artifact = opened.artifact(opened.plan.job(stage, round_).output)
    markers = [artifact.marker(part) for part in range(artifact.parts)]
    if stage == "score":
        return {"score_bytes": sum(marker.bytes for marker in markers)}
    return {name: sum(marker.info[name] for marker in markers) for name in COUNTS[stage]}


def open_task(task: Task, work: Path) -> Run:
    """The run of ``task`` below ``work``, with its models and problems made where they are missing."""
    task.experiment.world.prepare(work, task.scale)
    # the plan is made without looking for wider coverages in the store: what is stored is what an experiment varies
    settings = parse_settings(task.config(work), source=task.name)
    facts = gather_facts(settings)
    return Run(
        settings,
        facts,
        make_plan(Experiment(settings, facts)),
        StackedStores.at(settings.store, settings.read_only_stores),
    )


def _first_missing(opened: Run) -> int:
    """The round after the last whose student is there."""
    for round_ in reversed(range(opened.settings.rounds)):
        if opened.is_done(opened.plan.job("train", round_)):
            return round_ + 1
    return 0


def delete(artifact: Artifact) -> None:
    shutil.rmtree(artifact.folder, ignore_errors=True)


def _sweep(opened: Run, round_: int) -> None:
    """Delete what no later round reads."""
    if round_ == 0:
        return
    previous = opened.plan.policy(round_)
    assert previous is not None
    delete(opened.artifact(previous))
    for stage in ("rollout", "score"):
        delete(opened.artifact(opened.plan.job(stage, round_).output))


def _clear(opened: Run) -> None:
    rounds = opened.settings.rounds
    last = opened.plan.policy(rounds)
    assert last is not None
    delete(opened.artifact(last))
    for stage in ("evaluate", "evaluation_summary"):
        delete(opened.artifact(opened.plan.job(stage, rounds).output))
    shutil.rmtree(opened.paths.folder, ignore_errors=True)


def _content(task: Task, opened: Run) -> dict[str, Any]:
    rounds = opened.settings.rounds
    evaluation, summary = (
        opened.artifact(opened.plan.job(stage, rounds).output) for stage in ("evaluate", "evaluation_summary")
    )
    folder = summary.part_folder(0)
    rows = evaluations.PROBLEMS.read(folder).to_pylist()
    (result,) = json.loads((folder / evaluations.RESULTS).read_text(encoding="utf-8"))["benchmarks"].values()
    return {
        "experiment": task.experiment.name,
        "setting": task.setting.name,
        "seed": task.seed,
        "settings": {**task.stated(), "refresh": task.setting.refresh, "evaluates": task.experiment.evaluates},
        "inputs": inputs_of(opened),
        "resolved": _resolved(task, opened),
        "correct": results.encode(row["correct"] for row in rows),
        "distinct": results.encode(row["distinct_correct"] for row in rows),
        "metrics": {name: value for name, value in result.items() if name not in ("skipped",)},
        "alignment": alignment.measure(opened, evaluation, rounds),
        "training": _training(opened),
    }


def inputs_of(opened: Run) -> dict[str, str]:
    """Fingerprints of what a run reads."""
    return {
        "student": opened.facts.student.fingerprint,
        "teacher": opened.facts.teacher.fingerprint,
        "prompts": opened.facts.prompts_fingerprint,
        "problems": opened.facts.benchmarks[0].fingerprint,
        **_source(opened),
    }


def _source(opened: Run) -> dict[str, str]:
    """Of an objective of the study's own: its file's content hash."""
    name = opened.settings.train.objective.name
    return {"objective": own_file_hash(name)} if ":" in name else {}


def _resolved(task: Task, opened: Run) -> dict[str, Any]:
    """Every keyed setting that the run had, without the paths of this machine."""
    result = opened.settings.semantic()
    result["train"]["objective"]["name"] = task.setting.objective["name"]
    return result


def _training(opened: Run) -> dict[str, list[float]]:
    """Figures of the optimiser steps, as means over WINDOWS equal stretches of the run."""
    rows = list(read_lines(opened.paths.metrics))
    result = {}
    for name in FIGURES:
        values = [row[name] for row in rows if name in row]
        if values:
            edges = [len(values) * window // WINDOWS for window in range(WINDOWS + 1)]
            result[name] = [round(sum(values[a:b]) / (b - a), 5) for a, b in itertools.pairwise(edges) if b > a]
    return result


def _cost(rounds: int, jobs: Jobs) -> dict[str, Any]:
    """Of the run's jobs, over all processes that worked on it.

    ``shared``: stages that it never did itself, because another setting's run had; their cost is not in here. None
    where a process was killed after it made something and before it wrote down the cost: then the seconds are too few.
    """
    made = [row for row in jobs.values() if row["made"]]
    whole = all("seconds" in row and not row.get("parts_before") for row in made)
    stages = sorted({row["stage"] for row in made})
    counted = [name for names in COUNTS.values() for name in names]
    cost: dict[str, Any] = {name: sum(row.get(name, 0) for row in jobs.values()) for name in counted}
    cost |= {name: sum(row.get(name, 0.0) for row in made) for name in ("seconds", "cpu_seconds")}
    cost["bytes_per_token"] = round(cost["score_bytes"] / cost["tokens"], 2)
    cost["stage_seconds"] = {
        stage: round(sum(row.get("seconds", 0.0) for row in made if row["stage"] == stage), 1) for stage in stages
    }
    whole = whole and len(jobs) == rounds * len(STAGES) + 2
    cost["shared"] = sorted({row["stage"] for row in jobs.values()} - set(stages)) if whole else None
    return cost


def made(commits: Iterable[str] = ()) -> dict[str, Any]:
    """Where a measurement is from. ``commits``: of the code of all processes that worked on it; ``commit``: of this."""
    names = ("eopd", "torch", "transformers", "numpy", "zarr")
    return {
        "commit": commit(),
        "commits": sorted({commit(), *commits}),
        "on": datetime.now(UTC).date().isoformat(),
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in names}},
    }


@cache
def commit() -> str:
    """The commit of the code that runs, `+` where tracked files outside of results and docs differ from it.

    Found once a process, when it starts: what is committed later is not what runs.
    """
    root = HERE.parent.parent
    if not (root / ".git").exists():
        return "unknown"

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!examples/study/results", ":!docs")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
