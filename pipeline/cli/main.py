"""`eopd run`, the stages' commands and `eopd report`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from eopd.pipeline.cli import inspect
from eopd.pipeline.cli.options import Config, RunsFolder, Set, Sweep, config_of, open_runs
from eopd.pipeline.cli.push import app as push_app
from eopd.pipeline.cli.store import app as store_app
from eopd.pipeline.processes import end_with_parent_if_spawned, temporary_folder
from eopd.storage.errors import InputError

if TYPE_CHECKING:
    from eopd.pipeline.progress import Display
    from eopd.pipeline.run import Run
    from eopd.stages.stage import Job, Stage

end_with_parent_if_spawned()


class Commands(TyperGroup):
    """The commands below, and one for every other stage of ``stages.table``.

    The table is imported only if a command is not among those below, or if other packages bring stages.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        from importlib.metadata import entry_points

        names = super().list_commands(ctx)
        if not entry_points(group="eopd.stages"):
            return names
        from eopd.stages.table import commands

        return [*names, *(name for name in commands() if name not in names)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            return command
        from eopd.stages.table import STAGES

        stages = [stage for stage in STAGES if stage.command == cmd_name]
        return stage_command(cmd_name, stages) if stages else None


def stage_command(name: str, stages: Sequence[Stage]) -> Any:
    """Build a command that runs stages. Its help is the docstring of the stage of its name, or of the first one."""
    first = next((stage for stage in stages if stage.name == name), stages[0])
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name, help=type(first).__doc__)(round_command(name))
    return typer.main.get_command(single)


def round_command(name: str) -> Callable[..., None]:
    """Return the function of a command whose stages work on a round."""

    def work(config: Config, round_: Round = 0, parts: Parts = None, set_: Set = None) -> None:
        _stage(name, config, round_, parts, set_)

    return work


def student_command(name: str) -> Callable[..., None]:
    """Return the function of a command whose stages look at a student."""

    def work(config: Config, round_: StudentRound = 0, parts: Parts = None, set_: Set = None) -> None:
        _stage(name, config, round_, parts, set_)

    return work


app = typer.Typer(
    cls=Commands,
    help="Offline-teacher distillation of language models: the teacher reads what the student sampled once, in batch; "
    "its scores are stored, and training reads them.\n\n"
    "CONFIG is a YAML file, or the name of one that comes with eopd (such as quickstart).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(store_app, name="store")
app.add_typer(push_app, name="push")

RunNames = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="Names or folders of runs (runs/quickstart), YAML files or config names."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder for the page (default: of one run its own; else RUNS/compared)."),
]
Round = Annotated[int, typer.Option("--round", "-r", min=0, help="Round to work on, counted from 0.")]
StudentRound = Annotated[
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


def _print_version(requested: bool) -> None:
    if requested:
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


for _name, _help in (
    ("guide", "Sample the teacher's own responses, where rollouts begin with a part of them (rollout.source: prefix)."),
    ("rollout", "Make the responses of a round: the student's, the teacher's, or those that come with the prompts."),
    ("score", "Compute the teacher's entropy, top log-probs and tail for every sampled token."),
    ("judge", "Judge the responses with the prompts' verifier (if train.select.verdict asks for it)."),
):
    app.command(_name, help=_help)(round_command(_name))


@app.command()
def train(config: Config, round_: Round = 0, set_: Set = None) -> None:
    """Train the student on stored rollouts and scores."""
    _stage("train", config, round_, None, set_)


for _name, _help in (
    ("evaluate", "Measure a student: Avg@k and Pass@k on the benchmarks."),
    ("align", "Compare teacher and student on an evaluation's samples, by teacher entropy (evaluate.alignment)."),
    ("route", "Choose a mode for each problem by the entropy of its first tokens (evaluate.route)."),
    (
        "attribute",
        "Attribute evaluated samples to documents by gradients, and compare the documents' bins (attribute).",
    ),
):
    app.command(_name, help=_help)(student_command(_name))


@app.command()
def report(names: RunNames, out: Out = None, set_: Set = None, runs: RunsFolder = Path("runs")) -> None:
    """Write the HTML report of a run, or one page that compares several, from whatever is complete."""
    from eopd.pipeline.progress import make_display
    from eopd.pipeline.report import write_comparison, write_report

    if out is not None and out.exists() and not out.is_dir():
        raise InputError(
            f"--out {out} is a file, and the page needs a folder", setting="--out", file=out, remedy="name another"
        )
    display = make_display()
    opened = [_open(config_of(name, runs), set_, display) for name in dict.fromkeys(names)]
    if len(opened) == 1 and out is None:
        page = write_report(opened[0])
    else:
        page = write_comparison(opened, out or Path(opened[0].settings.runs) / "compared")
    opened[0].progress.line(f"report: {page}")


@app.command()
def run(
    config: Config,
    set_: Set = None,
    sweep: Sweep = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With launcher.kind=slurm: print the scripts, submit nothing.")
    ] = False,
) -> None:
    """Do every stage of every round in order, skipping complete parts; then write the report."""
    from eopd.pipeline.export import where_students_are
    from eopd.pipeline.launchers.launch import launch, show_submission
    from eopd.pipeline.progress import make_display
    from eopd.pipeline.report import write_report
    from eopd.pipeline.retention import prune_old
    from eopd.stages.train.settings import require_extras

    display = make_display()
    runs = open_runs(config, set_, sweep, display.open)
    for one in runs:
        require_extras(one.settings.train)
    work = [(one, job) for one in runs for job in one.plan.jobs]
    settings = runs[0].settings  # a sweep's runs have one launcher
    if dry_run:
        sys.stdout.write(show_submission(work, settings))
        return
    _check(runs, works_here=settings.launcher.kind == "inline", every_row=True)
    for one in runs:
        _begin(one)
    # Ray finds its cluster through the machine's temporary folder
    with nullcontext() if settings.launcher.kind in ("ray", "slurm") else temporary_folder():
        ended = launch(work, settings, display)
    if ended:
        for one in runs:
            prune_old(one)
            page = write_report(one)
            one.progress.line(f"report: {page}")
            one.progress.line(where_students_are(one))


for command in (inspect.plan, inspect.status, inspect.logs, inspect.student, inspect.doctor):
    app.command()(command)


def _open(config: str, overrides: list[str] | None, display: Display | None = None) -> Run:
    from eopd.pipeline.progress import make_display

    (run,) = open_runs(config, overrides, None, (display or make_display()).open)
    return run


def _stage(command: str, config: str, round_: int, parts: str | None, overrides: list[str] | None) -> None:
    """Do the jobs of one command and round for which inputs are available."""
    from eopd.pipeline.errors import EXIT_CODES
    from eopd.pipeline.tasks import Task
    from eopd.pipeline.worker import do
    from eopd.stages.engines.kept import Engines

    run = _open(config, overrides)
    jobs = run.plan.of_command(command, round_)
    chosen = parse_parts(parts, jobs[0].output.parts)
    if chosen == []:
        run.progress.line(f"{jobs[0].name}: share {parts} is empty, as there are only {jobs[0].output.parts} parts")
        return
    wanted = [_wanted_parts(run, job, jobs[0], chosen) for job in jobs]
    if any(wanted):
        _check([run], jobs, works_here=True)
    _begin(run)
    engines = Engines(keep=True)
    for number, (job, todo) in enumerate(zip(jobs, wanted, strict=True)):
        if not todo:
            run.progress.line(f"{job.name}: complete already -> {run.artifact(job.output).folder}")
            continue
        if number and not todo <= run.ready_parts(job):
            run.progress.line(f"{job.name}: waits for parts of its inputs that are not there yet")
            continue
        with temporary_folder():
            outcome = do(Task(run, job, tuple(sorted(todo))), engines)
        if outcome.kind != "done":
            sys.exit(EXIT_CODES["full" if outcome.kind == "full" else "failed"])
    engines.close()


def _wanted_parts(run: Run, job: Job, first: Job, chosen: list[int] | None) -> set[int]:
    """Return the missing parts of a command's job; chosen parts apply to jobs that are divided as the first one is."""
    missing = run.missing_parts(job)
    divided = chosen is not None and job.output.parts == first.output.parts and job.stage.divisible
    return missing & set(chosen) if divided and chosen is not None else missing


def parse_parts(text: str | None, parts: int) -> list[int] | None:
    """Parse a share "i/n" or a list "3,7,11" into part numbers; None selects all parts."""
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
            "such as 0,3,7",
            setting="--parts",
        )
    return sorted({int(number) for number in numbers})


def _check(
    runs: Sequence[Run], jobs: Sequence[Job] | None = None, *, works_here: bool, every_row: bool = False
) -> None:
    """Refuse a run that cannot succeed before any work. Raises ConfigError."""
    from eopd.pipeline.checks import check_runs

    check_runs(runs, jobs, works_here=works_here, every_row=every_row)


def _begin(run: Run) -> None:
    """Write the resolved settings to the run's folder and the run's note to the store."""
    import yaml

    from eopd.pipeline.retention import note
    from eopd.storage.files import replace_atomically

    resolved = run.settings.model_dump(mode="json")
    replace_atomically(run.paths.config, yaml.safe_dump(resolved, sort_keys=False))
    note(run)
    if run.facts.digests is not None:
        run.facts.digests.save()  # the store may only now exist: workers need not hash the models again


@app.command()
def prepare(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="A language model in GGUF format.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the report; new or empty.")],
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16 (default: the file's own; float32 if it is quantised).")
    ] = "auto",
) -> None:
    """Write a GGUF file as an ordinary model folder. Runs that name a GGUF file do so themselves, in their store."""
    from eopd.pipeline.config import ConfigError
    from eopd.stages.models.gguf import prepare_in_process

    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is no empty folder", file=folder, remedy="name another")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype!r} is not one of float32, bfloat16, float16", setting="--dtype")
    try:
        prepare_in_process(model, folder, dtype)
    except (ValueError, OSError) as error:
        raise ConfigError.of(error) from error
    sys.stdout.write(f"{folder}\n")


def main() -> None:
    """Entry point: a known error prints one line with its remedy, not a traceback (EOPD_DEBUG=1 shows it)."""
    from eopd.pipeline.errors import EXIT_CODES
    from eopd.pipeline.worker import announce_stop, is_for_people, prepare_imports, print_error
    from eopd.storage.files import is_full
    from eopd.storage.stopping import Stopped, stopping_on_signals

    prepare_imports()
    try:
        with stopping_on_signals(announce_stop):
            app()
    except (Stopped, KeyboardInterrupt):
        sys.stderr.write("interrupted; everything committed is kept, run the same command to go on\n")
        sys.exit(EXIT_CODES["interrupted"])
    except Exception as error:
        if os.environ.get("EOPD_DEBUG") or not is_for_people(error):
            raise
        print_error(error)
        sys.exit(EXIT_CODES["full" if is_full(error) else "failed"])  # people have no use for further differences
