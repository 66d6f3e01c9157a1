"""`eopd plan`, `status`, `logs`, `student` and `doctor`: looking at a run, from any machine that sees its folders."""

from __future__ import annotations

import json
import sys
import time
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eopd.pipeline.cli.options import (
    Config,
    RunName,
    RunsFolder,
    Set,
    StudentNumber,
    Sweep,
    config_of,
    open_runs,
    paths_of,
)
from eopd.stages.format import escaped, printable
from eopd.storage.errors import InputError
from eopd.storage.stopping import Stopped

if TYPE_CHECKING:
    from eopd.pipeline.errors import Finding

FINDING_STYLES = {"ok": "32", "warning": "33", "broken": "1;31", "absent": "2"}


def plan(
    config: Config,
    set_: Set = None,
    sweep: Sweep = None,
    all_: Annotated[bool, typer.Option("--all", help="Every job of every round; no folding.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show every job: its state, what is missing, and what the rest will take. Changes nothing."""
    from eopd.pipeline.forecast import forecast
    from eopd.pipeline.prompt_check import FIRST_ROWS, check_prompts

    runs = open_runs(config, set_, sweep)
    planned = forecast(runs)
    check_prompts(runs, FIRST_ROWS)
    if as_json:
        sys.stdout.write(json.dumps(planned.to_json(), indent=1) + "\n")
        return
    from eopd.pipeline.status import make_console, plan_table

    console = make_console()
    console.print(plan_table(planned, every_job=all_))
    from eopd.pipeline.forecast import gpu_bytes, lines, needs_of

    gpu = gpu_bytes()
    for line in lines(needs_of(runs, gpu)) if gpu else ():
        console.print(line)
    for stage in dict.fromkeys(row.job.stage for row in planned.rows if not row.is_done):
        lacking = stage.lacks()
        if lacking is not None:  # another machine may do the work
            console.print(f"Not on this machine: {lacking}", style="yellow")


def status(
    run: RunName,
    set_: Set = None,
    sweep: Sweep = None,
    runs: RunsFolder = Path("runs"),
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    every: Annotated[float, typer.Option("--every", min=0.2, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Show a run's progress: parts, rates, workers and failures. Ctrl-C closes the view; the run continues."""
    from eopd.pipeline.run import open_run
    from eopd.pipeline.status import make_console, status_view, take_status

    opened = open_runs(config_of(run, runs), set_, sweep)
    console = make_console()
    if once or not console.is_terminal:
        console.print(status_view(take_status(opened)))
        return
    from rich.live import Live

    try:
        with Live(console=console, auto_refresh=False, screen=True) as live:
            while True:
                live.update(status_view(take_status(opened)), refresh=True)
                time.sleep(every)
                # planned again: a coverage that was completed meanwhile may serve
                opened = [open_run(one.settings, one.facts) for one in opened]
    except (KeyboardInterrupt, Stopped):
        console.print(status_view(take_status(opened)))


def logs(
    run: RunName,
    runs: RunsFolder = Path("runs"),
    stage: Annotated[str | None, typer.Option("--stage", help="Only this stage: rollout, score, ...")] = None,
    round_: Annotated[int | None, typer.Option("--round", "-r", min=0, help="Only this round.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow new lines until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Lines of each log.")] = 20,
) -> None:
    """Show the end of a run's logs, the latest last; -f follows them and any new ones."""
    from eopd.pipeline.logs import find_logs, tail
    from eopd.pipeline.logs import follow as follow_logs

    folder = paths_of(run, runs).logs
    # lengths are read once: `follow` begins with lines that are added meanwhile
    ends = {path: path.stat().st_size for path in find_logs(folder, stage, round_)}
    for path, end in ends.items():
        sys.stdout.write(f"==> {escaped(path.name)} <==\n")
        sys.stdout.writelines(f"{escaped(line, colours=True)}\n" for line in tail(path, lines, end))
    sys.stdout.flush()
    if not follow:
        return
    try:
        for line in follow_logs(folder, ends, stage, round_, 0.5):
            sys.stdout.write(escaped(line, colours=True) + "\n")
            sys.stdout.flush()
    except (KeyboardInterrupt, Stopped):
        return


def student(
    run: RunName,
    set_: Set = None,
    runs: RunsFolder = Path("runs"),
    round_: StudentNumber = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Copy the model there; FOLDER is new or empty.")
    ] = None,
) -> None:
    """Print the folder of a trained student, or copy it out of the store: a model that transformers and vLLM load."""
    from eopd.pipeline.export import copy_student, ends_of, find_student, newest

    (opened,) = open_runs(config_of(run, runs), set_, None)
    model = find_student(opened, newest(opened) if round_ is None else round_)
    if to is not None:
        copy_student(model, to)
    sys.stderr.write(f"{model}\n{ends_of(opened, model)}\n")
    sys.stdout.write(f"{model.folder if to is None else to}\n")


def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="Look at all that a run of this config needs, too.")
    ] = None,
    store: Annotated[str | None, typer.Option("--store", help="Look at this store (default: ./store).")] = None,
    engines: Annotated[bool, typer.Option("--engines/--no-engines", help="Import vLLM too, which takes long.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check this machine, the packages, the store and the inputs of CONFIG; exit code 1 if a run could not work."""
    from eopd.pipeline.doctor import examine, worst
    from eopd.pipeline.errors import not_looked_at
    from eopd.storage.places import open_place

    settings, first = None, []
    if config is not None:
        try:
            from eopd.pipeline.config import load_config
            from eopd.pipeline.store_check import check_runs_folder

            settings = load_config(config)
            first = check_runs_folder(Path(settings.runs))
        except ImportError as error:
            first = [not_looked_at(config, error)]
    folder = open_place(store or (settings.store if settings is not None else "store"))
    if not isinstance(folder, Path):
        raise InputError(
            f"--store {store} is a bucket", setting="--store", remedy="name the folder that a run would write to"
        )
    findings = []
    for finding in chain(first, examine(folder, settings, engines=engines)):
        findings.append(finding)
        if not as_json:
            _print(finding)
    if as_json:
        sys.stdout.write(json.dumps([vars(finding) for finding in findings], indent=1) + "\n")
    raise typer.Exit(worst(findings))


def _print(finding: Finding) -> None:
    """Print one finding and flush it, so that it appears at once in a pipe too."""
    state = f"{finding.state:<9}"
    if sys.stdout.isatty():
        state = f"\x1b[{FINDING_STYLES[finding.state]}m{state}\x1b[0m"
    remedy = f"\n{'':<33}-> {printable(finding.remedy)}" if finding.remedy else ""
    sys.stdout.write(f"{state}{printable(finding.name):<23} {printable(finding.text)}{remedy}\n")
    sys.stdout.flush()
