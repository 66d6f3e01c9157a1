"""Arguments that several commands take, and opening the runs that they name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from eopd.pipeline.run import Run
    from eopd.stages.job import Progress
    from eopd.storage.paths import RunPaths

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="Settings: a YAML file, or a name such as quickstart.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, or its CONFIG.")]
RunsFolder = Annotated[Path, typer.Option("--runs", help="Folder in which runs are looked for by name.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="Override a setting, as in train.optimizer.lr=1e-5. Repeatable."
    ),
]
Sweep = Annotated[
    str | None, typer.Option("--sweep", metavar="FILE", help="Several runs: a YAML list of named changes to CONFIG.")
]

StudentNumber = Annotated[
    int | None,
    typer.Option(
        "--round",
        "-r",
        min=0,
        help="Which student: 0 is the first, R the one trained in round R - 1 (default: the newest there is).",
    ),
]


def open_runs(
    config: str, overrides: list[str] | None, sweep: str | None, progress: Callable[[], Progress] | None = None
) -> list[Run]:
    """Open one run for each entry of the sweep, or the run of CONFIG alone. Silent unless ``progress`` is given."""
    from eopd.pipeline.config import NamedProgress, load_config, load_sweep
    from eopd.pipeline.run import open_run
    from eopd.pipeline.store_check import check_folders
    from eopd.storage.identity import Digests

    if sweep is None:
        return [open_run(load_config(config, overrides or ()), progress=progress() if progress else None)]
    settings = load_sweep(config, sweep, overrides or ())
    check_folders(settings[0])
    digests = Digests.of_store(settings[0].store)  # shared: before there is a store, nothing else remembers hashes
    return [
        open_run(one, digests=digests, progress=NamedProgress(one.name, progress()) if progress else None)
        for one in settings
    ]


def config_of(run: str, runs: Path) -> str:
    """Return the resolved config of the run with that name; any other ``run`` is taken as a config.

    Raises:
        ConfigError: it is neither; says where a run of that name would be.
    """
    from eopd.pipeline.config import ConfigError, config_file
    from eopd.stages.format import one_line
    from eopd.storage.paths import RunPaths

    own = RunPaths(runs / run).config
    try:
        if own.is_file():
            return str(own)
        blocked = own.exists() or own.is_symlink()
    except OSError as error:  # such as a name that is too long
        raise ConfigError(f"no run can be called {_short(run)}: {error.strerror}") from error
    if blocked:
        raise ConfigError(f"{one_line(str(own))}, where the run's config belongs, is no plain file", file=own)
    if config_file(run) is not None:
        return run
    problem = f"there is no run {_short(run)} below {runs}, and no config of that name"
    raise ConfigError(problem, remedy=_near(run, runs))


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


def _near(run: str, runs: Path) -> str:
    """Return a hint that names the run in ``runs`` with the most similar name; empty if there is none."""
    try:
        names = [folder.name for folder in runs.iterdir() if (folder / "config.yaml").is_file()]
    except OSError:
        return ""
    near = difflib.get_close_matches(run, names, n=1, cutoff=0.5)
    return f"Did you mean {near[0]}?" if near else ""


def paths_of(run: str, runs: Path) -> RunPaths:
    """Return the folder of a run, given its name or its config."""
    from eopd.pipeline.config import load_config
    from eopd.storage.paths import RunPaths

    with suppress(OSError):  # such as a name that is too long, which is refused below
        if (runs / run).is_dir():
            return RunPaths(runs / run)
    settings = load_config(config_of(run, runs))
    return RunPaths(Path(settings.runs) / settings.name)
