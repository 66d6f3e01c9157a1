"""Errors for people, with fields; those of a store are grouped by how a handler would react."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack


class FilePlace(TypedDict, total=False):
    """A file, and a place in it. None: nothing of that kind."""

    file: str | os.PathLike[str] | None
    line: int | None  # from 1
    row: int | None  # of a file without lines, from 0


class StoredPlace(TypedDict, total=False):
    """An artifact, or a part of one."""

    artifact: str | None  # kind/key
    part: int | None


class Place(FilePlace, StoredPlace, total=False):
    """The subject of an error: a file, an artifact, a setting or a prompt."""

    setting: str | None  # as a config or --set names it: `train.optimizer.lr`
    prompt: str | None  # its id


FIELDS = tuple(Place.__annotations__)


class UserError(Exception):
    """An error whose message is one line for people: what is wrong, where, and the remedy.

    Code reads the fields of ``Place`` and ``remedy``, which are attributes, and no message.

    Args:
        problem: what is wrong. ``str()`` puts the setting, the prompt and the file with its line before it, if neither
            the problem nor the remedy names them.
        remedy: what to do: a phrase, or sentences, which begin with a capital letter or a command in backticks.
    """

    setting: str | None
    file: str | None
    line: int | None
    row: int | None
    prompt: str | None
    artifact: str | None
    part: int | None

    def __init__(self, problem: str = "", *, remedy: str = "", **place: Unpack[Place]) -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy
        for name in FIELDS:
            setattr(self, name, place.get(name))
        self.file = None if self.file is None else os.fspath(self.file)

    @classmethod
    def of(cls, error: Exception, where: str = "", *, remedy: str = "", **place: Unpack[Place]) -> Self:
        """Return an error of this class with the message, remedy and fields of another one.

        Args:
            where: precedes the message.
            remedy: for an error that has none.
            place: fields to add or to replace.
        """
        where = f"{where}: " if where else ""
        if isinstance(error, UserError):
            fields, text = {"remedy": remedy, **error.fields()}, error.text(remedy=False)
        else:
            fields, text = {"remedy": remedy, "file": getattr(error, "filename", None)}, str(error)
        fields |= {name: value for name, value in place.items() if value is not None}
        return cls(**{**fields, "problem": where + text})

    def text(self, *, setting: bool = True, remedy: bool = True) -> str:
        """Return the message, with or without the setting before it and the remedy after it."""
        text, whole = self.problem, f"{self.problem} {self.remedy}"
        file = place_of({"file": self.file, "line": self.line, "row": self.row})
        prompt = None if self.prompt is None else repr(self.prompt)
        if file not in whole:
            text = f"{file}: {text}"
        if prompt is not None and prompt not in whole:
            text = f"prompt {prompt}{': ' if file in whole else ' of '}{text}"
        if setting and self.setting is not None and self.setting not in whole:
            text = f"{self.setting}: {text}"
        if not (remedy and self.remedy):
            return text
        return f"{text.removesuffix('.')}{': ' if self.remedy[0].islower() else '. '}{self.remedy}"

    def __str__(self) -> str:
        return self.text()

    def fields(self) -> dict[str, Any]:
        """Return what ``__init__`` takes, as JSON values; unset fields are left out."""
        values = {name: getattr(self, name) for name in ("problem", "remedy", *FIELDS)}
        return {name: value for name, value in values.items() if value not in (None, "")}


class InputError(UserError, ValueError):
    """A setting, a file or a prompt is refused. Another attempt would end the same."""


def place_of(place: FilePlace) -> str:
    """Return a place in a file as messages name it; empty without a file."""
    if place.get("file") is None:
        return ""
    numbers = (f" {name} {place[name]}" for name in ("line", "row") if place.get(name) is not None)
    return f"{place['file']}{''.join(numbers)}"


# -- stores -----------------------------------------------------------------------------------------------------------


class StoreError(UserError):
    """Base of everything a store reports. The message names the artifact, part or file and what to do."""


class MissingPart(StoreError):
    """A part has no commit marker: it was never finished. Run the stage that makes it."""


class PrunedPart(MissingPart):
    """A part was finished and its data were pruned since. The plan rebuilds it if something needs it."""


class MissingArtifact(StoreError):
    """A store has no such artifact."""


class DamagedPart(StoreError):
    """A committed part does not hold what its marker says. `eopd store verify --repair` re-queues it."""


class WrongArtifact(StoreError):
    """A folder, marker or manifest belongs to another artifact than the requested one."""


class NewerSchema(StoreError):
    """A newer eopd wrote this file. Upgrade to read it."""


class StoreFull(StoreError):
    """The disk, quota or bucket is full. Nothing committed is lost; free space and run the same command again."""


class StoreUnwritable(StoreError):
    """The store refuses writes (permissions, a read-only mount or bucket)."""


class NoHardLinks(StoreUnwritable):
    """The file system has no hard links, by which commits are made. Only another one helps."""


class StoreUnreadable(StoreError):
    """The store does not answer (network, service or file system). Try again, or use another copy."""


UNSOUND = (DamagedPart, WrongArtifact, MissingPart, MissingArtifact, NewerSchema)
"""Errors about stored data. Others mean that the data could not be read, which is no damage."""


# -- extras -----------------------------------------------------------------------------------------------------------

# Optional packages: the extra (pyproject.toml) that brings each, and messages about a missing one.


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
