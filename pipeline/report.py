"""The report of one or several runs from their complete artifacts: the page, and ``summary.json``."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.pipeline.run import Run
from eopd.storage.artifacts import Artifact
from eopd.storage.files import canonical_json, replace_atomically, sha256_text
from eopd.storage.identity import KEY_LENGTH

if TYPE_CHECKING:
    from eopd.stages.report.data import RunData
    from eopd.stages.report.gather import RoundArtifacts

SECONDS_AN_ANSWER = 5.0
GRADERS = 2


def write_report(run: Run) -> Path:
    """Write a run's ``summary.json`` and its HTML page; returns the page."""
    from eopd.stages.report.data import ReportData
    from eopd.stages.report.gather import summary_rows
    from eopd.stages.report.run import ReportJob, make_report

    settings = run.settings
    (data,) = _gather([run])
    k = settings.evaluate.samples if settings.evaluate else 0
    summary = {"run": settings.name, "seed": settings.seed, "rounds": summary_rows(data, k)}
    replace_atomically(run.paths.summary, json.dumps(summary, indent=1) + "\n")
    report = ReportData(settings.name, _now(), [data])
    return make_report(ReportJob(run.paths.report, report))


def write_comparison(runs_: Sequence[Run], folder: Path) -> Path:
    """Write one page over several runs to ``folder``; runs that differ only in their seed become one line.

    The first run is what the others are compared with. Returns the page.
    """
    from eopd.stages.report.compare import grouped
    from eopd.stages.report.data import ReportData
    from eopd.stages.report.run import ReportJob, make_report

    runs = grouped(_gather(runs_))
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} settings compared"
    return make_report(ReportJob(folder, ReportData(title, _now(), runs)))


def _gather(runs_: Sequence[Run]) -> list[RunData]:
    from eopd.stages.report.gather import RunArtifacts, gather

    logs = {run.paths.jobs for run in runs_}
    readers = Counter(key for run in runs_ for key in {job.output.key for job in run.plan.jobs})
    gathered = []
    for run in runs_:
        settings, objective = run.settings, run.settings.train.objective
        gathered.append(
            gather(
                RunArtifacts(
                    name=settings.name,
                    settings=settings.model_dump(mode="json"),
                    rounds=_rounds(run),
                    tokenizer=str(run.facts.student.tokenizer_folder),
                    tau=objective.tau if "tau" in objective.used else None,
                    metrics=run.paths.metrics,
                    jobs=run.paths.jobs,
                    seed=settings.seed,
                    kin=_kin(run),
                    judge=judge_rollouts,
                    elsewhere=sorted(logs - {run.paths.jobs}),
                    also_read={key for key, count in readers.items() if count > 1},
                )
            )
        )
    return gathered


def _kin(run: Run) -> str:
    """Return a value that is equal for runs with equal settings and inputs, whatever their seed."""
    semantic = run.settings.semantic()
    del semantic["seed"]
    facts = run.facts
    inputs = [facts.student.fingerprint, *(one.fingerprint for one in facts.teacher_models.values())]
    inputs.append(facts.prompts_fingerprint)
    inputs += [benchmark.fingerprint for benchmark in facts.benchmarks]
    return sha256_text(canonical_json({"settings": semantic, "inputs": inputs}))[:KEY_LENGTH]


def judge_rollouts(verifier: str, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """Grade the rollouts that are shown; None if there is no such verifier or it cannot read the reference answer
    (training needs none)."""
    from eopd.stages.verifiers.registry import NAMES, open_verifier

    if verifier not in NAMES or not pairs:
        return [None] * len(pairs)
    judge = open_verifier(verifier, seconds=SECONDS_AN_ANSWER, workers=GRADERS)
    try:
        return [verdict.correct if verdict.readable else None for verdict in judge.verify_many(pairs)]
    finally:
        judge.close()


def _now() -> str:
    return time.strftime("%d %B %Y, %H:%M")


def _rounds(run: Run) -> list[RoundArtifacts]:
    from eopd.stages.report.gather import RoundArtifacts

    def scores(round_: int) -> tuple[Artifact, ...]:
        jobs = run.plan.by_teacher("score", round_)
        return tuple(run.artifact(job.output) for job in jobs) if all(map(run.is_made, jobs)) else ()

    def complete(stage: str, round_: int) -> Artifact | None:
        job = run.plan.find(stage, round_)
        return run.artifact(job.output) if job is not None and run.is_made(job) else None

    return [
        RoundArtifacts(
            round_,
            complete("evaluation_summary", round_),
            complete("rollout", round_),
            scores(round_),
            complete("train", round_),
            complete("alignment_summary", round_),
            measured=run.plan.find("evaluate", round_) is not None,
            made={
                f"{job.stage.name} {job.variant}".rstrip(): run.artifact(job.output)
                for job in run.plan.jobs
                if job.round == round_ and run.is_made(job)
            },
        )
        for round_ in range(run.settings.rounds + 1)
    ]
