"""`eopd student`: the folder of a trained student, or a copy of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from eopd.pipeline.plan_cli import Set, open_runners
from eopd.pipeline.status_cli import Run, Runs, config_of


def student(
    run: Run,
    set_: Set = None,
    runs: Runs = Path("runs"),
    round_: Annotated[
        int | None,
        typer.Option(
            "--round",
            "-r",
            min=0,
            help="Which student: 0 is the first, R the one trained in round R - 1 (default: the newest there is).",
        ),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Copy the model there; FOLDER is new or empty.")
    ] = None,
) -> None:
    """Print the folder of a trained student, or copy it out of the store: a model that transformers and vLLM load."""
    from eopd.pipeline.students import copy_student, ends_of, find_student, newest

    (runner,) = open_runners(config_of(run, runs), set_, None)
    found = find_student(runner, newest(runner) if round_ is None else round_)
    if to is not None:
        copy_student(found, to)
    sys.stderr.write(f"{found}\n{ends_of(runner, found)}\n")
    sys.stdout.write(f"{found.folder if to is None else to}\n")
