"""`eopd doctor`: a self-check of the machine, the packages, the store and what a config names."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from eopd.pipeline.findings import Finding

STYLES = {"ok": "green", "warning": "yellow", "broken": "bold red", "absent": "dim"}


def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="Look at all that a run of this config needs, too.")
    ] = None,
    store: Annotated[str | None, typer.Option("--store", help="Look at this store (default: ./store).")] = None,
    engines: Annotated[bool, typer.Option("--engines/--no-engines", help="Import vLLM too, which takes long.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check this machine, the packages, the store and what CONFIG names; exit code 1 when a run could not work."""
    from eopd.pipeline.doctor import examine, not_looked_at, worst
    from eopd.storage.places import open_place

    settings, unread = None, []
    if config is not None:
        try:
            from eopd.pipeline.config import load_config

            settings = load_config(config)
        except ImportError as error:
            unread = [not_looked_at(config, error)]
    folder = open_place(store or (settings.store if settings is not None else "store"))
    if not isinstance(folder, Path):
        raise ValueError(f"--store {store} is a bucket; name the folder that a run would write to")
    findings = [*examine(folder, settings, engines=engines), *unread]
    if as_json:
        sys.stdout.write(json.dumps([vars(finding) for finding in findings], indent=1) + "\n")
    else:
        try:
            _print_table(findings)
        except ImportError:  # of one that the table needs
            sys.stdout.writelines(f"{it.state:<8} {it.name}: {it.text} {it.remedy}".rstrip() + "\n" for it in findings)
    raise typer.Exit(worst(findings))


def _print_table(findings: Sequence[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    from eopd.pipeline.plan_table import make_console

    table = Table.grid(padding=(0, 2))
    for finding in findings:
        remedy = f"\n-> {finding.remedy}" if finding.remedy else ""
        table.add_row(Text(finding.state, STYLES[finding.state]), finding.name, Text(finding.text + remedy))
    make_console().print(table)
