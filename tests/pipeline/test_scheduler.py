"""The scheduler over a real store, with workers that commit parts without making anything, or fail as they are told."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pytest

from eopd.pipeline.errors import RunError
from eopd.pipeline.launchers.base import Outcome, Task
from eopd.pipeline.launchers.local import LocalPool, threads_each
from eopd.pipeline.launchers.settings import FaultSettings, LauncherSettings
from eopd.pipeline.plan import SUMMED_UP, Stage
from eopd.pipeline.progress import LineDisplay
from eopd.pipeline.runner import Runner
from eopd.pipeline.scheduler import run_jobs
from tests.pipeline.plan_case import commit, make_runner

QUICK = FaultSettings(backoff_seconds=0.0)


class Hands:
    """A pool whose tasks end when they are waited for; parts in ``bad`` (stage, round, part) cannot be made."""

    def __init__(
        self,
        room: int = 1,
        bad: Collection[tuple[str, int, int]] = (),
        refused: dict[tuple[str, int], str] | None = None,
    ) -> None:
        """``refused``: by (stage, part), the message with which it is refused."""
        self._room, self._bad, self._refused = room, bad, refused or {}
        self._tasks: list[Task] = []
        self.told: list[Task] = []
        self.made: Counter[tuple[str, int]] = Counter()
        self.most = 0

    def room(self, stage: Stage) -> int:
        return self._room - len(self._tasks)

    def start(self, task: Task) -> None:
        assert self.room(task.job.stage) > 0
        for identity in task.job.inputs:
            made = task.runner.artifact(identity).committed()
            by_part = task.job.stage == "score" and identity.kind == "rollouts"
            assert made.issuperset(task.parts if by_part else range(identity.parts)), task.name
        self._tasks.append(task)
        self.told.append(task)
        self.most = max(self.most, len(self._tasks))

    def wait(self, seconds: float) -> list[Outcome]:
        tasks, self._tasks = self._tasks, []
        return [self._work(task) for task in tasks]

    def close(self) -> None:
        assert not self._tasks

    def _work(self, task: Task) -> Outcome:
        job, runner = task.job, task.runner
        for part in task.parts:
            if (job.stage, job.round, part) in self._bad:
                return Outcome(task, "failed", "it cannot be made")
            if (job.stage, part) in self._refused:
                return Outcome(task, "refused", self._refused[job.stage, part])
            self._make(runner, task, part)
        last = job.output.parts - 1
        if job.stage in SUMMED_UP and runner.artifact(job.output).missing() == [last]:
            self._make(runner, task, last)
        return Outcome(task, "done")

    def _make(self, runner: Runner, task: Task, part: int) -> None:
        if not runner.artifact(task.job.output).is_committed(part):
            commit(runner, task.job, [part])
            self.made[task.job.output.key, part] += 1
        side = runner.artifact(task.job.side) if task.job.stage == "rollout" and task.job.side else None
        if side is not None and not side.is_committed(part):
            with side.write_part(part):
                pass
            self.made[side.key, part] += 1


@pytest.mark.parametrize("room", [1, 2, 5])
def test_every_part_is_made_once_after_what_it_reads(tmp_path: Path, room: int) -> None:
    runner, hands = make_runner(tmp_path), Hands(room)
    run_jobs([(runner, job) for job in runner.plan.jobs], hands, QUICK)
    assert set(hands.made.values()) == {1}
    assert len(hands.made) == sum(job.output.parts for job in runner.plan.jobs)
    assert hands.most == room if room < 5 else hands.most > 2
    if room == 1:
        assert [task.job.name for task in hands.told] == [job.name for job in runner.plan.jobs]


def test_work_that_two_runs_share_is_done_once(tmp_path: Path) -> None:
    runners = [make_runner(tmp_path), make_runner(tmp_path)]
    hands = Hands(2)
    run_jobs([(runner, job) for runner in runners for job in runner.plan.jobs], hands, QUICK)
    assert set(hands.made.values()) == {1}


@pytest.mark.parametrize("room", [1, 3])
def test_runs_that_want_another_side_artifact_share_the_rollouts(tmp_path: Path, room: int) -> None:
    """Some runs of a sweep ask for the student's top-k: the responses are sampled once, as is what is beside them."""
    asked = [{"student_topk": k} for k in (0, 4, 8, 4)]
    runners = [make_runner(tmp_path, name=f"x{n}", rounds=1, rollout=topk) for n, topk in enumerate(asked)]
    hands = Hands(room)
    run_jobs([(runner, job) for runner in runners for job in runner.plan.jobs], hands, QUICK)
    assert all(runner.is_done(job) for runner in runners for job in runner.plan.jobs)
    assert set(hands.made.values()) == {1}
    assert len({runner.plan.job("rollout", 0).output.key for runner in runners}) == 1
    sampling = [task.parts for task in hands.told if task.job.stage == "rollout" and task.job.side is None]
    assert sorted(part for parts in sampling for part in parts) == [0, 1, 2]


def test_a_poisoned_part_stops_only_what_needs_it(tmp_path: Path) -> None:
    runner, hands = make_runner(tmp_path), Hands(2, bad={("score", 0, 1)})
    with pytest.raises(RunError, match=r"score 0 part 1: it cannot be made"):
        run_jobs([(runner, job) for job in runner.plan.jobs], hands, QUICK)
    assert runner.artifact(runner.plan.job("score", 0).output).committed() == {0, 2}
    assert runner.is_done(runner.plan.job("evaluate", 0))
    assert not {task.job.name for task in hands.told} & {"train 0", "rollout 1"}
    assert sum(task.parts == (1,) for task in hands.told) <= QUICK.attempts


def test_what_is_refused_for_one_part_is_tried_twice_and_for_all_parts_given_up(tmp_path: Path) -> None:
    runner, hands = make_runner(tmp_path), Hands(1, refused={("rollout", 1): "part 1 is wrong"})
    with pytest.raises(RunError, match="rollout 0 part 1: part 1 is wrong"):
        run_jobs([(runner, job) for job in runner.plan.jobs], hands, QUICK)
    assert runner.artifact(runner.plan.job("rollout", 0).output).committed() == {0, 2}
    assert sum(1 in task.parts for task in hands.told if task.job.stage == "rollout") <= 2
    other = make_runner(tmp_path / "other")
    hands = Hands(1, refused={("rollout", part): "no part can be made" for part in range(3)})
    with pytest.raises(RunError, match="no part can be made"):
        run_jobs([(other, job) for job in other.plan.jobs], hands, QUICK)
    assert len([task for task in hands.told if task.job.stage == "rollout"]) == 3  # whole, and each half


def test_a_poisoned_part_is_set_aside_and_the_run_ends_well(tmp_path: Path) -> None:
    runner, hands = make_runner(tmp_path), Hands(2, bad={("rollout", 1, 0)})
    run_jobs(
        [(runner, job) for job in runner.plan.jobs], hands, FaultSettings(backoff_seconds=0.0, poisoned="set_aside")
    )
    rollouts = runner.artifact(runner.plan.job("rollout", 1).output)
    assert rollouts.reasons_aside() == {0: "it cannot be made"}
    assert all(runner.is_done(job) for job in runner.plan.jobs)


@pytest.mark.parametrize("bad", [{("train", 0, 0)}, {("rollout", 0, part) for part in range(3)}])
def test_what_cannot_be_done_without_is_not_set_aside(tmp_path: Path, bad: set[tuple[str, int, int]]) -> None:
    """Training; and a job none of whose parts can be made, where it is not the parts that are at fault."""
    runner, hands = make_runner(tmp_path), Hands(1, bad)
    policy = FaultSettings(backoff_seconds=0.0, poisoned="set_aside")
    with pytest.raises(RunError, match="it cannot be made"):
        run_jobs([(runner, job) for job in runner.plan.jobs], hands, policy)
    assert not runner.artifact(runner.plan.job("rollout", 0).output).reasons_aside()


def test_gpus_are_given_by_name_and_come_back(tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    options = runner.settings.score.model_copy(
        update={"engine_options": runner.settings.score.engine_options.model_copy(update={"tensor_parallel": 2})}
    )
    settings = runner.settings.model_copy(update={"launcher": LauncherSettings(gpus=[2, 5, 7]), "score": options})
    seen: list[str] = []

    def spawn(arguments: list[str], environment: object, output: object) -> object:
        assert isinstance(environment, dict)
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
        return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    pool = LocalPool(settings, LineDisplay(), spawn)  # type: ignore[arg-type]
    assert (pool.room("rollout"), pool.room("score"), pool.room("train")) == (3, 1, 3)
    pool.start(Task(runner, runner.plan.job("score", 0), (0,)))
    assert (pool.room("rollout"), pool.room("score")) == (1, 0)
    pool.start(Task(runner, runner.plan.job("rollout", 0), (0,)))
    assert seen == ["2,5", "7"]
    pool.close()
    assert pool.room("rollout") == 3


@pytest.mark.parametrize(("workers", "own", "given"), [(2, None, "shared out"), (1, None, None), (2, "3", "3")])
def test_workers_on_a_cpu_share_its_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, own: str | None, given: str | None
) -> None:
    """Unless the person has said how many threads; a worker that is alone takes what it likes."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    runner = make_runner(tmp_path)
    settings = runner.settings.model_copy(update={"launcher": LauncherSettings(workers=workers)})
    seen: list[str | None] = []

    def spawn(arguments: list[str], environment: dict[str, str], output: object) -> object:
        seen.append(environment.get("OMP_NUM_THREADS"))
        return subprocess.Popen([sys.executable, "-c", ""])

    pool = LocalPool(settings, LineDisplay(), spawn)  # type: ignore[arg-type]
    pool.start(Task(runner, runner.plan.job("rollout", 0), (0,)))
    pool.close()
    assert seen == [str(threads_each(workers)) if given == "shared out" else given]
