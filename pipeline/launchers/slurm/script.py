"""The text of a job array's script: pure.

A task that runs twice does only what is missing, so everything that can go wrong with one has the same answer: run it
again. Near its time limit, or when it fails, a task puts itself back into the queue; when its node dies or it is
pre-empted, Slurm does (``--requeue``).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eopd.pipeline.ends import EXIT_FULL, EXIT_REFUSED
from eopd.pipeline.launchers.processes import TORCHRUN
from eopd.pipeline.launchers.slurm.arrays import Array, Work, arrays_of
from eopd.pipeline.launchers.slurm.settings import SlurmResources, SlurmSettings

_AGAIN = """\
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
elif [ -z "$stopped" ] && [[ $code != {full} && $code != {refused} ]] &&
    [ "${{SLURM_RESTART_COUNT:-0}}" -lt {retries} ]; then
    again "ended with code $code"
fi
exit $code
"""


@dataclass(frozen=True)
class Place:
    """Where scripts run: the folder they are submitted from, and the interpreter."""

    folder: Path
    python: str

    @classmethod
    def here(cls, settings: SlurmSettings) -> Place:
        return cls(Path.cwd(), settings.python or sys.executable)


def script_path(array: Array) -> Path:
    return array.runner.paths.slurm / f"{array.name}.sh"


def log_path(array: Array, job: str = "%A", index: str = "%a") -> Path:
    return array.runner.paths.logs / f"{array.name}.slurm-{job}_{index}.log"


def render(array: Array, settings: SlurmSettings, attempts: int, place: Place) -> str:
    """The script of ``array``; each of its tasks is tried ``attempts`` times."""
    resources = settings.of(array.job.stage)
    options = "".join(f"#SBATCH {option}\n" for option in _options(array, settings, resources, place))
    setup = "".join(f"{line}\n" for line in settings.setup)
    cases = "".join(f"    {index}) parts={_numbers(parts)} ;;\n" for index, parts in sorted(array.chunks.items()))
    run = array.runner.settings.name
    head = f"#!/bin/bash\n# {array.job.name} of run {run}. A task that runs twice does only what is missing.\n"
    parts = "" if array.job.stage == "train" else f"case $SLURM_ARRAY_TASK_ID in\n{cases}esac\n"
    tail = _AGAIN.format(full=EXIT_FULL, refused=EXIT_REFUSED, retries=attempts - 1)
    return f"{head}{options}{setup}{parts}\n{_command(array, resources, place)} &\nwork=$!\n\n{tail}"


def dependency(array: Array, ids: Mapping[Array, int | str]) -> str | None:
    """For sbatch: what ``array`` waits for, by the ids that the arrays before it were given."""
    if array.after_task is not None:
        return f"aftercorr:{ids[array.after_task]}"
    if not array.after:
        return None
    return "afterok:" + ":".join(str(ids[other]) for other in array.after)


def dry_run(work: Work, settings: SlurmSettings, attempts: int, place: Place) -> str:
    """Every script and the commands that would submit them, as text."""
    arrays = arrays_of(work, settings)
    names: dict[Array, int | str] = {}
    commands = []
    for number, array in enumerate(arrays):
        after = dependency(array, names)
        names[array] = f"$job{number}"
        option = f'--dependency="{after}" ' if after else ""
        commands.append(f"job{number}=$(sbatch --parsable {option}{script_path(array)})\n")
    texts = [f"# ==> {script_path(array)} <==\n{render(array, settings, attempts, place)}\n" for array in arrays]
    return "".join([*texts, "# ==> submitted by <==\n", *commands])


def _options(array: Array, settings: SlurmSettings, resources: SlurmResources, place: Place) -> list[str]:
    at_once = f"%{settings.tasks_at_once}" if settings.tasks_at_once else ""
    asked = {
        "partition": resources.partition,
        "account": resources.account,
        "time": resources.time,
        "nodes": resources.nodes if array.job.stage == "train" else None,
        "ntasks-per-node": 1 if array.job.stage == "train" and resources.nodes else None,
        "cpus-per-task": resources.cpus,
        "mem": resources.memory,
        "gres": f"gpu:{resources.gpus}" if resources.gpus else None,
    }
    return [
        f"--job-name={array.runner.settings.name}/{array.name}",
        f"--array={array.indices}{at_once}",
        f"--chdir={place.folder}",
        f"--output={log_path(array)}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{settings.seconds_before_limit}",
        "--kill-on-invalid-dep=yes",
        *(f"--{name}={value}" for name, value in asked.items() if value is not None),
        *(resources.extra or ()),
    ]


def _command(array: Array, resources: SlurmResources, place: Place) -> str:
    job, settings = array.job, array.runner.settings
    stage = [job.stage, str(array.runner.paths.config), "--round", str(job.round)]
    module = ["-m", "eopd.pipeline.cli", *stage]
    nodes, processes = resources.nodes or 1, settings.train.processes
    if job.stage != "train":
        return shlex.join([place.python, *module]) + ' --parts "$parts"'
    if nodes * processes == 1:
        return shlex.join([place.python, *module])
    torchrun = shlex.join([place.python, *TORCHRUN, f"--nproc-per-node={processes}"])
    if nodes == 1:
        return f"{torchrun} --standalone {shlex.join(module)}"
    # the script runs on the first node; every job has a port of its own
    meeting = (
        '--rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$(hostname):$((20000 + SLURM_JOB_ID % 20000))"'
    )
    cpus = f" --cpus-per-task={resources.cpus}" if resources.cpus else ""  # srun does not take the script's
    srun = f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1{cpus} --kill-on-bad-exit=1"
    return f"{srun} \\\n    {torchrun} --nnodes={nodes} {meeting} \\\n    {shlex.join(module)}"


def _numbers(parts: tuple[int, ...]) -> str:
    return ",".join(map(str, parts))
