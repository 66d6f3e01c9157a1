"""How a process of ours ends, and how whoever started it learns why."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eopd.stages.job import Progress

# Exit codes of `eopd STAGE`, by which a worker's end is told apart.
EXIT_FAILED = 1
EXIT_FULL = 28  # the number of ENOSPC
EXIT_INTERRUPTED = 130

QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}


def be_quiet() -> None:
    """Before anything heavy is imported; what a person has set stays."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def tell_end(error: Exception, progress: Progress | None) -> int:
    """Tell whoever reads our events why we end; returns the exit code that says so."""
    from eopd.pipeline.progress import EventProgress
    from eopd.storage.files import is_full

    full = is_full(error)
    if isinstance(progress, EventProgress):
        message = str(error) if is_for_people(error) else f"{type(error).__name__}: {error}"
        progress.end("full" if full else "failed", message)
    return EXIT_FULL if full else EXIT_FAILED


def log_end(error: Exception) -> None:
    """Into a worker's log: one line where the message says what to do, else (or with EOPD_DEBUG=1) the traceback."""
    if os.environ.get("EOPD_DEBUG") or not is_for_people(error):
        traceback.print_exception(error)
    else:
        sys.stderr.write(f"eopd: {error}\n")


def is_for_people(error: Exception) -> bool:
    """Whether its message says what to do, and a traceback would only hide it."""
    from eopd.storage.errors import StoreError

    stopped = type(error).__name__ == "TrainingStopped"
    return isinstance(error, (StoreError, ValueError)) or stopped
