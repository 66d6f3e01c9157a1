"""Which old checkpoints may give up their data, and which have to be made again.

A checkpoint has two parts. Weights are sampled from, evaluated and trained on; the optimiser's state is read by the
next round's training alone. A part may go when

* it is not among the newest ``train.keep_checkpoints`` (``train.keep_optimizer_states``); the newest of all stays,
* no job of the plan that is not done reads it,
* every other run that uses this store and plans the same checkpoint says so too.

What stays of it: the figures of its steps, with LoRA the adapter; averaged weights go when the weights do. A pruned
part counts as done. It is made again only when something that is missing reads it, and then all that this takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from eopd.pipeline.plan import OPTIMIZER, WEIGHTS, PlannedJob
from eopd.stages.train.settings import TrainSettings
from eopd.storage import pruning
from eopd.storage.artifacts import Artifact

if TYPE_CHECKING:
    from eopd.pipeline.runner import Runner

Parts = set[tuple[str, int]]
"""(key of a checkpoint, part of it)"""


def reads(job: PlannedJob, train: TrainSettings) -> Parts:
    """The parts of checkpoints that ``job`` reads."""
    parts = {WEIGHTS}
    if job.stage == "train" and train.optimizer.carry_over and train.lora is None:
        parts.add(OPTIMIZER)
    return {(identity.key, part) for identity in job.inputs if identity.kind == "checkpoints" for part in parts}


def wanted(runner: Runner) -> Parts:
    """Parts, pruned ones too, that some job reads which is not done or has to be done again."""
    found: Parts = set()
    for job in reversed(runner.plan.jobs):
        gone = {(job.output.key, part) for part in _pruned(runner, job)}
        if not runner.is_made(job) or gone & found:
            found |= reads(job, runner.settings.train)
    return found


def rebuilds(runner: Runner) -> Parts:
    """Pruned parts that have to be made again."""
    gone = {(job.output.key, part) for job in runner.plan.jobs for part in _pruned(runner, job)}
    return gone & wanted(runner) if gone else gone


def _pruned(runner: Runner, job: PlannedJob) -> set[int]:
    return runner.artifact(job.output).pruned() if job.stage == "train" else set()


def may_go(runner: Runner) -> Parts:
    """Parts that this run has no more use for."""
    train = runner.settings.train
    keys = [job.output.key for job in _trained(runner)]
    old: Parts = set()
    for part, kept in ((WEIGHTS, train.keep_checkpoints), (OPTIMIZER, train.keep_optimizer_states)):
        if kept is not None:
            old |= {(key, part) for key in keys[:-kept]}
    return old - wanted(runner) if old else old


def _trained(runner: Runner) -> list[PlannedJob]:
    """Training jobs whose checkpoints are complete, oldest first."""
    return [job for job in runner.plan.jobs if job.stage == "train" and runner.is_made(job)]


def prune_old(runner: Runner) -> int:
    """Prune what may go; returns the bytes freed. Finishes what a kill left half done."""
    going = may_go(runner)
    if not going:
        return 0
    rules = list(_rules(runner, going))
    fresh = {(artifact.key, part) for artifact, part, drops in rules if any(map(drops, artifact.remains(part).files))}
    refused = _needed_elsewhere(runner, fresh) if fresh else set()
    allowed = [rule for rule in rules if (rule[0].key, rule[1]) not in refused]
    freed = sum(pruning.prune(artifact, part, drops) for artifact, part, drops in allowed)
    if freed:
        runner.progress.line(f"old checkpoints pruned: {freed / 1e6:,.1f} MB freed (train.keep_checkpoints)")
    return freed


def _rules(runner: Runner, going: Parts) -> Iterator[tuple[Artifact, int, Callable[[str], bool]]]:
    """What is dropped of each part that may go; other stores than the run's own are only read."""
    from eopd.stages.train import remains

    for job in _trained(runner):
        artifact = runner.artifact(job.output)
        if not runner.is_own(artifact):  # in another store, or fetched from there
            continue
        whole = (artifact.key, WEIGHTS) in going
        if whole:
            yield artifact, WEIGHTS, remains.weights
        if (artifact.key, OPTIMIZER) in going:
            yield artifact, OPTIMIZER, remains.outlived if whole else remains.moments


def _needed_elsewhere(runner: Runner, parts: Iterable[tuple[str, int]]) -> Parts:
    """Those of ``parts`` that another run keeps; all of them where one cannot be asked."""
    from eopd.pipeline.neighbours import sharing_checkpoints

    asked = set(parts)
    kept: Parts = set()
    for name, other in sharing_checkpoints(runner):
        if isinstance(other, str):
            runner.progress.line(f"old checkpoints stay: {name} uses this store too, and cannot be planned ({other})")
            return asked
        theirs = {job.output.key for job in other.plan.jobs if job.stage == "train"}
        agreed = may_go(other)
        kept |= {(key, part) for key, part in asked if key in theirs and (key, part) not in agreed}
    return kept
