"""The wheel, installed apart from the source tree, is a working `eopd` with its configs and its example."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("eopd", "pipeline", "stages", "storage", "configs", "examples", "pyproject.toml", "README.md", "LICENSE")


def copy_sources(folder: Path) -> Path:
    """A copy of the tracked sources; building leaves files behind."""
    copy = folder / "source"
    copy.mkdir()
    for name in SOURCES:
        path = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        if path.is_dir():
            shutil.copytree(path, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(path, copy / name)
    return copy


def build_wheel(source: Path, folder: Path) -> Path:
    """Build the wheel of a source folder or source archive with pip."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", source]
    command += ["-w", folder]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    [wheel] = folder.glob("eopd-*.whl")
    return wheel


def build_source_archive(source: Path) -> Path:
    code = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    [archive] = (source / "dist").glob("eopd-*.tar.gz")
    return archive


@pytest.mark.parametrize("through_archive", [False, True], ids=["from the checkout", "from the source archive"])
def test_the_wheel_works_alone(tmp_path: Path, through_archive: bool) -> None:
    source = copy_sources(tmp_path)
    wheel = build_wheel(build_source_archive(source) if through_archive else source, tmp_path)
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

    eopd = "import sys; from eopd.pipeline.cli.main import main; sys.argv = ['eopd', *{}]; main()"
    assert "rollout" in python(eopd.format(["plan", "quickstart"]))
    assert python(eopd.format(["--version"])) == f"eopd {wheel.name.split('-')[1]}\n"
    assert python("import eopd.storage.paths as p; print(p.__file__)").startswith(str(installed))
