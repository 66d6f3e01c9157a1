"""Errors by type and fields, so that tests do not depend on sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from eopd.storage.errors import UserError


@contextmanager
def raises(
    kind: type[UserError], match: str | None = None, *, file: str | Path = "", remedy: str = "", **fields: Any
) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect an error whose ``fields`` have these values, whose file ends with ``file``, and whose remedy holds
    ``remedy``."""
    with pytest.raises(kind, match=match) as caught:
        yield caught
    error = caught.value
    assert {name: getattr(error, name) for name in fields} == fields, str(error)
    assert (error.file or "").endswith(str(file)), str(error)
    assert remedy in error.remedy, str(error)
    assert "\n" not in str(error)
