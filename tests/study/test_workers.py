"""Tasks over processes: one that dies, two studies, signals."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from examples.study import design, results, workers
from examples.study.__main__ import main
from examples.study.design import Task
from tests.study.toys import tiny

DEADLY = """
import dataclasses, json, os, signal
from pathlib import Path
from examples.study import gates

ROUNDS = Path(__file__).parent / "runs" / "gate.random-seed100" / "rounds.jsonl"
DEATH = Path(__file__).with_name("death")

def random_gate(settings):
    objective = gates.random_gate(settings)

    def token_loss(student, teacher, context):
        if not DEATH.exists() and any(json.loads(line)["round"] == 1 for line in ROUNDS.read_text().splitlines()):
            DEATH.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return objective.token_loss(student, teacher, context)

    return dataclasses.replace(objective, token_loss=token_loss)
"""


class DeadlyTask(Task):
    """Training its round 1 kills the process, once."""

    def config(self, work: Path) -> dict[str, Any]:
        config = super().config(work)
        config["train"]["objective"]["name"] = f"{work / 'deadly.py'}:random_gate"
        return config


def test_a_worker_that_is_killed_loses_one_task_which_goes_on(tmp_path: Path) -> None:
    gate = tiny("gate")
    refused = dataclasses.replace(gate.setting("random"), name="refused", objective={"name": "mc_opd"})
    tasks = [DeadlyTask(gate, gate.setting("random"), 100, 2e-4), Task(gate, refused, 101, 2e-4)]
    (tmp_path / "deadly.py").write_text(DEADLY)
    trained = tmp_path / "store-seed101" / "checkpoints"
    trained.mkdir(parents=True)
    (tmp_path / "runs" / "main.opd-seed100").mkdir(parents=True)  # stopped earlier, and not asked for this time
    said: list[str] = []
    failed = workers.run_all(tasks, tmp_path, tmp_path / "results", 1, said.append)
    assert [line.split(":")[0] for line in failed] == ["gate/refused-seed101"]
    assert said[0].startswith("gate/random-seed100: its process was killed by SIGKILL")
    made = results.read(tasks[0], tmp_path / "results")
    assert made is not None
    assert (made.content["cost"]["resumed_at_round"], made.content["cost"]["shared"]) == (1, [])
    assert trained.exists(), "what was trained is for the next attempt where a task of the seed failed"
    assert (tmp_path / "store-seed100").exists(), "and where another run of the seed was stopped"


def test_two_studies_do_not_share_a_work_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with workers.alone(tmp_path / "study.lock"):
        assert main(["--only", "gate", "--work", str(tmp_path), "--results", str(tmp_path / "results")]) == 2
    assert str(tmp_path / "study.lock") in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["study.lock"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_study_in_the_background_is_ended_with_its_workers(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "examples.study", "--smoke", "--only", "gate", "--work", str(tmp_path)]
    study = subprocess.Popen(
        command,
        cwd=design.HERE.parent.parent,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        runs = tmp_path / "smoke" / "runs"
        while not runs.exists():
            assert study.poll() is None
            time.sleep(0.1)
        study.send_signal(number)
        assert study.wait(30) == 128 + number
        until = time.monotonic() + 10
        while _of_session(study.pid) and time.monotonic() < until:
            time.sleep(0.1)
        assert not _of_session(study.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(study.pid, signal.SIGKILL)
        study.wait()


def _of_session(session: int) -> list[str]:
    """Processes that still live in a session."""
    collected = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its = stat.read_text().rsplit(")", 1)[1].split()[:4]
            if int(its) == session and state != "Z":
                collected.append(stat.parent.name)
    return collected
