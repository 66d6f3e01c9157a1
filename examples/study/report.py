"""study.md from the results: a hand-written text with blocks between markers that are written anew.

    <!-- study:main -->  ...table...  <!-- /study -->

A block's name is an experiment; what stands outside of blocks is kept as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.study import figure, tables
from examples.study.design import Experiment
from examples.study.worlds import COUNTDOWN

BLOCK = re.compile(r"<!-- study:(?P<name>[a-z0-9_]+) -->\n.*?<!-- /study -->", re.DOTALL)


def write(experiments: Sequence[Experiment], rates: Mapping[str, float], folder: Path, document: Path) -> None:
    """Write the blocks of ``experiments`` in ``document``; those that it lacks are put at its end."""
    text = document.read_text(encoding="utf-8") if document.exists() else "# Study\n"
    for experiment in experiments:
        if f"<!-- study:{experiment.name} -->" not in text:
            text += f"\n## {experiment.question}\n\n<!-- study:{experiment.name} -->\n<!-- /study -->\n"
    document.parent.mkdir(parents=True, exist_ok=True)
    bodies = {experiment.name: _body(experiment, rates, folder, document) for experiment in experiments}

    def fill(result: re.Match[str]) -> str:
        body = bodies.get(result["name"])
        return result[0] if body is None else f"<!-- study:{result['name']} -->\n{body}\n<!-- /study -->"

    document.write_text(BLOCK.sub(fill, text), encoding="utf-8")


def _body(experiment: Experiment, rates: Mapping[str, float], folder: Path, document: Path) -> str:
    loaded = tables.load(experiment, rates, folder)
    body = tables.block(experiment, loaded)
    drawing = document.with_name(f"{document.stem}-{experiment.name}.svg")
    if experiment.world == COUNTDOWN and figure.write(experiment, loaded, drawing):
        body += f"\n\n![Differences to {experiment.reference} with 95 % intervals]({drawing.name})"
    return body
