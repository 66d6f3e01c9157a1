"""`eopd doctor`: a self-check of the machine, the packages, the store and what a config names."""

from __future__ import annotations

import json
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eopd.stages.format import printable

if TYPE_CHECKING:
    from eopd.pipeline.findings import Finding

STYLES = {"ok": "32", "warning": "33", "broken": "1;31", "absent": "2"}


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
    findings = []
    for finding in chain(unread, examine(folder, settings, engines=engines)):
        findings.append(finding)
        if not as_json:
            _print(finding)
    if as_json:
        sys.stdout.write(json.dumps([vars(finding) for finding in findings], indent=1) + "\n")
    raise typer.Exit(worst(findings))


def _print(finding: Finding) -> None:
    """One finding, at once, also into a pipe."""
    state = f"{finding.state:<9}"
    if sys.stdout.isatty():
        state = f"\x1b[{STYLES[finding.state]}m{state}\x1b[0m"
    remedy = f"\n{'':<33}-> {printable(finding.remedy)}" if finding.remedy else ""
    sys.stdout.write(f"{state}{printable(finding.name):<23} {printable(finding.text)}{remedy}\n")
    sys.stdout.flush()
