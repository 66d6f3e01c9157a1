"""Optional packages: the extra (pyproject.toml) that brings each, and messages about a missing one."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from eopd.storage.errors import InputError

EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "accelerate", "datasets", "tensorboard", "math_verify"), "train"),
    **dict.fromkeys(("latex2sympy2_extended", "sympy"), "train"),  # come with math_verify
    "matplotlib": "report",
    "numba": "write",
    "bergson": "attribution",
    "gguf": "gguf",
    "obstore": "s3",
    "peft": "peft",
    "ray": "ray",
    "vllm": "vllm",
    **dict.fromkeys(("trackio", "wandb"), "trackers"),
}
"""Extras of the packages, by import name, that do not come with eopd itself."""
STAGES = ("torch", "transformers", "accelerate", "tensorboard", "math_verify", "matplotlib", "numba")
"""Packages that every run imports."""
NOT_SET_UP = ("attribution", "trackers", "peers")
"""Extras that `make setup` leaves out."""


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def installing(extra: str) -> str:
    """Return the phrase that installs an extra, for the end of a message."""
    if Path(__file__).parent.is_symlink():  # a checkout: eopd/storage is a link
        override = " --override scripts/overrides-attribution.txt" if extra == "attribution" else ""
        command = f".venv/bin/uv pip install{override} -e '.[{extra}]'" if extra in NOT_SET_UP else "make setup"
        return f"run `{command}` in the folder of eopd's sources"
    return f"run `pip install 'eopd[{extra}]'`"


def require_packages(purpose: str, packages: Sequence[str], extra: str) -> None:
    """Raise ValueError naming the packages that are not installed, and the extra that brings them."""
    missing = [package for package in packages if not is_installed(package)]
    if missing:
        names = ", ".join(missing)
        verb = "which is" if len(missing) == 1 else "which are"
        raise InputError(f"{purpose} needs {names}, {verb} not installed", remedy=f"To add them, {installing(extra)}")


def missing_package(error: BaseException) -> str | None:
    """Return one line about an import that failed because an optional package is missing; None if it did not."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS or is_installed(package):
        return None
    return f"this needs {package}, which is not installed. To add it, {installing(EXTRAS[package])}"
