"""`eopd evaluate CONFIG --disagreements`: samples that the verifier and a plain comparison judge differently."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

from eopd.pipeline.errors import RunError
from eopd.pipeline.runner import Runner


def list_disagreements(runner: Runner, round_: int, write: Callable[[str], object]) -> int:
    """One JSON line a disagreement to ``write``, of what is committed of a round's evaluation; returns how many.

    Raises:
        RunError: nothing of the evaluation is there, or no benchmark has final answers to compare.
    """
    from eopd.stages.evaluate.disagreements import disagreements

    job = runner.plan.job("evaluate", round_)
    evaluation = runner.artifact(job.output)
    settings = runner.settings.evaluate
    assert settings is not None
    names = [benchmark.name for benchmark in settings.benchmarks if benchmark.verifier == "math"]
    if not names:
        raise RunError("--disagreements compares final answers: no benchmark of this run has verifier: math")
    if not evaluation.committed():
        raise RunError(f"{job.name}: nothing is evaluated yet. Run `eopd evaluate CONFIG --round {round_}` first.")
    count = 0
    for found in disagreements(evaluation, names):
        write(json.dumps(asdict(found), ensure_ascii=False) + "\n")
        count += 1
    return count
