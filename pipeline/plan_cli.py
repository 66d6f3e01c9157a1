"""`eopd plan`: what a run, or a sweep of runs, will do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from eopd.pipeline.runner import Runner
    from eopd.stages.job import Progress

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="Settings: a YAML file, or a name such as quickstart.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="Override a setting, as in train.optimizer.lr=1e-5. Repeatable."
    ),
]
Sweep = Annotated[
    str | None, typer.Option("--sweep", metavar="FILE", help="Several runs: a YAML list of named changes to CONFIG.")
]


def plan(
    config: Config,
    set_: Set = None,
    sweep: Sweep = None,
    all_: Annotated[bool, typer.Option("--all", help="Every job of every round; no folding.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show every job: what is there, what is missing, what it will take. Changes nothing."""
    from eopd.pipeline.overview import look
    from eopd.pipeline.prompt_check import FIRST_ROWS, refuse_unreadable_prompts

    runners = open_runners(config, set_, sweep)
    overview = look(runners)
    refuse_unreadable_prompts(runners, FIRST_ROWS)
    if as_json:
        sys.stdout.write(json.dumps(overview.to_json(), indent=1) + "\n")
        return
    from eopd.pipeline.plan_table import make_console, plan_table

    make_console().print(plan_table(overview, every_job=all_))


def open_runners(
    config: str, overrides: list[str] | None, sweep: str | None, progress: Callable[[], Progress] | None = None
) -> list[Runner]:
    """One runner per run of the sweep; of CONFIG itself where there is none. Silent unless ``progress`` is given."""
    from eopd.pipeline.config import load_config
    from eopd.pipeline.planning import plan_run
    from eopd.pipeline.runner import Runner
    from eopd.pipeline.store_check import check_folders
    from eopd.pipeline.sweep import NamedProgress, load_sweep
    from eopd.stages.job import NullProgress
    from eopd.storage.fingerprints import Digests

    if sweep is None:
        settings = load_config(config, overrides or ())
        return [Runner(settings, *plan_run(settings), progress() if progress else NullProgress())]
    runs = load_sweep(config, sweep, overrides or ())
    check_folders(runs[0])
    digests = Digests.of_store(runs[0].store)  # of all: where there is no store yet, nothing else remembers them
    return [
        Runner(
            settings,
            *plan_run(settings, digests=digests),
            NamedProgress(settings.name, progress()) if progress else NullProgress(),
        )
        for settings in runs
    ]
