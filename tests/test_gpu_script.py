"""`scripts/gpu.sh` as far as it goes without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.gpu import PARTS, dense_kl, difference
from scripts import gpu_wheels

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu.sh"


@pytest.mark.timeout(600)
@pytest.mark.skipif("EOPD_EXAMPLES" not in os.environ, reason="runs every part; .ci/run sets EOPD_EXAMPLES")
def test_a_rehearsal_runs_every_part(tmp_path: Path) -> None:
    parts = [name for name in PARTS if name != "tests"]  # pytest in pytest: they run as tests of their own
    out = tmp_path / "gpu.json"
    command = ["sh", str(SCRIPT), "--rehearse", "--parts", ",".join(parts), "--out", str(out)]
    subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, check=True)
    values = json.loads(out.read_text())["parts"]
    assert list(values) == parts
    assert not [part for part in values.values() if "failed" in part]
    assert values["parity"]["largest_float32"] == 0.0
    assert values["training"]["0.6b"]["times_as_fast"] > 0


def test_the_script_says_how_long_each_part_takes() -> None:
    stated = dict(re.findall(r"^#   (\w+) +(\d+)  ", SCRIPT.read_text(), re.MULTILINE))
    assert {name: int(seconds) for name, seconds in stated.items()} == {name: part[1] for name, part in PARTS.items()}
    assert sum(seconds for _, seconds in PARTS.values()) < 8 * 60


def test_the_sparse_head_with_the_whole_vocabulary_equals_dense_torch() -> None:
    assert difference("cpu", dense_kl) < 1e-6


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs liger-kernel (the extra peers)")
def test_the_sparse_head_equals_ligers_fused_kl_in_tritons_interpreter() -> None:
    program = "from benchmarks.gpu import *; print(difference('cpu', fused_kl(TINY)))"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-6


def make_wheel(folder: Path, package: str, tag: str = "py3-none-any") -> None:
    with zipfile.ZipFile(folder / f"{package}-1.0-{tag}.whl", "w") as wheel:
        wheel.writestr(f"{package}/__init__.py", "answer = 42\n" * 100)


def test_wheels_of_missing_packages_are_unpacked(tmp_path: Path) -> None:
    wheels, target = tmp_path / "wheels", tmp_path / "packages"
    wheels.mkdir()
    for package in ("pytest", "not_installed"):
        make_wheel(wheels, package)
    for wheel in wheels.iterdir():
        gpu_wheels.compress(wheel)
    assert gpu_wheels.unpack(wheels, target) == ["not_installed-1.0-py3-none-any.whl"]
    assert (target / "not_installed" / "__init__.py").read_text() == "answer = 42\n" * 100
    assert not (target / "pytest").exists()
    make_wheel(wheels, "compiled", "cp27-cp27m-manylinux1_x86_64")
    with pytest.raises(SystemExit, match=r"compiled.*--python"):
        gpu_wheels.unpack(wheels, target)
