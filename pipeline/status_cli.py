"""`eopd status` and `eopd logs`: looking at a run while it runs, from any machine that sees its store and folder."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eopd.pipeline.plan_cli import Set, Sweep, open_runners
from eopd.stages.format import escaped
from eopd.storage.stopping import Stopped

if TYPE_CHECKING:
    from eopd.storage.paths import RunPaths

Run = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, or its CONFIG.")]
Runs = Annotated[Path, typer.Option("--runs", help="Folder in which runs are looked for by name.")]


def status(
    run: Run,
    set_: Set = None,
    sweep: Sweep = None,
    runs: Runs = Path("runs"),
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    every: Annotated[float, typer.Option("--every", min=0.2, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Show how a run gets on: parts, rates, who works on what, what went wrong. Ctrl-C leaves it; the run goes on."""
    from eopd.pipeline.plan_table import make_console
    from eopd.pipeline.status import status_view, take_status

    config = config_of(run, runs)
    console = make_console()
    if once or not console.is_terminal:
        console.print(status_view(take_status(open_runners(config, set_, sweep))))
        return
    from rich.live import Live

    try:
        with Live(console=console, auto_refresh=False, screen=True) as live:
            while True:
                # planned anew each time: a coverage that was completed meanwhile may serve
                view = take_status(open_runners(config, set_, sweep))
                live.update(status_view(view), refresh=True)
                time.sleep(every)
    except (KeyboardInterrupt, Stopped):
        console.print(status_view(take_status(open_runners(config, set_, sweep))))


def logs(
    run: Run,
    runs: Runs = Path("runs"),
    stage: Annotated[str | None, typer.Option("--stage", help="Of this stage only: rollout, score, ...")] = None,
    round_: Annotated[int | None, typer.Option("--round", "-r", min=0, help="Of this round only.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Lines of each log.")] = 20,
) -> None:
    """Show the end of a run's logs, the latest last; -f follows them, new ones too."""
    from eopd.pipeline.logs import find_logs, tail
    from eopd.pipeline.logs import follow as follow_logs

    folder = paths_of(run, runs).logs
    # how long they are is read once: what is added while they are shown is what `follow` begins with
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


def config_of(run: str, runs: Path) -> str:
    """The resolved config of a run of that name; otherwise what names a config."""
    from eopd.storage.paths import RunPaths

    own = RunPaths(runs / run).config
    return str(own) if own.is_file() else run


def paths_of(run: str, runs: Path) -> RunPaths:
    """The folder of a run, by its name or by its config."""
    from eopd.pipeline.config import load_config
    from eopd.storage.paths import RunPaths

    if (runs / run).is_dir():
        return RunPaths(runs / run)
    settings = load_config(run)
    return RunPaths(Path(settings.runs) / settings.name)
