"""The `eopd` command. Settings are parsed before anything heavy is imported, and `eopd --help` imports neither."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eopd.pipeline.doctor_cli import doctor
from eopd.pipeline.launchers.processes import TORCHRUN_VARIABLE, end_with_parent, end_with_parent_if_spawned
from eopd.pipeline.plan_cli import Config, Set, Sweep, open_runners, plan
from eopd.pipeline.status_cli import Runs as RunsFolder
from eopd.pipeline.status_cli import config_of, logs, status
from eopd.pipeline.store_cli import app as store_app
from eopd.pipeline.student_cli import student
from eopd.pipeline.temporary import temporary_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eopd.pipeline.plan import Stage
    from eopd.pipeline.progress import Display
    from eopd.pipeline.runner import Runner
    from eopd.stages.job import Progress

end_with_parent_if_spawned()

app = typer.Typer(
    help="Offline-teacher distillation of language models: the teacher reads what the student sampled once, in batch; "
    "its scores are stored, and training reads them.\n\n"
    "CONFIG is a YAML file, or the name of one that comes with eopd (such as quickstart).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(store_app, name="store")

Runs = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="Names of runs, their folders (runs/quickstart), or their CONFIGs."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder for the page (default: of one run its own; else RUNS/compared)."),
]
Round = Annotated[int, typer.Option("--round", "-r", min=0, help="Round to work on, counted from 0.")]
EvaluatedRound = Annotated[
    int, typer.Option("--round", "-r", min=0, help="Which student: 0 is the first, R the one trained in round R - 1.")
]
Parts = Annotated[
    str | None,
    typer.Option(
        "--parts",
        metavar="PARTS",
        help="Work on some of the parts, beside other jobs: share I of N of them as I/N (1/4 .. 4/4), or their "
        "numbers, as 3,7,11.",
    ),
]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        sys.stdout.write(f"eopd {version('eopd')}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def rollout(config: Config, round_: Round = 0, parts: Parts = None, set_: Set = None) -> None:
    """Sample responses from the current student."""
    _stage("rollout", config, round_, parts, set_)


@app.command()
def score(config: Config, round_: Round = 0, parts: Parts = None, set_: Set = None) -> None:
    """Let the teacher read them: entropy, top log-probs and tail of every token, to Zarr."""
    _stage("score", config, round_, parts, set_)


@app.command()
def train(config: Config, round_: Round = 0, set_: Set = None) -> None:
    """Train the student on stored rollouts and scores."""
    _stage("train", config, round_, None, set_)


@app.command()
def evaluate(
    config: Config,
    round_: EvaluatedRound = 0,
    parts: Parts = None,
    set_: Set = None,
    disagreements: Annotated[
        bool,
        typer.Option(
            "--disagreements", help="Evaluate nothing: list samples that a plain comparison judges otherwise."
        ),
    ] = False,
) -> None:
    """Measure a student: Avg@k and Pass@k on the benchmarks."""
    if disagreements:
        from eopd.pipeline.grading import list_disagreements

        runner = _open(config, set_)
        count = list_disagreements(runner, round_, sys.stdout.write)
        runner.progress.line(f"{count} samples on which the verifier and a plain comparison of answers differ")
        return
    _stage("evaluate", config, round_, parts, set_)


@app.command()
def align(config: Config, round_: EvaluatedRound = 0, parts: Parts = None, set_: Set = None) -> None:
    """Compare teacher and student on an evaluation's samples, by teacher entropy (evaluate.alignment)."""
    _stage("align", config, round_, parts, set_)


@app.command()
def report(runs: Runs, out: Out = None, set_: Set = None, folder: RunsFolder = Path("runs")) -> None:
    """Write the HTML report of a run, or one page that compares several, from whatever is complete."""
    from eopd.pipeline.progress import make_display
    from eopd.pipeline.reporting import write_comparison, write_report

    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, and the page needs a folder; name another")
    display = make_display()
    runners = [_open(config_of(name, folder), set_, display) for name in dict.fromkeys(runs)]
    if len(runners) == 1 and out is None:
        page = write_report(runners[0])
    else:
        page = write_comparison(runners, out or Path(runners[0].settings.runs) / "compared")
    runners[0].progress.line(f"report: {page}")


@app.command()
def run(
    config: Config,
    set_: Set = None,
    sweep: Sweep = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With launcher.kind=slurm: print the scripts, submit nothing.")
    ] = False,
) -> None:
    """Every stage of every round in order, skipping what is complete; then the report."""
    from eopd.pipeline.launchers.start import bring_to_end, show_submission
    from eopd.pipeline.progress import make_display
    from eopd.pipeline.pruning import prune_old
    from eopd.pipeline.reporting import write_report
    from eopd.pipeline.students import whereabouts
    from eopd.stages.train.extras import require_extras

    display = make_display()
    runners = open_runners(config, set_, sweep, lambda: worker_progress() or display.open())
    for runner in runners:
        require_extras(runner.settings.train)
    work = [(runner, job) for runner in runners for job in runner.plan.jobs]
    launcher = runners[0].settings  # the same in all runs of a sweep
    if dry_run:
        sys.stdout.write(show_submission(work, launcher))
        return
    _refuse_what_cannot_end_well(runners, works_here=launcher.launcher.kind == "inline", whole=True)
    for runner in runners:
        _write_resolved(runner)
    # Ray finds its cluster through the temporary folder of the machine
    with nullcontext() if launcher.launcher.kind in ("ray", "slurm") else temporary_folder():
        ended = bring_to_end(work, launcher, display)
    if ended:
        for runner in runners:
            prune_old(runner)
            page = write_report(runner)
            runner.progress.line(f"report: {page}")
            runner.progress.line(whereabouts(runner))


app.command()(plan)
app.command()(status)
app.command()(logs)
app.command()(student)
app.command()(doctor)


def _open(config: str, overrides: list[str] | None, display: Display | None = None) -> Runner:
    from eopd.pipeline.progress import make_display

    (runner,) = open_runners(config, overrides, None, lambda: worker_progress() or (display or make_display()).open())
    return runner


def worker_progress() -> Progress | None:
    """Of a process that another one started: its events, or nothing where the first of several speaks for all."""
    from eopd.pipeline.launchers.processes import rank
    from eopd.pipeline.progress import EVENTS_VARIABLE, EventProgress
    from eopd.stages.job import NullProgress

    if rank() > 0:
        return NullProgress()
    events = os.environ.get(EVENTS_VARIABLE)
    return EventProgress(Path(events)) if events else None


def _stage(stage: Stage, config: str, round_: int, parts: str | None, overrides: list[str] | None) -> None:
    from eopd.pipeline.launchers.base import Task
    from eopd.pipeline.launchers.processes import stage_command, trains_together

    runner = _open(config, overrides)
    job = runner.plan.job(stage, round_)
    chosen = _share(parts, job.output.parts)
    if chosen == []:
        runner.progress.line(f"{job.name}: share {parts} is empty, as there are only {job.output.parts} parts")
        return
    if worker_progress() is None and not runner.is_idle(job, chosen):  # who starts workers has asked for them
        _refuse_what_cannot_end_well([runner], works_here=True, trains=stage not in ("evaluate", "align"))
    _write_resolved(runner)
    task = Task(runner, job, tuple(chosen or range(job.output.parts)))
    if not runner.is_done(job) and trains_together(task):
        os.execv(sys.executable, [sys.executable, *stage_command(task)])
    with temporary_folder():
        did_something = runner.run(job, chosen)
    if not did_something:
        runner.progress.line(f"{job.name}: complete already -> {runner.artifact(job.output).folder}")


def _refuse_what_cannot_end_well(
    runners: Sequence[Runner], *, works_here: bool, trains: bool = True, whole: bool = False
) -> None:
    """Raises ConfigError before any work.

    Args:
        works_here: whether this process will do the work.
        trains: whether it is work towards a training, whose objective must find what it reads.
        whole: read every row of the prompt sources, and not the first ones only.
    """
    from eopd.pipeline.budget import refuse_too_large, refuse_what_the_machine_lacks
    from eopd.pipeline.models import refuse_incomplete_weights
    from eopd.pipeline.needs import refuse_unmet_needs
    from eopd.pipeline.prompt_check import FIRST_ROWS, refuse_unreadable_prompts
    from eopd.pipeline.vocabularies import refuse_other_vocabulary
    from eopd.storage.fingerprints import Digests

    refuse_unreadable_prompts(runners, None if whole else FIRST_ROWS)
    for runner in runners:
        facts, settings = runner.facts, runner.settings
        models = {"student": (settings.student, facts.student), "teacher": (settings.teacher, facts.teacher)}
        if not all(runner.is_done(job) for job in runner.plan.jobs):
            refuse_incomplete_weights(models, facts.digests or Digests(), in_process=works_here)
        refuse_other_vocabulary(runner.facts)
        for job in runner.plan.jobs:
            if trains and job.stage == "train" and not runner.is_done(job):
                refuse_unmet_needs(runner, job.round)
    refuse_too_large(runners)
    refuse_what_the_machine_lacks(runners)


def _share(text: str | None, parts: int) -> list[int] | None:
    """Part numbers of share "i/n" or of a list "3,7,11"; None for all of them."""
    from eopd.pipeline.config import ConfigError

    if text is None:
        return None
    share, slash, shares = text.partition("/")
    if slash and share.isdigit() and shares.isdigit() and 1 <= int(share) <= int(shares):
        return list(range(int(share) - 1, parts, int(shares)))
    numbers = text.split(",")
    if slash or not all(number.isdigit() and int(number) < parts for number in numbers):
        raise ConfigError(
            f"--parts {text!r}: expected I/N with 1 <= I <= N, such as 2/4, or numbers of parts (0 to {parts - 1}), "
            "such as 0,3,7"
        )
    return sorted({int(number) for number in numbers})


def _write_resolved(runner: Runner) -> None:
    import yaml

    from eopd.pipeline.launchers.processes import rank
    from eopd.pipeline.neighbours import register
    from eopd.storage.files import replace_atomically

    if rank() > 0:
        return
    resolved = runner.settings.model_dump(mode="json")
    replace_atomically(runner.paths.config, yaml.safe_dump(resolved, sort_keys=False))
    register(runner)


def main() -> None:
    """Entry point: errors that a person can mend are one message, not a traceback (EOPD_DEBUG=1 shows it)."""
    from eopd.pipeline.ends import EXIT_INTERRUPTED, be_quiet, is_for_people, tell_end
    from eopd.stages.format import escaped
    from eopd.storage.stopping import Stopped, stopping_on_signals

    be_quiet()
    if TORCHRUN_VARIABLE in os.environ:
        end_with_parent()
    try:
        with stopping_on_signals(_tell_stop):
            app()
    except (Stopped, KeyboardInterrupt):
        sys.stderr.write("interrupted; everything committed is kept, run the same command to go on\n")
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        code = tell_end(error, worker_progress())
        if os.environ.get("EOPD_DEBUG") or not is_for_people(error):
            raise
        sys.stderr.write(f"eopd: {escaped(str(error))}\n")
        sys.exit(code)


def _tell_stop() -> None:
    from eopd.pipeline.progress import seconds_in_hand
    from eopd.stages.format import duration

    seconds = seconds_in_hand()
    wait = "" if seconds is None else f", in about {duration(seconds)}"
    text = f"stopping: what is in hand is finished first{wait}; a second interruption stops at once\n"
    os.write(2, text.encode())  # not through sys.stderr, which the signal may have interrupted in a write


if __name__ == "__main__":
    main()
