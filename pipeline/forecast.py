"""Forecast of a plan: one row per job with its state, tokens, bytes, seconds and disk.

Tokens and bytes are those of committed parts of the job, or of other jobs of its stage. If a stage has none yet, tokens
are what the settings allow at most, bytes are an estimate, and scores also have a bound that no teacher exceeds.
Seconds come from finished jobs of these runs, or not at all. Only listings of the store's folders and a sample of
markers are read; nothing is changed.
"""

from __future__ import annotations

import math
import shutil
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eopd.pipeline.run import Run
from eopd.stages.experiment_settings import ExperimentSettings
from eopd.stages.format import size
from eopd.stages.memory import Memory, ModelSize
from eopd.stages.models.memory import nvidia_smi
from eopd.stages.stage import Job, Measured, Models, Size
from eopd.stages.table import STAGES
from eopd.stages.train.stage import CheckpointBytes, student_bytes
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import StoreError
from eopd.storage.files import existing
from eopd.storage.jsonl import read_lines

if TYPE_CHECKING:
    from eopd.pipeline.run import Run

MARKERS_PER_STAGE = 64
MARKERS_PER_JOB = 8
JOBS_PER_STAGE = 8  # finished jobs that a rate rests on

State = Literal["complete", "shared", "partly", "missing"]
"""shared: complete, and made by another run."""


@dataclass(frozen=True)
class Row:
    """One job: its state and what it takes. Runs that plan the same job share a row."""

    run: Run  # the first that plans it
    job: Job
    runs: tuple[str, ...]  # names of all that plan it
    state: State
    done: int  # parts, those that were pruned since among them
    pruned: int
    set_aside: Mapping[int, str]  # parts that were committed empty after failing too often: why
    elsewhere: bool  # in a store that is only read
    size: Size = field(default_factory=Size)
    seconds: float | None = None  # for the missing parts; None: not known yet

    @property
    def stage(self) -> str:
        return self.job.stage.name

    @property
    def round(self) -> int:
        return self.job.round

    @property
    def parts(self) -> int:
        return self.job.output.parts

    @property
    def missing(self) -> int:
        return self.parts - self.done

    @property
    def is_done(self) -> bool:
        return self.missing == 0

    @property
    def present(self) -> int:
        """Bytes of the artifact in the private store."""
        if self.elsewhere:
            return 0
        if not self.job.is_prunable:
            return round(self.size.bytes * (self.done - self.pruned) / self.parts)
        # a checkpoint's optimiser state is written first and pruned first
        checkpoint = student_bytes(self.run.experiment)
        optimizer, weights = self.done >= 1 and not self.pruned, self.is_done and self.pruned < 2
        return optimizer * checkpoint.optimizer + weights * checkpoint.weights


@dataclass(frozen=True)
class Rate:
    seconds_per_token: float  # of one worker, start-up included
    jobs: int  # that were measured


@dataclass(frozen=True)
class Total:
    """Sums over the jobs of one stage, or of all."""

    jobs: int
    done: int  # jobs
    parts: int
    missing: int  # parts
    tokens: int
    bytes: int
    at_most: bool
    seconds: float  # for missing parts of stages with a rate
    unknown: int  # jobs that are missing and have none


@dataclass(frozen=True)
class Keep:
    """Number of newest checkpoints that keep weights and optimiser state; None: all. The newest always keeps them."""

    weights: int | None = None
    optimizer: int | None = None


@dataclass(frozen=True)
class Forecast:
    """The content of `eopd plan`."""

    runs: tuple[Run, ...]
    rows: tuple[Row, ...]
    rates: Mapping[str, Rate]  # by stage
    free_bytes: int  # at the store that is written to
    planned: int  # jobs, counted for each run separately

    @property
    def store(self) -> Path:
        return self.runs[0].store

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(run.name for run in self.runs)

    @property
    def totals(self) -> dict[str, Total]:
        """Sums by stage, and ``all``."""
        totals = {}
        for name in (*(stage.name for stage in STAGES), "all"):
            rows = [row for row in self.rows if name in (row.stage, "all")]
            if rows:
                totals[name] = _total(rows)
        return totals

    @property
    def present_bytes(self) -> int:
        return sum(row.present for row in self.rows)

    def peak_bytes(self, keep: Keep | None = None, *, bounds: bool = False) -> int:
        """Return the peak of the bytes that these runs hold in the private store.

        Each run is taken to reach its own worst moment at the same time; what runs have in common is the first one's.

        Args:
            keep: what pruning leaves; None: what each run's settings say.
            bounds: take what a job's bytes cannot exceed instead of the estimate, if that is known.
        """
        return sum(_peak_of_run(run, [row for row in self.rows if row.run is run], keep, bounds) for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": list(self.names),
            "store": str(self.store),
            "jobs": [_row_json(row) for row in self.rows],
            "planned_jobs": self.planned,
            "totals": {name: vars(total) for name, total in self.totals.items()},
            "rates": {stage: vars(rate) for stage, rate in self.rates.items()},
            "disk": {"peak": self.peak_bytes(), "present": self.present_bytes, "free": self.free_bytes},
        }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "runs": list(row.runs),
        "stage": row.stage,
        "round": row.round,
        "variant": row.job.variant,
        "artifact": f"{row.job.output.kind}/{row.job.output.key}",
        "state": row.state,
        "parts": row.parts,
        "done": row.done,
        "set_aside": {str(part): reason for part, reason in row.set_aside.items()},
        "tokens": row.size.tokens,
        "bytes": row.size.bytes,
        "tokens_at_most": row.size.at_most,
        "bytes_at_most": row.size.most_bytes,
        "seconds_left": row.seconds,
    }


def _total(rows: Sequence[Row]) -> Total:
    return Total(
        jobs=len(rows),
        done=sum(row.is_done for row in rows),
        parts=sum(row.parts for row in rows),
        missing=sum(row.missing for row in rows),
        tokens=sum(row.size.tokens for row in rows),
        bytes=sum(row.size.bytes for row in rows),
        at_most=any(row.size.at_most for row in rows),
        seconds=sum(row.seconds or 0.0 for row in rows),
        unknown=sum(row.seconds is None for row in rows),
    )


def forecast(runs: Sequence[Run]) -> Forecast:
    """Inspect runs that share their stores and a folder of runs."""
    states = list(job_states(runs))
    samples = _sample(states)
    by_stage: dict[str, Measured] = defaultdict(Measured)
    for row in states:
        by_stage[row.stage] += samples.get(row.job.key, Measured())
    rates = measure_rates(runs)
    sizes: dict[tuple[str, str], Size] = {}
    rows = []
    for row in states:
        inputs = {
            role: sizes[input_.identity.kind, input_.identity.key]
            for role, input_ in row.job.inputs.items()
            if (input_.identity.kind, input_.identity.key) in sizes
        }
        own = samples.get(row.job.key, Measured())
        measured = own if own.parts else by_stage[row.stage]
        experiment = row.run.experiment.of_teacher(row.job.teacher)
        size = row.job.stage.forecast(row.job, experiment, inputs, measured)
        sizes[row.job.key] = size
        rate = rates.get(row.stage)
        seconds: float | None = 0.0
        if not row.is_done and size.tokens:
            seconds = None if rate is None else size.tokens * row.missing / row.parts * rate.seconds_per_token
        rows.append(replace(row, size=size, seconds=seconds))
    free = shutil.disk_usage(existing(runs[0].store)).free
    return Forecast(tuple(runs), tuple(rows), rates, free, sum(len(run.plan.jobs) for run in runs))


def job_states(runs: Sequence[Run]) -> Iterable[Row]:
    """Return the state of every job in the runs' plans, each once, in the order of the first run that plans it."""
    planned: dict[tuple[str, str], tuple[Run, Job, list[str]]] = {}
    for run in runs:
        for job in run.plan.jobs:
            planned.setdefault(job.key, (run, job, []))[2].append(run.name)
    own = {str(line.get("key")) for run in runs for line in read_lines(run.paths.jobs) if line.get("made")}
    rebuilds = {part for run in runs for part in run.rebuilds}
    for run, job, names in planned.values():
        artifact = run.artifact(job.output)
        standing = artifact.standing()
        pruned = {part for part in standing.pruned if (job.output.key, part) not in rebuilds}
        done = len(standing.committed) + len(pruned)
        state: State = "partly" if done else "missing"
        if done == job.output.parts:
            state = "complete" if job.output.key in own else "shared"
        yield Row(
            run=run,
            job=job,
            runs=tuple(names),
            state=state,
            done=done,
            pruned=len(pruned),
            set_aside=artifact.reasons_aside(standing),
            elsewhere=not run.is_own(artifact),
        )


# -- what was measured -----------------------------------------------------------------------------------------------


def _sample(rows: Sequence[Row]) -> dict[tuple[str, str], Measured]:
    """Sum over a sample of committed parts, spread evenly over the jobs: a store may hold very many markers."""
    by_stage: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.done:
            by_stage[row.stage].append(row)
    samples = {}
    for begun in by_stage.values():
        per_job = max(1, min(MARKERS_PER_JOB, MARKERS_PER_STAGE // len(begun)))
        for row in _spread(begun, MARKERS_PER_STAGE):
            artifact = row.run.artifact(row.job.output)
            parts = range(artifact.parts) if row.is_done else sorted(artifact.committed())
            samples[row.job.key] = measure(artifact, _spread(parts, per_job))
    return samples


def measure(artifact: Artifact, parts: Iterable[int]) -> Measured:
    """Sum over the committed ones of ``parts``; unreadable markers are skipped (`verify` reports them)."""
    total = Measured()
    for part in parts:
        try:
            marker = artifact.marker(part)
        except StoreError:
            continue
        responses, tokens = _count(marker.info.get("responses")), _count(marker.info.get("tokens"))
        total += Measured(1, responses, tokens, marker.bytes, _count(marker.info.get("tokens_read", tokens)))
    return total


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    if len(items) <= most:
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * most)] for i in range(most)]


def measure_rates(runs: Sequence[Run]) -> dict[str, Rate]:
    """Measure seconds per token of each stage from the latest jobs that these runs finished."""
    latest: dict[str, deque[tuple[Run, dict[str, Any]]]] = defaultdict(lambda: deque(maxlen=JOBS_PER_STAGE))
    for run in runs:
        interrupted: dict[str, float] = {}  # seconds of training that was stopped on its way, by key
        for line in read_lines(run.paths.jobs):
            key, seconds = str(line.get("key")), line.get("seconds")
            if not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
                continue
            seconds += interrupted.pop(key, 0.0)
            made = line.get("made")
            if isinstance(made, int) and made > 0:
                latest[str(line.get("stage"))].append((run, {**line, "seconds": seconds}))
            else:
                interrupted[key] = seconds
    rates = {}
    for stage, lines in latest.items():
        measured = [(line["seconds"], tokens) for run, line in lines if (tokens := _tokens_of(run, line))]
        if measured:
            rates[stage] = Rate(sum(s for s, _ in measured) / sum(t for _, t in measured), len(measured))
    return rates


def _tokens_of(run: Run, line: Mapping[str, Any]) -> float:
    """Estimate the tokens of a finished task from a few markers of its job's output or input; 0 if they are gone."""
    try:
        job = run.plan.find(str(line["stage"]), int(line["round"]), str(line.get("variant", line.get("teacher", ""))))
        if job is None or job.output.key != line["key"]:
            return 0.0
        if job.is_prunable:  # counted as in the forecast of training
            rollouts = run.artifact(job.inputs["rollouts"].identity)
            return _tokens_a_part(rollouts) * rollouts.parts * run.experiment.most_epochs(job.round)
        return _tokens_a_part(run.artifact(job.output)) * int(line["made"])
    except (StoreError, KeyError, TypeError, ValueError):
        return 0.0


def _tokens_a_part(artifact: Artifact) -> float:
    measured = measure(artifact, _spread(sorted(artifact.committed()), MARKERS_PER_JOB))
    return measured.tokens_read / measured.parts if measured.parts else 0.0


# -- disk ------------------------------------------------------------------------------------------------------------


def _peak_of_run(run: Run, rows: Sequence[Row], keep: Keep | None, bounds: bool) -> int:
    def size(row: Row) -> int:
        return row.size.most_bytes if bounds and row.size.most_bytes is not None else row.size.bytes

    own = [row for row in rows if not row.elsewhere]
    checkpoints = [row for row in own if row.job.is_prunable]
    if not checkpoints:
        return sum(map(size, own))
    first = run.settings.rounds - len(checkpoints)  # checkpoints of earlier rounds lie elsewhere
    data = [0] * len(checkpoints)
    for row in own:
        if not row.job.is_prunable:
            data[min(max(row.round - first, 0), len(data) - 1)] += size(row)
    train = run.settings.train
    kept = keep or Keep(train.keep_checkpoints, train.keep_optimizer_states)
    trained = sum(row.is_done for row in checkpoints)
    return peak_bytes(student_bytes(run.experiment), data, kept, train.keep_progress, trained)


def peak_bytes(checkpoint: CheckpointBytes, data: Sequence[int], keep: Keep, states: int = 1, trained: int = 0) -> int:
    """Return a run's own bytes at their peak: a round's checkpoint is committed and nothing is pruned yet.

    Args:
        data: of each round, its complete rollouts, scores and evaluations.
        states: resumable states kept while a round trains; the next one is written before the oldest goes.
        trained: rounds whose checkpoints exist (or were pruned) already; the peak is that of the rounds after them.
    """

    def kept(made: int) -> int:
        weights = made if keep.weights is None else min(made, keep.weights)
        optimizer = made if keep.optimizer is None else min(made, keep.optimizer)
        return weights * checkpoint.weights + optimizer * checkpoint.optimizer

    peak = so_far = 0
    for round_, added in enumerate(data):
        so_far += added
        writing = checkpoint.weights + checkpoint.optimizer + states * checkpoint.state
        while_training = max(writing, (states + 1) * checkpoint.state)
        if round_ >= trained:
            peak = max(peak, so_far + kept(round_) + while_training)
    return max(peak, so_far + kept(len(data)))


# -- memory -----------------------------------------------------------------------------------------------------------

# Predicted peak memory of each stage, against the GPU or the memory at hand.


ELSEWHERE_BYTES = 80 * 2**30
"""Memory of the GPU that is assumed if there is none."""
SMALLER = "gradient checkpointing, smaller micro-batches, lora, sharding or a smaller dtype need less"


@dataclass(frozen=True)
class Need:
    """Memory that a stage needs, and memory that is available."""

    stage: str
    memory: Memory
    available: int

    @property
    def fits(self) -> bool:
        return self.memory.bytes <= self.available

    def __str__(self) -> str:
        text = f"needs about {size(self.memory.bytes)} of {size(self.available)}"
        if self.memory.taken is not None:
            text += f", vLLM takes {size(round(self.memory.taken * self.available))}"
        largest = sorted(self.memory.parts.items(), key=lambda part: -part[1])[:3]
        return f"{text} ({', '.join(f'{name} {size(taken)}' for name, taken in largest)})"


def gpu_bytes() -> int:
    """Return the memory of this machine's smallest GPU, by nvidia-smi; 0 if there is none."""
    return min((int(size) for size in nvidia_smi("memory.total") or () if size.isdigit()), default=0) * 2**20


def models_of(student: Path, teacher: Path) -> Models | None:
    """Return the shapes of two model folders; None if one is of a kind whose memory is not predicted."""
    one, other = ModelSize.read(student), ModelSize.read(teacher)
    return None if one is None or other is None else Models(one, other)


def needs(settings: ExperimentSettings, models: Models, gpu: int, available: int | None = None) -> Iterator[Need]:
    """Yield what each stage of a plan needs.

    Args:
        gpu: bytes of the GPU; 0: a CPU.
        available: bytes that may be taken; None: all of the GPU.
    """
    for stage in STAGES:
        memory = stage.memory(settings, models, gpu)
        if memory is not None:
            yield Need(stage.name, memory, gpu if available is None else available)


def needs_of(runs: Sequence[Run], gpu: int) -> list[Need]:
    """Return the most that each stage of some runs needs on a GPU."""
    experiments = [experiment for run in runs for experiment in run.experiment.by_teacher.values()]
    shapes = [models_of(one.facts.student.folder, one.facts.teacher.folder) for one in experiments]
    return largest(
        need
        for experiment, models in zip(experiments, shapes, strict=True)
        if models is not None
        for need in needs(experiment.settings, models, gpu)
    )


def largest(needed: Iterable[Need]) -> list[Need]:
    """Return the largest need of each stage."""
    by_stage: dict[str, Need] = {}
    for need in needed:
        if need.stage not in by_stage or by_stage[need.stage].memory.bytes < need.memory.bytes:
            by_stage[need.stage] = need
    return list(by_stage.values())


def lines(needed: Sequence[Need]) -> Iterator[str]:
    """Yield a line for each need, the largest first."""
    for need in sorted(needed, key=lambda need: -need.memory.bytes):
        yield f"Memory of `{need.stage}`: {need}{'' if need.fits else ': NOT ENOUGH'}."
