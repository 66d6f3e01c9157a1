"""The report of one run or of several, from whatever of their plans is complete: the page, and ``summary.json``."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.pipeline.runner import Runner
from eopd.storage.artifacts import Artifact, Identity
from eopd.storage.files import canonical_json, replace_atomically, sha256_text
from eopd.storage.fingerprints import LENGTH

if TYPE_CHECKING:
    from eopd.stages.report.data import RunData
    from eopd.stages.report.gather import RoundArtifacts

SECONDS_AN_ANSWER = 5.0
GRADERS = 2


def write_report(runner: Runner) -> Path:
    """Write a run's ``summary.json`` and its HTML page; returns the page."""
    from eopd.stages.report.data import ReportData
    from eopd.stages.report.gather import summary_rows
    from eopd.stages.report.run import ReportJob, run

    settings = runner.settings
    (data,) = _gather([runner])
    k = settings.evaluate.samples if settings.evaluate else 0
    summary = {"run": settings.name, "seed": settings.seed, "rounds": summary_rows(data, k)}
    replace_atomically(runner.paths.summary, json.dumps(summary, indent=1) + "\n")
    report = ReportData(settings.name, _now(), [data])
    return run(ReportJob(runner.paths.report, report))


def write_comparison(runners: Sequence[Runner], folder: Path) -> Path:
    """Write one page over several runs to ``folder``; runs that differ in nothing but their seed are one line of it.

    The first run is what the others are compared with. Returns the page.
    """
    from eopd.stages.report.compare import grouped
    from eopd.stages.report.data import ReportData
    from eopd.stages.report.run import ReportJob, run

    runs = grouped(_gather(runners))
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} settings compared"
    return run(ReportJob(folder, ReportData(title, _now(), runs)))


def _gather(runners: Sequence[Runner]) -> list[RunData]:
    from eopd.stages.report.gather import RunArtifacts, gather

    logs = {runner.paths.jobs for runner in runners}
    readers = Counter(key for runner in runners for key in {job.output.key for job in runner.plan.jobs})
    found = []
    for runner in runners:
        settings, objective = runner.settings, runner.settings.train.objective
        found.append(
            gather(
                RunArtifacts(
                    name=settings.name,
                    settings=settings.model_dump(mode="json"),
                    rounds=_rounds(runner),
                    tokenizer=str(runner.facts.student.tokenizer_folder),
                    tau=objective.tau if "tau" in objective.used else None,
                    metrics=runner.paths.metrics,
                    jobs=runner.paths.jobs,
                    seed=settings.seed,
                    kin=_kin(runner),
                    judge=judge_rollouts,
                    elsewhere=sorted(logs - {runner.paths.jobs}),
                    also_read={key for key, count in readers.items() if count > 1},
                )
            )
        )
    return found


def _kin(runner: Runner) -> str:
    """Equal for runs that ask for the same of the same inputs, with whatever seed."""
    semantic = runner.settings.semantic()
    del semantic["seed"]
    facts = runner.facts
    inputs = [facts.student.fingerprint, facts.teacher.fingerprint, facts.prompts_fingerprint]
    inputs += [benchmark.fingerprint for benchmark in facts.benchmarks]
    return sha256_text(canonical_json({"settings": semantic, "inputs": inputs}))[:LENGTH]


def judge_rollouts(verifier: str, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """Verdicts on shown rollouts; None where there is no such verifier, or it cannot read the reference answer
    (training needs none).
    """
    from eopd.stages.evaluate.verifiers.registry import NAMES, open_verifier

    if verifier not in NAMES or not pairs:
        return [None] * len(pairs)
    judge = open_verifier(verifier, seconds=SECONDS_AN_ANSWER, workers=GRADERS)
    try:
        return [verdict.correct if verdict.readable else None for verdict in judge.verify_many(pairs)]
    finally:
        judge.close()


def _now() -> str:
    return time.strftime("%d %B %Y, %H:%M")


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
            complete("align", round_),
            measured=("evaluate", round_) in outputs,
        )
        for round_ in range(runner.settings.rounds + 1)
    ]
