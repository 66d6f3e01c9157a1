"""Processes of the ``eopd`` command that start at once: forked from this one, which has imported what they need.

Nothing else differs from a process of its own: each has its own session, environment, output and signal handlers, and
the kernel asks it to stop when its parent dies. This process must not compute with torch before it forks.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from eopd.pipeline import processes
from eopd.pipeline.launchers import local


class Forked:
    """A forked process, as ``subprocess.Popen`` is one."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._code: int | None = None

    @property
    def pid(self) -> int:
        return self._pid

    def poll(self) -> int | None:
        if self._code is None:
            ended, status = os.waitpid(self._pid, os.WNOHANG)
            if ended:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self._pid, sig)


def preload() -> None:
    """Import what the stages import, here and once."""

    import eopd.pipeline.cli.main
    import eopd.pipeline.report
    import eopd.stages.align.run
    import eopd.stages.evaluate.run
    import eopd.stages.report.run
    import eopd.stages.rollout.run
    import eopd.stages.score.run
    import eopd.stages.train.run  # noqa: F401


def fork_eopd(arguments: list[str], environment: Mapping[str, str], log: Path) -> Forked:
    """Start ``eopd ARGUMENTS``; its own workers are forked from it in turn."""
    with log.open("ab") as output:
        return fork_process(["-m", "eopd.pipeline.cli", *arguments], environment, output)


def fork_worker(arguments: list[str], *, env: Mapping[str, str], stdout: IO[bytes], **_: Any) -> Forked:
    """In place of ``processes.Leader``."""
    return fork_process(arguments, env, stdout)


def fork_process(arguments: list[str], environment: Mapping[str, str], output: IO[bytes]) -> Forked:
    """``python ARGUMENTS`` for one of our two programs."""
    assert arguments[0] == "-m", arguments
    assert arguments[1] in PROGRAMS, arguments
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return Forked(child)
    code = 1
    try:
        os.setsid()
        processes.ask_to_stop_when_orphaned()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        os.environ.clear()
        os.environ.update(environment)
        code = _run(arguments[1], arguments[2:])
    finally:
        os._exit(code)


def _run(program: str, arguments: list[str]) -> int:
    local.Leader = fork_worker  # type: ignore[assignment,misc]
    sys.argv = [program, *arguments]
    try:
        PROGRAMS[program]()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _command() -> None:
    from eopd.pipeline.cli.main import main

    main()


def _worker() -> None:
    from eopd.pipeline.worker import main

    main()


PROGRAMS = {"eopd.pipeline.cli": _command, "eopd.pipeline.worker": _worker}
