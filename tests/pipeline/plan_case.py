"""Plans over stores that hold real markers and no data: what surveys and forecasts are tested on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eopd.pipeline.config import RunSettings, parse_settings
from eopd.pipeline.plan import Plan, make_plan
from eopd.pipeline.run import Run
from eopd.stages.experiment import BenchmarkFacts, Experiment, Facts, ModelFacts
from eopd.stages.stage import Job
from eopd.storage.artifacts import Artifact
from eopd.storage.stacked import StackedStores

RAW: dict[str, Any] = {
    "name": "x",
    "rounds": 3,
    "student": {"path": "s"},
    "teacher": {"path": "t"},
    "prompts": {"path": "p.jsonl"},
    "rollout": {"prompts_per_round": 10, "samples_per_prompt": 2, "rows_per_part": 4},
    "train": {"batch_responses": 8, "epochs": 2},
    "evaluate": {"benchmarks": [{"name": "b", "path": "b.jsonl"}], "rows_per_part": 5},
}


def make_facts(student: str = "s0", teacher: str = "t0", prompts: int = 25, folder: Path = Path("m")) -> Facts:
    def model(fingerprint: str, stop: int) -> ModelFacts:
        return ModelFacts(folder, folder, fingerprint, "tok", (stop,))

    return Facts(model(student, 2), model(teacher, 5), prompts, "prompts", (BenchmarkFacts("b", 11, "bench"),))


def make_settings(**changes: object) -> RunSettings:
    raw = dict(RAW)
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_settings(raw, "test")


def plan_of(settings: RunSettings | None = None, facts: Facts | None = None) -> Plan:
    return make_plan(Experiment(settings or make_settings(), facts or make_facts()))


def make_run(folder: Path, facts: Facts | None = None, **changes: object) -> Run:
    """A run whose store and runs lie in ``folder``."""
    changes = {"store": str(folder / "store"), "runs": str(folder / "runs"), **changes}
    settings = make_settings(**changes)
    return run_of(settings, facts or make_facts(folder=folder))


def run_of(settings: RunSettings, facts: Facts) -> Run:
    return Run(settings, facts, plan_of(settings, facts), StackedStores.at(settings.store, settings.read_only_stores))


def commit(run: Run, job: Job, parts: Iterable[int] | None = None, **info: object) -> Artifact:
    """Commit parts of one small file each, as a stage would; ``info`` goes into every marker."""
    artifact = run.artifact(job.output)
    for part in range(artifact.parts) if parts is None else parts:
        with artifact.write_part(part, info=info) as folder:
            (folder / "data").write_bytes(b"x" * 1000)
    return artifact


def note_job(run: Run, job: Job, seconds: float, parts: int | None = None) -> None:
    """The line that a finished job leaves in ``jobs.jsonl``."""
    run.paths.folder.mkdir(parents=True, exist_ok=True)
    parts = job.output.parts if parts is None else parts
    line = {"stage": job.stage.name, "round": job.round, "key": job.output.key, "seconds": seconds, "made": parts}
    with run.paths.jobs.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
