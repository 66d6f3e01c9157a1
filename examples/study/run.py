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
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eopd.pipeline.config import parse_settings
from eopd.pipeline.inspect import gather_facts
from eopd.pipeline.plan import Stage, make_plan
from eopd.pipeline.runner import Runner
from eopd.stages.job import NullProgress
from eopd.stages.train.objectives.settings import own_file_hash
from eopd.storage import evaluations
from eopd.storage.artifacts import Artifact
from examples.study import alignment, results
from examples.study.design import HERE, Task

SAMPLED: tuple[Stage, ...] = ("rollout", "score")
WINDOWS = 8  # a run's training figures are kept as means over this many equal stretches
FIGURES = ("loss", "gate_fraction", "student_entropy", "teacher_entropy", "fkl", "rkl", "top1_agreement", "clipped")


def run(task: Task, work: Path, folder: Path) -> Path:
    """Make the result of ``task`` below ``folder``; intermediate files lie below ``work``. Returns its path."""
    runner = _runner(task, work)
    settings, plan = runner.settings, runner.plan
    began, cpu = time.monotonic(), time.process_time()
    first = _first_missing(runner)
    for round_ in range(first, settings.rounds):
        for stage in SAMPLED:
            runner.run(plan.job(stage, round_))
        _note(runner, round_)
        runner.run(plan.job("train", round_))
        _sweep(runner, round_)
    evaluation = plan.job("evaluate", settings.rounds)
    runner.run(evaluation)
    content = _content(task, runner, runner.artifact(evaluation.output))
    content["cost"] |= {
        "resumed_at_round": first,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }
    path = results.write(task, content, folder)
    _clear(runner)
    return path


def _runner(task: Task, work: Path) -> Runner:
    task.experiment.world.prepare(work, task.scale)
    # the plan is made without looking for wider coverages in the store: what is stored is what an experiment varies
    settings = parse_settings(task.config(work), source=task.name)
    facts = gather_facts(settings)
    return Runner(settings, facts, make_plan(settings, facts), NullProgress())


def _first_missing(runner: Runner) -> int:
    """The round after the last whose student is there."""
    for round_ in reversed(range(runner.settings.rounds)):
        if runner.is_done(runner.plan.job("train", round_)):
            return round_ + 1
    return 0


def _note(runner: Runner, round_: int) -> None:
    """What a round's artifacts say of its cost, before they are deleted."""
    rollouts, scores = (runner.artifact(runner.plan.job(stage, round_).output) for stage in ("rollout", "score"))
    row = {
        "round": round_,
        "responses": sum(rollouts.marker(part).info["responses"] for part in range(rollouts.parts)),
        "tokens": sum(rollouts.marker(part).info["tokens"] for part in range(rollouts.parts)),
        "score_bytes": sum(scores.marker(part).bytes for part in range(scores.parts)),
    }
    # nothing else may have made the folder: round 0 is often there already, made for another setting
    runner.paths.folder.mkdir(parents=True, exist_ok=True)
    with (runner.paths.folder / "rounds.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _delete(artifact: Artifact) -> None:
    shutil.rmtree(artifact.folder, ignore_errors=True)


def _sweep(runner: Runner, round_: int) -> None:
    """Delete what no later round reads."""
    if round_ == 0:
        return
    previous = runner.plan.policy(round_)
    assert previous is not None
    _delete(runner.artifact(previous))
    for stage in ("rollout", "score"):
        _delete(runner.artifact(runner.plan.job(stage, round_).output))


def _clear(runner: Runner) -> None:
    rounds = runner.settings.rounds
    last = runner.plan.policy(rounds)
    assert last is not None
    _delete(runner.artifact(last))
    _delete(runner.artifact(runner.plan.job("evaluate", rounds).output))
    shutil.rmtree(runner.paths.folder, ignore_errors=True)


def _content(task: Task, runner: Runner, evaluation: Artifact) -> dict[str, Any]:
    folder = evaluation.part_folder(evaluation.parts - 1)
    rows = evaluations.read_table(folder / evaluations.PROBLEMS, evaluations.PROBLEMS_SCHEMA).to_pylist()
    (found,) = json.loads((folder / evaluations.RESULTS).read_text(encoding="utf-8"))["benchmarks"].values()
    return {
        "experiment": task.experiment.name,
        "setting": task.setting.name,
        "seed": task.seed,
        "settings": {**task.stated(), "refresh": task.setting.refresh, "evaluates": task.experiment.evaluates},
        "inputs": {
            "student": runner.facts.student.fingerprint,
            "teacher": runner.facts.teacher.fingerprint,
            "prompts": runner.facts.prompts_fingerprint,
            "problems": runner.facts.benchmarks[0].fingerprint,
            **_source(runner),
        },
        "resolved": _resolved(task, runner),
        "correct": results.encode(row["correct"] for row in rows),
        "distinct": results.encode(row["distinct_correct"] for row in rows),
        "metrics": {name: value for name, value in found.items() if name not in ("skipped",)},
        "alignment": alignment.measure(runner, evaluation),
        "training": _training(runner),
        "cost": _cost(runner),
        "made": {"commit": commit(), "on": datetime.now(UTC).date().isoformat(), "versions": _versions()},
    }


def _source(runner: Runner) -> dict[str, str]:
    """Of an objective of the study's own: its file's content hash."""
    name = runner.settings.train.objective.name
    return {"objective": own_file_hash(name)} if ":" in name else {}


def _resolved(task: Task, runner: Runner) -> dict[str, Any]:
    """Every keyed setting that the run had, without the paths of this machine."""
    found = runner.settings.semantic()
    found["train"]["objective"]["name"] = task.setting.objective["name"]
    return found


def _training(runner: Runner) -> dict[str, list[float]]:
    """Figures of the optimiser steps, as means over WINDOWS equal stretches of the run."""
    rows = [json.loads(line) for line in runner.paths.metrics.read_text(encoding="utf-8").splitlines()]
    found = {}
    for name in FIGURES:
        values = [row[name] for row in rows if name in row]
        if values:
            edges = [len(values) * window // WINDOWS for window in range(WINDOWS + 1)]
            found[name] = [round(sum(values[a:b]) / (b - a), 5) for a, b in itertools.pairwise(edges) if b > a]
    return found


def _cost(runner: Runner) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    for line in runner.paths.jobs.read_text(encoding="utf-8").splitlines():
        job = json.loads(line)
        seconds[job["stage"]] = seconds.get(job["stage"], 0.0) + job["seconds"]
    lines = [json.loads(line) for line in (runner.paths.folder / "rounds.jsonl").read_text().splitlines()]
    rows = {line["round"]: line for line in lines}.values()  # a resumed round has two
    totals = {name: sum(row[name] for row in rows) for name in ("responses", "tokens", "score_bytes")}
    return {
        **totals,
        "bytes_per_token": round(totals["score_bytes"] / totals["tokens"], 2),
        "stage_seconds": {stage: round(value, 1) for stage, value in sorted(seconds.items())},
    }


def _versions() -> dict[str, str]:
    names = ("eopd", "torch", "transformers", "numpy", "zarr")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


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
