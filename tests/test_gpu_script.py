"""`scripts/gpu.sh` as far as it goes without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import PARTS

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu.sh"


@pytest.mark.timeout(600)
@pytest.mark.skipif("EOPD_EXAMPLES" not in os.environ, reason="runs every part; .ci/run sets EOPD_EXAMPLES")
def test_a_rehearsal_runs_every_part(tmp_path: Path) -> None:
    parts = [name for name in PARTS if name != "tests"]  # pytest in pytest: they run as tests of their own
    out = tmp_path / "gpu.json"
    command = ["sh", str(SCRIPT), "--rehearse", "--parts", ",".join(parts), "--out", str(out)]
    subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, check=True)
    found = json.loads(out.read_text())["parts"]
    assert list(found) == parts
    assert not [part for part in found.values() if "failed" in part]
    assert found["parity"]["largest_float32"] == 0.0
    assert found["training"]["0.6b"]["times_as_fast"] > 0


def test_the_script_says_how_long_each_part_takes() -> None:
    stated = dict(re.findall(r"^#   (\w+) +(\d+)  ", SCRIPT.read_text(), re.MULTILINE))
    assert {name: int(seconds) for name, seconds in stated.items()} == {name: part[1] for name, part in PARTS.items()}
    assert sum(seconds for _, seconds in PARTS.values()) < 8 * 60
