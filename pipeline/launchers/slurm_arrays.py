"""Slurm job arrays for the missing parts of a plan: tasks, dependencies and scripts.

This module only reads listings of the store. An array task does a fixed chunk of its job's parts: chunk c holds the
missing ones of parts c * n to (c + 1) * n - 1. So equal indices of a round's rollout and score arrays mean equal parts,
and a score task waits for its own rollout task only.

A task that runs again does only what is missing, so every failure has the same answer: run the task again. A task
requeues itself near its time limit or when it fails; Slurm does when the node dies or the task is pre-empted
(``--requeue``).
"""

from __future__ import annotations

import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from eopd.pipeline.errors import EXIT_CODES
from eopd.pipeline.launchers.settings import SlurmResources, SlurmSettings
from eopd.pipeline.processes import TORCHRUN, worker_command
from eopd.pipeline.run import Run
from eopd.pipeline.tasks import Task, Work
from eopd.stages.stage import Job

_SUPERVISE = """\
again() {{
    echo "slurm: $1: back into the queue"
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
}}
limit_near= stopped=
trap 'limit_near=yes; kill -TERM $work' USR1  # both: commit the part in hand, then stop
trap 'stopped=yes; kill -TERM $work' TERM
while kill -0 $work 2>/dev/null; do wait $work; done
wait $work
code=$?
[ $code = 0 ] && exit 0
if [ -n "$limit_near" ]; then
    again "the time limit is near"
elif [ -n "$stopped" ] || [ $code = {full} ] || [ $code = {refused} ]; then
    exit $code
elif [ "${{SLURM_RESTART_COUNT:-0}}" -lt {retries} ]; then
    again "ended with code $code"
fi
exit $code
"""


@dataclass(frozen=True, eq=False)
class Array:
    """Tasks of one job that are submitted together."""

    run: Run
    job: Job
    block: int  # number of this array among those of the job, if it has more tasks than an array may have
    chunks: Mapping[int, tuple[int, ...]]  # array index -> parts
    after: tuple[Array, ...] = ()  # every task waits for all of these to succeed
    after_tasks: tuple[Array, ...] = ()  # each task waits for the task of the same index in each of these
    suffix: str = ""

    @property
    def name(self) -> str:
        """Name of the array, unique in its run: rollout-0, score-1-2 (the third block), score-1.ready."""
        return self.job.log_stem + (f"-{self.block}" if self.block else "") + self.suffix

    @property
    def indices(self) -> str:
        """The array's indices in sbatch's notation: "0-3,7"."""
        return ",".join(f"{first}-{last}" if first < last else f"{first}" for first, last in _runs(sorted(self.chunks)))

    @property
    def script(self) -> Path:
        return self.run.paths.slurm / f"{self.name}.sh"

    @property
    def tasks_file(self) -> Path:
        return self.run.paths.slurm / f"{self.name}.json"

    def events(self, index: int) -> Path:
        """File that receives the progress and the outcome of a task."""
        return self.run.paths.slurm / f"{self.name}-{index}.events.jsonl"

    def log(self, job: str = "%A", index: str = "%a") -> Path:
        return self.run.paths.logs / f"{self.name}.slurm-{job}_{index}.log"

    def tasks_text(self) -> str:
        """Content of the tasks file: {index: task}."""
        tasks = {
            str(index): json.loads(Task(self.run, self.job, parts).to_json(events=self.events(index).absolute()))
            for index, parts in sorted(self.chunks.items())
        }
        return json.dumps(tasks, indent=1) + "\n"


# -- from a plan to arrays -------------------------------------------------------------------------------------------


def arrays_of(work: Work, settings: SlurmSettings) -> list[Array]:
    """Return the arrays of all missing parts, each after those it depends on."""
    arrays: dict[tuple[str, str], list[Array]] = {}  # by the job's key
    for run, job in work:
        if job.key not in arrays and not run.is_done(job):
            arrays[job.key] = [
                array
                for block, chunks in enumerate(_blocks(run, job, settings))
                for array in _block_arrays(run, job, block, chunks, arrays)
            ]
    return [array for group in arrays.values() for array in group]


def _blocks(run: Run, job: Job, settings: SlurmSettings) -> Iterator[dict[int, tuple[int, ...]]]:
    """Divide the chunks of missing parts so that no array exceeds the cluster's limit."""
    parts = job.output.parts
    size = settings.parts_per_task if job.stage.divisible else parts
    missing = run.missing_parts(job)
    chunks = [
        tuple(part for part in range(start, min(start + size, parts)) if part in missing)
        for start in range(0, parts, size)
    ]
    for start in range(0, len(chunks), settings.array_size):
        yield {index: chunk for index, chunk in enumerate(chunks[start : start + settings.array_size]) if chunk}


def _block_arrays(
    run: Run,
    job: Job,
    block: int,
    chunks: Mapping[int, tuple[int, ...]],
    arrays: Mapping[tuple[str, str], Sequence[Array]],
) -> Iterator[Array]:
    """Return the arrays of one block, one for each set of dependencies."""
    after: list[Array] = []
    partners: list[Array] = []  # arrays whose tasks make the inputs of tasks of the same index
    for input_ in job.inputs.values():
        made = arrays.get((input_.identity.kind, input_.identity.key), ())
        if input_.by_part:
            partners += [array for array in made if array.block == block]
        else:
            after += made
    groups: dict[tuple[Array, ...], dict[int, tuple[int, ...]]] = defaultdict(dict)
    for index, chunk in chunks.items():
        groups[tuple(array for array in partners if index in array.chunks)][index] = chunk
    for number, (partners_, group) in enumerate(sorted(groups.items(), key=lambda item: len(item[0]))):
        suffix = "" if number == len(groups) - 1 else f".{number}" if partners_ else ".ready"
        yield Array(run, job, block, group, tuple(dict.fromkeys(after)), partners_, suffix)


def missing_count(work: Work) -> int:
    return sum(len(run.missing_parts(job)) for run, job in work)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Return the first and last of each run of consecutive numbers."""
    for _, pairs in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in pairs]
        yield run[0], run[-1]


# -- from arrays to scripts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """The submission folder and Python interpreter of the scripts."""

    folder: Path
    python: str

    @classmethod
    def here(cls, settings: SlurmSettings) -> Place:
        return cls(Path.cwd(), settings.python or sys.executable)


def render(array: Array, settings: SlurmSettings, attempts: int, place: Place) -> str:
    """Render the script of ``array``; each of its tasks is tried ``attempts`` times."""
    resources = settings.of(array.job.stage.command)
    options = "".join(f"#SBATCH {option}\n" for option in _options(array, settings, resources, place))
    setup = "".join(f"{line}\n" for line in settings.setup)
    head = (
        f"#!/bin/bash\n# {array.job.name} of run {array.run.name}. A task that runs twice does only what is missing.\n"
    )
    tail = _SUPERVISE.format(full=EXIT_CODES["full"], refused=EXIT_CODES["refused"], retries=attempts - 1)
    return f"{head}{options}{setup}\n{_command(array, resources, place)} &\nwork=$!\n\n{tail}"


def dependency(array: Array, ids: Mapping[Array, int | str]) -> str | None:
    """Return sbatch's dependency option of ``array``, given the ids of the arrays before it."""
    conditions = [f"aftercorr:{ids[other]}" for other in array.after_tasks]
    if array.after:
        conditions.append("afterok:" + ":".join(str(ids[other]) for other in array.after))
    return ",".join(conditions) or None


def dry_run(work: Work, settings: SlurmSettings, attempts: int, place: Place) -> str:
    """Return every script and the commands that would submit them, as text."""
    arrays = arrays_of(work, settings)
    names: dict[Array, int | str] = {}
    commands = []
    for number, array in enumerate(arrays):
        after = dependency(array, names)
        names[array] = f"$job{number}"
        option = f'--dependency="{after}" ' if after else ""
        commands.append(f"job{number}=$(sbatch --parsable {option}{array.script})\n")
    texts = [f"# ==> {array.script} <==\n{render(array, settings, attempts, place)}\n" for array in arrays]
    return "".join([*texts, "# ==> submitted by <==\n", *commands])


def _options(array: Array, settings: SlurmSettings, resources: SlurmResources, place: Place) -> list[str]:
    at_once = f"%{settings.tasks_at_once}" if settings.tasks_at_once else ""
    together = bool(resources.nodes) and array.job.stage.spans_nodes
    gpus = resources.gpus if array.job.stage.gpus(array.run.settings) else 0
    options = {
        "partition": resources.partition,
        "account": resources.account,
        "time": resources.time,
        "nodes": resources.nodes if together else None,
        "ntasks-per-node": 1 if together else None,
        "cpus-per-task": resources.cpus,
        "mem": resources.memory,
        "gres": f"gpu:{gpus}" if gpus else None,
    }
    return [
        f"--job-name={array.run.name}/{array.name}",
        f"--array={array.indices}{at_once}",
        f"--chdir={place.folder}",
        f"--output={array.log()}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{settings.seconds_before_limit}",
        "--kill-on-invalid-dep=yes",
        *(f"--{name}={value}" for name, value in options.items() if value is not None),
        *(resources.extra or ()),
    ]


def _command(array: Array, resources: SlurmResources, place: Place) -> str:
    processes = array.job.stage.processes(array.run.settings)
    nodes = resources.nodes or 1 if array.job.stage.spans_nodes else 1
    index = '"$SLURM_ARRAY_TASK_ID"'
    file = str(array.tasks_file)
    if nodes == 1:
        return f"{shlex.join([place.python, *worker_command(processes, file)])} {index}"
    # the script runs on the first node; every job has a port of its own
    meeting = (
        '--rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$(hostname):$((20000 + SLURM_JOB_ID % 20000))"'
    )
    cpus = f" --cpus-per-task={resources.cpus}" if resources.cpus else ""  # srun does not take the script's
    srun = f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1{cpus} --kill-on-bad-exit=1"
    torchrun = shlex.join([place.python, *TORCHRUN, f"--nproc-per-node={processes}"])
    worker = shlex.join(worker_command(1, file))
    return f"{srun} \\\n    {torchrun} --nnodes={nodes} {meeting} \\\n    {worker} {index}"
