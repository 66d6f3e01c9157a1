"""Refusals of the attribute stage before work: a package that is missing, models that bergson would misread.

Imports no torch.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from eopd.stages.models.model_config import read_config
from eopd.storage.errors import InputError
from eopd.storage.extras import installing

BERGSON = "2.5"
"""The series of bergson whose scores the stage's keys stand for; its last digit is recorded beside the scores."""


def bergson_version() -> str:
    """Return the version that is installed; empty if there is none."""
    try:
        return version("bergson")
    except PackageNotFoundError:
        return ""


def lacking_bergson() -> InputError | None:
    """Return an error if bergson, in the series that keys stand for, is not installed; names the extra."""
    there = bergson_version()
    if there.startswith(f"{BERGSON}."):
        return None
    state = f"version {there} is" if there else "it is not"
    problem = f"attribute needs bergson {BERGSON}, and {state} installed"
    return InputError(problem, setting="attribute", remedy=f"To add it, {installing('attribution')}")


def check_model(folder: Path) -> None:
    """Refuse models whose weights are not the ones that were trained.

    Raises:
        ValueError: quantised weights; an adapter that was not merged.
    """
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"attribute: {folder} holds an adapter beside its model",
            setting="attribute",
            file=folder,
            remedy="merge it, and name the merged folder",
        )
    if read_config(folder).get("quantization_config"):
        raise InputError(
            f"attribute: {folder} is quantised, and gradients of quantised weights are none of the model's",
            setting="attribute",
            file=folder,
        )
