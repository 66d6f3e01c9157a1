"""The report of a run, from whatever of its plan is complete: the page and ``summary.json``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.pipeline.runner import Runner
from eopd.storage.artifacts import Artifact, Identity
from eopd.storage.files import replace_atomically

if TYPE_CHECKING:
    from eopd.stages.report.gather import RoundArtifacts


def write_report(runner: Runner) -> Path:
    """Write ``summary.json`` and the HTML page; returns the page."""
    from eopd.stages.report.data import ReportData
    from eopd.stages.report.gather import RunArtifacts, gather, summary_rows
    from eopd.stages.report.job import ReportJob
    from eopd.stages.report.run import run

    settings = runner.settings
    objective = settings.train.objective
    data = gather(
        RunArtifacts(
            name=settings.name,
            settings=settings.model_dump(mode="json"),
            rounds=_rounds(runner),
            tokenizer=str(runner.facts.student.tokenizer_folder),
            tau=objective.tau if "tau" in objective.used else None,
            metrics=runner.paths.metrics,
            jobs=runner.paths.jobs,
        )
    )
    k = settings.evaluate.samples if settings.evaluate else 0
    summary = {"run": settings.name, "seed": settings.seed, "rounds": summary_rows(data, k)}
    replace_atomically(runner.paths.summary, json.dumps(summary, indent=1) + "\n")
    report = ReportData(settings.name, time.strftime("%d %B %Y, %H:%M"), [data])
    return run(ReportJob(runner.paths.report, report, runner.paths.logs))


def _rounds(runner: Runner) -> list[RoundArtifacts]:
    from eopd.stages.report.gather import RoundArtifacts

    outputs: dict[tuple[str, int], Identity] = {(job.stage, job.round): job.output for job in runner.plan.jobs}

    def complete(stage: str, round_: int) -> Artifact | None:
        identity = outputs.get((stage, round_))
        artifact = runner.artifact(identity) if identity else None
        return artifact if artifact is not None and artifact.is_complete() else None

    return [
        RoundArtifacts(
            round_,
            complete("evaluate", round_),
            complete("rollout", round_),
            complete("score", round_),
            complete("train", round_),
        )
        for round_ in range(runner.settings.rounds + 1)
    ]
