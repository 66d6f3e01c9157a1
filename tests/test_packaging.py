"""The wheel, installed apart from the source tree, is a working `eopd` with its configs and its example."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pipeline", "stages", "storage", "configs", "examples", "pyproject.toml", "README.md", "LICENSE")


def build_wheel(folder: Path) -> Path:
    copy = folder / "source"  # building leaves files behind
    copy.mkdir()
    for name in SOURCES:
        path = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(path, copy / name, ignore=ignored) if path.is_dir() else shutil.copy(path, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, copy]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    [wheel] = folder.glob("eopd-*.whl")
    return wheel


def test_the_wheel_works_alone(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
        names = archive.namelist()
    assert "eopd/configs/paper/qwen3-4b.yaml" in names
    assert "eopd/examples/countdown/teacher/model.safetensors" in names
    assert not [name for name in names if name.startswith(("storage/", "stages/", "pipeline/", "tests/"))]
    # -S -s and an explicit path: the editable install of this checkout must not answer in its place
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), *libraries])}

    def python(code: str) -> str:
        command = [sys.executable, "-S", "-c", code]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    eopd = "import sys; from eopd.pipeline import cli; sys.argv = ['eopd', *{}]; cli.main()"
    assert "rollout" in python(eopd.format(["plan", "quickstart"]))
    assert python(eopd.format(["--version"])) == f"eopd {wheel.name.split('-')[1]}\n"
    assert python("import eopd.storage.paths as p; print(p.__file__)").startswith(str(installed))
