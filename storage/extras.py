"""Optional packages: how to install a missing one."""

from __future__ import annotations


def installing(extra: str) -> str:
    """Return the phrase that installs an extra (pyproject.toml), for the end of a message."""
    return f"run `.venv/bin/uv pip install -e '.[{extra}]'` in the folder of eopd's sources"
