"""The environment that a process sets up before it imports libraries."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOW = "from eopd.pipeline.worker import prepare_imports; prepare_imports(); import os; print(os.environ['{}'])"


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM"])
def test_variables_are_set_but_never_replaced(name: str) -> None:
    def shown(**changes: str) -> str:
        kept = {key: value for key, value in os.environ.items() if key != name}
        command = [sys.executable, "-c", SHOW.format(name)]
        return subprocess.run(command, env=kept | changes, capture_output=True, text=True, check=True).stdout.strip()

    assert shown() == {"GOMP_SPINCOUNT": "6000", "TOKENIZERS_PARALLELISM": "false"}[name]
    assert shown(**{name: "17"}) == "17"
