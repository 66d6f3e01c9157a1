"""How a process of ours ends, and how whoever started it learns why."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eopd.pipeline.launchers.base import Kind
    from eopd.stages.job import Progress

# Exit codes of `eopd STAGE`, by which a worker's end is told apart.
EXIT_FAILED = 1
EXIT_FULL = 28  # the number of ENOSPC
EXIT_REFUSED = 65  # EX_DATAERR of sysexits.h: what it was given is wrong, and trying again would not help
EXIT_INTERRUPTED = 130

NO_SUCH_PLACE = {errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EROFS}
"""Of a path that somebody named and that cannot be what it is meant for. The system's message names it."""

QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}


def be_quiet() -> None:
    """Before anything heavy is imported; what a person has set stays."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def tell_end(error: Exception, progress: Progress | None) -> int:
    """Tell whoever reads our events why we end; returns the exit code that says so."""
    from eopd.pipeline.progress import EventProgress
    from eopd.storage.files import is_full

    kind: Kind = "full" if is_full(error) else "refused" if is_refusal(error) else "failed"
    if isinstance(progress, EventProgress):
        message = str(error) if is_for_people(error) else f"{type(error).__name__}: {error}"
        progress.end(kind, message)
    scheduled = isinstance(progress, EventProgress) or "SLURM_ARRAY_TASK_ID" in os.environ
    if kind == "refused" and scheduled:  # people have no use for the difference
        return EXIT_REFUSED
    return EXIT_FULL if kind == "full" else EXIT_FAILED


def log_end(error: Exception) -> None:
    """Into a worker's log: one line where the message says what to do, else (or with EOPD_DEBUG=1) the traceback."""
    from eopd.stages.format import escaped

    if os.environ.get("EOPD_DEBUG") or not is_for_people(error):
        traceback.print_exception(error)
    else:
        sys.stderr.write(f"eopd: {escaped(str(error))}\n")


CHECKED_WITH = ("eopd", "jinja2", "json", "pydantic", "pydantic_core", "pyarrow", "yaml")
"""Packages whose errors, raised again by a check of ours, are of what they were given."""


def is_refusal(error: Exception) -> bool:
    """Whether a check of ours refused what it was given: the same task would end the same way again.

    That is a ValueError raised in this package, and not in place of an error of the machine, a model or an engine. What
    a run lacks at the moment (``RunError``) may be there the next time.
    """
    from eopd.pipeline.errors import RunError

    if not isinstance(error, ValueError) or isinstance(error, RunError) or _raised_in(error) != "eopd":
        return False
    cause = error.__cause__
    while cause is not None:
        package = type(cause).__module__.partition(".")[0]
        if isinstance(cause, (OSError, MemoryError)) or not {package, _raised_in(cause)} & set(CHECKED_WITH):
            return False
        cause = cause.__cause__
    return True


def _raised_in(error: BaseException) -> str:
    """The package whose code raised it."""
    trace, module = error.__traceback__, ""
    while trace is not None:
        module, trace = str(trace.tb_frame.f_globals.get("__name__", "")), trace.tb_next
    return module.partition(".")[0]


def is_for_people(error: Exception) -> bool:
    """Whether its message says what to do, and a traceback would only hide it."""
    from eopd.storage.errors import StoreError

    stopped = type(error).__name__ == "TrainingStopped"
    misnamed = isinstance(error, OSError) and error.filename is not None and error.errno in NO_SUCH_PLACE
    return isinstance(error, (StoreError, ValueError)) or stopped or misnamed
