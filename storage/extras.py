"""Packages that only some settings need: how they are installed where one is missing."""

from __future__ import annotations


def installing(extra: str) -> str:
    """What adds the packages of an extra (pyproject.toml), as the end of a sentence."""
    return f"run `.venv/bin/uv pip install -e '.[{extra}]'` in the folder of eopd's sources"
