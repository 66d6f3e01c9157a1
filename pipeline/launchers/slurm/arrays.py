"""From what is missing of a plan to job arrays, and which of them wait for which. Pure but for listings of the store.

An array task does a fixed chunk of its job's parts: chunk c holds parts c * n to (c + 1) * n - 1, of which those that
are committed are left out. So equal indices of a round's rollout and score arrays mean equal parts, and a score task
waits for its own rollout task only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from eopd.pipeline.launchers.slurm.settings import SlurmSettings
from eopd.pipeline.logs import job_name
from eopd.pipeline.plan import SUMMED_UP, PlannedJob
from eopd.pipeline.runner import Runner

Work = Sequence[tuple[Runner, PlannedJob]]


@dataclass(frozen=True, eq=False)
class Array:
    """Tasks of one job, submitted at once."""

    runner: Runner
    job: PlannedJob
    block: int  # which thousand of the job's tasks, where there are so many
    chunks: Mapping[int, tuple[int, ...]]  # array index -> parts
    after: tuple[Array, ...] = ()  # all of each must have succeeded
    after_task: Array | None = None  # each task waits for the one of the same index in this
    suffix: str = ""

    @property
    def name(self) -> str:
        """Unique in its run: rollout-0, score-1-2 (the third thousand of tasks), score-1.ready."""
        return job_name(self.job.stage, self.job.round) + (f"-{self.block}" if self.block else "") + self.suffix

    @property
    def parts(self) -> int:
        return sum(map(len, self.chunks.values()))

    @property
    def indices(self) -> str:
        """As sbatch wants them: "0-3,7"."""
        return ",".join(f"{first}-{last}" if first < last else f"{first}" for first, last in _runs(sorted(self.chunks)))


def arrays_of(work: Work, settings: SlurmSettings) -> list[Array]:
    """Arrays of all that is missing, each after those it waits for."""
    made: dict[tuple[str, ...], list[Array]] = {}  # by what they make
    for runner, job in work:
        if job.makes in made or runner.is_done(job):
            continue
        inputs = [made.get(runner.plan.maker(identity).makes, []) for identity in job.inputs]
        # the same rollouts, for runs that want another side artifact of them, or none
        inputs += [arrays for makes, arrays in made.items() if makes[:2] == job.makes[:2]]
        made[job.makes] = [
            array
            for block, chunks in enumerate(_blocks(runner, job, settings))
            for array in _block_arrays(runner, job, block, chunks, inputs)
        ]
    return [array for arrays in made.values() for array in arrays]


def _blocks(runner: Runner, job: PlannedJob, settings: SlurmSettings) -> Iterator[dict[int, tuple[int, ...]]]:
    """Chunks of the missing parts, cut where an array would grow beyond what the cluster takes."""
    parts = job.output.parts
    size = parts if job.stage == "train" else settings.parts_per_task
    missing = missing_parts(runner, job)
    if job.stage in SUMMED_UP and len(missing) > 1:
        missing.discard(parts - 1)  # the summary: written by the task that ends last
    chunks = [
        tuple(p for p in range(start, min(start + size, parts)) if p in missing) for start in range(0, parts, size)
    ]
    for start in range(0, len(chunks), settings.array_size):
        yield {index: chunk for index, chunk in enumerate(chunks[start : start + settings.array_size]) if chunk}


def missing_parts(runner: Runner, job: PlannedJob) -> set[int]:
    """Of the output, or of what a rollout makes beside it. Training is all or nothing."""
    if job.stage == "train":
        return set() if runner.is_done(job) else set(range(job.output.parts))
    missing = set(runner.artifact(job.output).missing())
    if job.stage == "rollout" and job.side is not None:
        missing.update(runner.artifact(job.side).missing())
    return missing


def missing_count(work: Work) -> int:
    return sum(len(missing_parts(runner, job)) for runner, job in work)


def _block_arrays(
    runner: Runner, job: PlannedJob, block: int, chunks: dict[int, tuple[int, ...]], inputs: list[list[Array]]
) -> Iterator[Array]:
    if job.stage != "score":
        if chunks:
            yield Array(runner, job, block, chunks, after=tuple(array for arrays in inputs for array in arrays))
        return
    rollouts = next((array for array in inputs[0] if array.block == block), None)
    ready = {index: chunk for index, chunk in chunks.items() if rollouts is None or index not in rollouts.chunks}
    waiting = {index: chunk for index, chunk in chunks.items() if index not in ready}
    if ready:
        yield Array(runner, job, block, ready, suffix=".ready" if waiting else "")
    if waiting:
        yield Array(runner, job, block, waiting, after_task=rollouts)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers: first and last of each."""
    first = last = None
    for number in numbers:
        if first is None or last is None:
            first = number
        elif number != last + 1:
            yield first, last
            first = number
        last = number
    if first is not None and last is not None:
        yield first, last
