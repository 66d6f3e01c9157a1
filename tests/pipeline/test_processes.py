"""What a worker started: it ends with the worker, whatever became of that."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eopd.pipeline import processes
from eopd.pipeline.processes import Leader

STARTS_TWO = """
import os, signal, subprocess, sys, time
heeds = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (open('cleaned', 'w'), sys.exit())); "
deaf = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
for name, child in (("heeds", heeds), ("deaf", deaf)):
    more = f"open('{name}.new', 'w').write(str(__import__('os').getpid())); time.sleep(60)"
    subprocess.Popen([sys.executable, "-c", child + more])
while not os.path.exists("end"):
    time.sleep(0.02)
"""


def wait_until(there: Callable[[], object], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.02)


def start(folder: Path) -> tuple[Leader, list[int]]:
    """A worker and the pids of its two children."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        with (folder / "log").open("ab") as output:
            worker = Leader(["-c", STARTS_TWO], stdout=output, stderr=output)
    finally:
        os.chdir(here)
    files = [folder / f"{name}.new" for name in ("heeds", "deaf")]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    return worker, [int(file.read_text()) for file in files]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("killed", [True, False])
def test_children_end_with_their_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool) -> None:
    monkeypatch.setattr(processes, "GROUP_SECONDS", 1.0)
    worker, children = start(tmp_path)
    assert worker.poll() is None
    assert all(map(runs, children))  # of a worker that works nothing is touched
    if killed:
        os.kill(worker.pid, signal.SIGKILL)
    else:
        (tmp_path / "end").touch()
    wait_until(lambda: worker.poll() is not None)
    assert worker.wait() == (-signal.SIGKILL if killed else 0)
    assert (tmp_path / "cleaned").exists()  # the one that heeds SIGTERM was given the time
    wait_until(lambda: not any(map(runs, children)), 5.0)


def test_an_end_without_children_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "log").open("ab") as output:
        worker = Leader(["-c", ""], stdout=output, stderr=output)
    wait_until(lambda: not runs(worker.pid))
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: pytest.fail("it waits for the group"))
    assert worker.wait() == 0
