"""`eopd status` and `eopd logs`, against real claims of a living process and real log files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eopd.pipeline.cli.options import config_of, paths_of
from eopd.pipeline.config import ConfigError
from eopd.pipeline.errors import RunError
from eopd.pipeline.logs import find_logs, tail
from eopd.pipeline.run import Run
from eopd.pipeline.status import make_console, status_view, take_status
from eopd.pipeline.worker import log_task
from eopd.stages.stage import Job
from tests.end_to_end.conftest import command
from tests.pipeline.plan_case import commit, make_run, note_job
from tests.raises import raises

HOLD = """
import sys, time
from pathlib import Path
from eopd.storage.artifacts import open_artifact
from eopd.storage.claims import claim
with claim(open_artifact(Path(sys.argv[1]), sys.argv[2], sys.argv[3]), int(sys.argv[4])) as ours:
    print(ours, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    save_file({"weight": torch.zeros(10)}, tmp_path / "model.safetensors")
    return make_run(tmp_path)


@pytest.fixture
def held() -> Iterator[list[subprocess.Popen[str]]]:
    collected: list[subprocess.Popen[str]] = []
    yield collected
    for process in collected:
        process.kill()
        process.wait()


def hold(run: Run, job: Job, part: int) -> subprocess.Popen[str]:
    arguments = [str(run.store), job.output.kind, job.output.key, str(part)]
    process = subprocess.Popen([sys.executable, "-c", HOLD, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "True"
    return process


def shown(run: Run) -> str:
    console = make_console(160)
    with console.capture() as captured:
        console.print(status_view(take_status([run])))
    return captured.get()


def test_who_works_on_what_and_how_fast(run: Run, held: list[subprocess.Popen[str]]) -> None:
    rollout = run.plan.job("rollout", 0)
    artifact = commit(run, rollout, [0, 1], responses=8, tokens=320)
    for part, age in ((0, 40), (1, 10)):
        marker = artifact.folder / f"part-0000{part}.json"
        os.utime(marker, (time.time() - age, time.time() - age))
    held.append(hold(run, rollout, 2))
    (activity,) = take_status([run]).activities
    assert list(activity.workers.values()) == [[2]]
    assert f"process {held[0].pid} " in next(iter(activity.workers))
    assert activity.seconds_per_part == pytest.approx(30, abs=1)
    assert activity.seconds_left == pytest.approx(30, abs=1)
    assert "rollout 0  2/3" in shown(run)
    held[0].kill()
    held[0].wait()
    (activity,) = take_status([run]).activities
    assert activity.workers == {}
    assert "No part is claimed" in shown(run)


def test_a_training_shows_its_step(run: Run, held: list[subprocess.Popen[str]]) -> None:
    train = run.plan.job("train", 0)
    artifact = run.artifact(train.output)
    with artifact.write_part(1):  # leaves an identity to claim; the optimiser's part is the first to come
        pass
    held.append(hold(run, train, 0))
    run.paths.folder.mkdir(parents=True)
    rows = [{"round": 0, "step": step, "tokens": 100, "tokens_per_s": 50.0, "loss": 0.25} for step in range(3)]
    run.paths.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"round": 0, "st')
    (activity,) = take_status([run]).activities
    assert activity.step == rows[-1]
    assert activity.seconds_left == pytest.approx((6 - 3) * 2.0)  # 20 responses in batches of 8, twice
    assert "step 3/6" in shown(run)


def test_failures_are_shown_until_the_job_is_done(run: Run) -> None:
    score, rollout = run.plan.job("score", 0), run.plan.job("rollout", 1)
    log_task(run, rollout, outcome="failed", message="out of memory", parts=[0])
    log_task(run, score, outcome="failed", message="the teacher's logits are NaN", parts=[1])
    assert [failure.job for failure in take_status([run]).failures] == ["score 0", "rollout 1"]
    log_task(run, rollout, seconds=3.0, made=1)
    (failure,) = take_status([run]).failures
    assert failure.message == "the teacher's logits are NaN"
    assert "score 0 failed 0 s ago: the teacher's logits are NaN" in shown(run)


def test_everything_done(run: Run) -> None:
    for job in run.plan.jobs:
        commit(run, job, responses=8, tokens=80)
        note_job(run, job, 1.0)
    assert "Everything is done." in shown(run)


def test_logs_are_chosen_by_stage_and_round(tmp_path: Path) -> None:
    for number, name in enumerate(
        ["score-0.worker-0.log", "score-1.worker-0.log", "train-1.log", "student_topk-0.log", "vllm.log"]
    ):
        (tmp_path / name).write_text(f"of {name}\n")
        os.utime(tmp_path / name, (number, number))
    assert [path.name for path in find_logs(tmp_path, "score", None)] == [
        "score-0.worker-0.log",
        "score-1.worker-0.log",
    ]
    assert [path.name for path in find_logs(tmp_path, None, 1)] == ["score-1.worker-0.log", "train-1.log"]
    assert [path.name for path in find_logs(tmp_path, "student_topk", 0)] == ["student_topk-0.log"]
    assert len(find_logs(tmp_path)) == 5
    with pytest.raises(RunError, match=r"no log of train round 0 .* there is: .*vllm\.log"):
        find_logs(tmp_path, "train", 0)


def test_a_tail_of_a_long_log_is_its_end(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("".join(f"line {number}\n" for number in range(100_000)))
    assert tail(path, 2) == ["line 99998", "line 99999"]


def test_a_run_is_found_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("name: mine\n")
    assert config_of("mine", tmp_path / "runs") == str(tmp_path / "runs" / "mine" / "config.yaml")
    assert config_of("quickstart", tmp_path / "runs") == "quickstart"


@pytest.mark.parametrize("find", [config_of, paths_of])
def test_what_is_neither_a_run_nor_a_config_is_said_to_be_neither(
    tmp_path: Path, find: Callable[[str, Path], object]
) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(ConfigError) as caught:
        find("base", runs)
    assert str(caught.value) == f"there is no run 'base' below {runs}, and no config of that name"
    (runs / "basic").mkdir(parents=True)
    (runs / "basic" / "config.yaml").write_text("name: basic\n")
    with raises(ConfigError, "'base'", remedy="Did you mean basic?"):
        find("base", runs)
    with pytest.raises(ConfigError, match=r"no run can be called 'xxx.*File name too long"):
        find("x" * 5000, runs)


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_a_run_s_config_that_is_no_plain_file_is_named(tmp_path: Path, kind: str) -> None:
    config = tmp_path / "quickstart" / "config.yaml"
    config.parent.mkdir()
    if kind == "folder":
        config.mkdir()
    elif kind == "link":
        config.symlink_to("gone.yaml")
    else:
        os.mkfifo(config)
    with raises(ConfigError, file=config):
        config_of("quickstart", tmp_path)


@pytest.mark.timeout(90)
def test_logs_are_followed_new_ones_too_until_interrupted(tmp_path: Path) -> None:
    logs = tmp_path / "runs" / "mine" / "logs"
    logs.mkdir(parents=True)
    (logs / "score-0.log").write_text("first\n")
    process = subprocess.Popen(
        command("logs", "mine", "--runs", tmp_path / "runs", "-f"),
        stdout=subprocess.PIPE,
        text=True,
        # a shell's background jobs are started with interrupts ignored, which is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["==> score-0.log <==\n", "first\n"]
        with (logs / "score-0.log").open("a") as file:
            file.write("second\nhalf a li")
        assert process.stdout.readline() == "second\n"
        (logs / "train-0.log").write_text("of another\n")
        assert [process.stdout.readline() for _ in range(2)] == ["==> train-0.log <==\n", "of another\n"]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()
