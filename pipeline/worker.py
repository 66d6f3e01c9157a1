"""Workers: the single entry point for tasks, in this process or in a new one.

    python -m eopd.pipeline.worker TASK             do a task (JSON), then exit with a code that says how it ended
    python -m eopd.pipeline.worker FILE NUMBER      do the task of that number in a JSON file {number: task}
    python -m eopd.pipeline.worker --serve FD       do one task after another, as they come on stdin, one a line

A served worker stays warm: it keeps imports, engines and their weights between tasks. It answers each task with `+`
(done) or `-` on the inherited descriptor FD. After IDLE_SECONDS without a task its engines free their memory. It exits
after a task that failed and at the end of stdin.

Progress and, last, the outcome go to the task's events file; what the task prints goes to its log.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import select
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eopd.pipeline.processes import TORCHRUN_VARIABLE, end_with_parent, end_with_parent_if_spawned, rank

if TYPE_CHECKING:
    from eopd.pipeline.errors import Kind, Outcome
    from eopd.pipeline.run import Run
    from eopd.pipeline.tasks import Task
    from eopd.stages.engines.kept import Engines
    from eopd.stages.stage import Job

end_with_parent_if_spawned()

IDLE_SECONDS = 120.0
QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}
SPIN_COUNT, WAIT_POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
SPINS = 6000
"""How often OpenMP's threads look whether the others are done before they sleep. By default it is for milliseconds, in
which they take the core from the thread that they wait for if anything else runs (docs/log.md)."""
OBJECTS_BETWEEN_COLLECTIONS = 50_000
"""In place of Python's 700; each of the usual young collections then takes milliseconds."""


def do(task: Task, engines: Engines | None = None) -> Outcome:
    """Do a task in this process, or start the processes that train together and wait for them.

    Every error of a stage becomes an outcome; the caller decides how the run continues.
    """
    from eopd.pipeline.errors import Outcome
    from eopd.pipeline.processes import trains_together
    from eopd.storage.errors import StoreError

    if trains_together(task):
        return do_together(task)
    try:
        execute(task.run, task.job, task.parts, engines)
    except Exception as error:
        task.run.progress.close()
        print_error(error)
        outcome = outcome_of(error)
        with suppress(StoreError, OSError):  # a full disk has no room for this line either
            log_task(task.run, task.job, **outcome.to_json(), parts=list(task.parts))
        return outcome
    return Outcome("done")


def do_together(task: Task) -> Outcome:
    """Do a task in several processes, as the local launcher does; they stop when this process stops or ends."""
    from eopd.pipeline.errors import Outcome
    from eopd.pipeline.launchers.local import LocalPool
    from eopd.pipeline.progress import SingleDisplay
    from eopd.storage import stopping
    from eopd.storage.errors import StoreFull

    pool = LocalPool(task.run.settings, SingleDisplay(task.run.progress))
    with stopping.in_hand():
        try:
            pool.start(task)
            while not (ended := pool.wait(1.0)):
                stopping.check()
        except StoreFull as full:
            return Outcome("full", str(full))
        finally:
            pool.close()
    ((_, outcome),) = ended
    if outcome.kind != "done":
        task.run.progress.line(f"{task.name}: {outcome.message}")
    return outcome


def execute(run: Run, job: Job, parts: Sequence[int] | None = None, engines: Engines | None = None) -> bool:
    """Do the missing parts of a job, or of ``parts``. False if nothing was missing.

    Raises:
        RunError: an input is not complete yet; names the command that makes it.
    """
    from eopd.pipeline.retention import prune_old
    from eopd.stages.engines.kept import Engines
    from eopd.storage.errors import StoreError
    from eopd.storage.garbage import revive

    chosen = set(range(job.output.parts)) if parts is None else set(parts)
    if not run.missing_parts(job) & chosen:
        return False
    output = run.artifact(job.output)
    committed = output.committed()
    run.check_inputs(job, chosen)
    for part in run.parts_to_rebuild(job):
        revive(output, part)
    run.paths.logs.mkdir(parents=True, exist_ok=True)
    steps = run.scratch_steps(job)
    began = time.monotonic()

    def log_cost() -> float:
        seconds = time.monotonic() - began
        run.progress.close()
        made = len((output.committed() - committed) & chosen)
        if made or run.scratch_steps(job) > steps:  # made 0: training that was interrupted on its way
            log_task(run, job, seconds=seconds, made=made)
        return seconds

    try:
        job.stage.run(run.context(job, sorted(chosen), engines or Engines()))
    except BaseException:
        with suppress(StoreError, OSError):  # work that was stopped or failed took its time too
            log_cost()
        raise
    seconds = log_cost()
    run.progress.line(f"{job.name}: done in {seconds:.1f} s -> {output.folder}")
    if rank() == 0 and run.is_made(job):
        prune_old(run)
    return True


def log_task(run: Run, job: Job, **facts: Any) -> None:
    """Append a task's cost or failure to the run's jobs.jsonl. One process of a group does it."""
    from eopd.storage.files import naming_full_disks
    from eopd.storage.jsonl import append_line

    if rank() == 0:
        run.paths.folder.mkdir(parents=True, exist_ok=True)
        with naming_full_disks(run.paths.jobs):
            append_line(
                run.paths.jobs,
                {
                    "stage": job.stage.name,
                    "round": job.round,
                    "variant": job.variant,
                    "key": job.output.key,
                    "time": time.time(),
                    **facts,
                },
            )


# -- errors ----------------------------------------------------------------------------------------------------------


NO_SUCH_PLACE = {errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EROFS}
"""Errors for paths of the wrong kind. The system's message names the path."""

CHECKED_WITH = ("eopd", "jinja2", "json", "pydantic", "pydantic_core", "pyarrow", "yaml")
"""Packages whose errors, raised again by our own checks, are about the input."""


def is_refusal(error: Exception) -> bool:
    """True if one of our own checks refused the input: the same task would end the same way again.

    That is a ValueError raised in this package, and not in place of an error of the machine, a model or an engine. What
    a run lacks at the moment (``RunError``) may be there the next time.
    """
    from eopd.pipeline.errors import RunError

    if not isinstance(error, ValueError) or isinstance(error, RunError) or _raised_in(error) != "eopd":
        return False
    cause = error.__cause__
    while cause is not None:
        package = type(cause).__module__.partition(".")[0]
        if isinstance(cause, (OSError, MemoryError)) or not {package, _raised_in(cause)} & set(CHECKED_WITH):
            return False
        cause = cause.__cause__
    return True


def _raised_in(error: BaseException) -> str:
    """Return the package whose code raised an error."""
    trace, module = error.__traceback__, ""
    while trace is not None:
        module, trace = str(trace.tb_frame.f_globals.get("__name__", "")), trace.tb_next
    return module.partition(".")[0]


def outcome_of(error: Exception) -> Outcome:
    from eopd.pipeline.errors import Outcome
    from eopd.storage.errors import UserError
    from eopd.storage.files import is_full

    message = message_of(error) if is_for_people(error) else f"{type(error).__name__}: {error}"
    kind: Kind = "full" if is_full(error) else "refused" if is_refusal(error) else "failed"
    return Outcome(kind, message, error.fields() if isinstance(error, UserError) else {})


def is_for_people(error: Exception) -> bool:
    """True if the message names the remedy, so that a traceback would only hide it."""
    from eopd.storage.errors import UserError, missing_package

    if missing_package(error) is not None:
        return True
    misnamed = isinstance(error, OSError) and error.filename is not None and error.errno in NO_SUCH_PLACE
    return isinstance(error, (UserError, ValueError)) or misnamed


def message_of(error: Exception) -> str:
    from eopd.storage.errors import missing_package

    return missing_package(error) or str(error)


def print_error(error: Exception) -> None:
    """Print one line if the message names the remedy, else (or with EOPD_DEBUG=1) the traceback."""
    from eopd.stages.format import escaped

    if os.environ.get("EOPD_DEBUG") or not is_for_people(error):
        traceback.print_exception(error)
    else:
        sys.stderr.write(f"eopd: {escaped(message_of(error))}\n")


# -- the process -----------------------------------------------------------------------------------------------------


def prepare_imports() -> None:
    """Prepare the process for heavy imports.

    Imports make a million objects that stay: Python would look through them for garbage nine times on the way.
    """
    set_environment()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS, *gc.get_threshold()[1:])


def set_environment() -> None:
    """Set the environment of libraries, which read it when they are imported; variables that are set are kept."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if WAIT_POLICY not in os.environ:  # the count would overrule it
        os.environ.setdefault(SPIN_COUNT, str(SPINS))


def do_text(text: str, engines: Engines | None = None) -> Outcome:
    """Do a task given as JSON."""
    from eopd.pipeline.config import load_config
    from eopd.pipeline.progress import EventProgress
    from eopd.pipeline.run import open_run
    from eopd.pipeline.tasks import Task
    from eopd.stages.job import NullProgress
    from eopd.stages.output import output_to

    fields = json.loads(text)
    first = rank() == 0  # of several processes, one speaks for all
    events = EventProgress(Path(fields["events"])) if first and fields["events"] else None
    with output_to(Path(fields["log"])) if fields["log"] else nullcontext():
        try:
            run = open_run(load_config(fields["config"]), progress=events or NullProgress())
            task = Task(run, run.plan.job(fields["stage"], fields["round"], fields["variant"]), tuple(fields["parts"]))
        except Exception as error:
            print_error(error)
            outcome = outcome_of(error)
            if outcome.kind == "refused":  # the caller could open the run: this machine lacks something
                outcome = replace(outcome, kind="failed")
        else:
            outcome = do(task, engines)
    if events is not None:
        events.end(outcome)
    return outcome


def serve(descriptor: int) -> None:
    """Do tasks read from stdin, answering each with `+` (done) or `-`."""
    from eopd.stages.engines.kept import Engines

    engines = Engines(keep=True)
    with os.fdopen(descriptor, "w") as answers:
        for text in _lines_of_stdin(engines):
            outcome = do_text(text, engines)
            answers.write("+" if outcome.kind == "done" else "-")
            answers.flush()
            if outcome.kind != "done":  # a failure may leave anything behind in this process, or on its GPU
                break
    engines.close()


def _lines_of_stdin(engines: Engines) -> Iterator[str]:
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], IDLE_SECONDS if engines.any_open else None)
        if not ready:
            engines.close()
            continue
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def main() -> None:
    from eopd.pipeline.errors import EXIT_CODES
    from eopd.pipeline.processes import temporary_folder
    from eopd.storage.stopping import Stopped, stopping_on_signals

    prepare_imports()
    if TORCHRUN_VARIABLE in os.environ:
        end_with_parent()
    try:
        with stopping_on_signals(announce_stop), temporary_folder():
            match sys.argv[1:]:
                case ["--serve", descriptor]:
                    serve(int(descriptor))
                case [text]:
                    sys.exit(EXIT_CODES[do_text(text).kind])
                case [file, number]:
                    tasks = json.loads(Path(file).read_text(encoding="utf-8"))
                    sys.exit(EXIT_CODES[do_text(json.dumps(tasks[number])).kind])
                case _:
                    sys.exit(__doc__)
    except (Stopped, KeyboardInterrupt):
        sys.exit(EXIT_CODES["interrupted"])


def announce_stop() -> None:
    from eopd.pipeline.progress import seconds_in_hand
    from eopd.stages.format import duration

    seconds = seconds_in_hand()
    wait = "" if seconds is None else f", in about {duration(seconds)}"
    text = f"stopping: what is in hand is finished first{wait}; a second interruption stops at once\n"
    os.write(2, text.encode())  # not through sys.stderr, which the signal may have interrupted in a write


if __name__ == "__main__":
    main()
