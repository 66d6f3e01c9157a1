"""The scheduler over a real store, with workers that commit parts without making anything, or fail as they are told."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pytest

from eopd.pipeline.errors import Outcome, RunError
from eopd.pipeline.launchers import local
from eopd.pipeline.launchers.local import LocalPool, threads_each
from eopd.pipeline.launchers.settings import FaultSettings, LauncherSettings
from eopd.pipeline.processes import Leader
from eopd.pipeline.progress import LineDisplay
from eopd.pipeline.scheduler import run_jobs
from eopd.pipeline.tasks import Task
from eopd.stages.stage import Stage
from eopd.stages.table import STAGES
from eopd.storage.artifacts import Artifact
from eopd.storage.stored import Standing
from tests.pipeline.plan_case import commit, make_run

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
        for input_ in task.job.inputs.values():
            committed = task.run.artifact(input_.identity).committed()
            assert committed.issuperset(task.parts if input_.by_part else input_.needed()), task.name
        self._tasks.append(task)
        self.told.append(task)
        self.most = max(self.most, len(self._tasks))

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        tasks, self._tasks = self._tasks, []
        return [(task, self._work(task)) for task in tasks]

    def close(self) -> None:
        assert not self._tasks

    def _work(self, task: Task) -> Outcome:
        job, run = task.job, task.run
        for part in task.parts:
            if (job.stage.name, job.round, part) in self._bad:
                return Outcome("failed", "it cannot be made")
            if (job.stage.name, part) in self._refused:
                return Outcome("refused", self._refused[job.stage.name, part])
            if not run.artifact(job.output).is_committed(part):
                commit(run, job, [part])
                self.made[job.output.key, part] += 1
        return Outcome("done")


@pytest.mark.parametrize("room", [1, 2, 5])
def test_every_part_is_made_once_after_what_it_reads(tmp_path: Path, room: int) -> None:
    run, hands = make_run(tmp_path), Hands(room)
    run_jobs([(run, job) for job in run.plan.jobs], hands, QUICK)
    assert set(hands.made.values()) == {1}
    assert len(hands.made) == sum(job.output.parts for job in run.plan.jobs)
    assert hands.most == room if room < 5 else hands.most > 2
    if room == 1:
        assert [task.job.name for task in hands.told] == [job.name for job in run.plan.jobs]


def test_work_that_two_runs_share_is_done_once(tmp_path: Path) -> None:
    runs = [make_run(tmp_path), make_run(tmp_path)]
    hands = Hands(2)
    run_jobs([(run, job) for run in runs for job in run.plan.jobs], hands, QUICK)
    assert set(hands.made.values()) == {1}


@pytest.mark.parametrize("room", [1, 3])
def test_runs_that_want_the_students_top_k_share_the_rollouts(tmp_path: Path, room: int) -> None:
    asked = [{"student_topk": k} for k in (0, 4, 8, 4)]
    runs = [make_run(tmp_path, name=f"x{n}", rounds=1, rollout=topk) for n, topk in enumerate(asked)]
    hands = Hands(room)
    run_jobs([(run, job) for run in runs for job in run.plan.jobs], hands, QUICK)
    assert all(run.is_done(job) for run in runs for job in run.plan.jobs)
    assert set(hands.made.values()) == {1}
    assert len({run.plan.job("rollout", 0).output.key for run in runs}) == 1
    sampling = [task.parts for task in hands.told if task.job.stage.name == "rollout"]
    assert sorted(part for parts in sampling for part in parts) == [0, 1, 2]


def test_folders_of_jobs_that_cannot_have_begun_are_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, listed, standing = make_run(tmp_path, rounds=3), Counter[str](), Artifact.standing
    before: list[tuple[int, int]] = []  # tasks started, and listings of the last checkpoint, before its round begins

    def counted(artifact: Artifact) -> Standing:
        listed[artifact.key] += 1
        return standing(artifact)

    class Watched(Hands):
        def start(self, task: Task) -> None:
            if (task.job.stage.name, task.job.round) == ("rollout", 2) and not before:
                before.append((len(self.told), listed[run.plan.job("train", 2).output.key]))
            super().start(task)

    monkeypatch.setattr(Artifact, "standing", counted)
    run_jobs([(run, job) for job in run.plan.jobs], Watched(), QUICK)
    assert all(run.is_done(job) for job in run.plan.jobs)
    [(tasks, listings)] = before
    assert tasks >= 8
    assert listings < tasks


def test_a_poisoned_part_stops_only_what_needs_it(tmp_path: Path) -> None:
    run, hands = make_run(tmp_path), Hands(2, bad={("score", 0, 1)})
    with pytest.raises(RunError, match=r"score 0 part 1: it cannot be made"):
        run_jobs([(run, job) for job in run.plan.jobs], hands, QUICK)
    assert run.artifact(run.plan.job("score", 0).output).committed() == {0, 2}
    assert run.is_done(run.plan.job("evaluate", 0))
    assert not {task.job.name for task in hands.told} & {"train 0", "rollout 1"}
    assert sum(task.parts == (1,) for task in hands.told) <= QUICK.attempts


def test_what_is_refused_for_one_part_is_tried_twice_and_for_all_parts_given_up(tmp_path: Path) -> None:
    run, hands = make_run(tmp_path), Hands(1, refused={("rollout", 1): "part 1 is wrong"})
    with pytest.raises(RunError, match="rollout 0 part 1: part 1 is wrong"):
        run_jobs([(run, job) for job in run.plan.jobs], hands, QUICK)
    assert run.artifact(run.plan.job("rollout", 0).output).committed() == {0, 2}
    assert sum(1 in task.parts for task in hands.told if task.job.stage.name == "rollout") <= 2
    set_aside = FaultSettings(backoff_seconds=0.0, poisoned="set_aside")
    third = make_run(tmp_path / "third", rollout={"rows_per_part": 1})
    hands = Hands(1, refused={("rollout", part): "a prompt is too long" for part in (7, 9)})
    run_jobs([(third, third.plan.job("rollout", 0))], hands, set_aside)
    assert third.artifact(third.plan.job("rollout", 0).output).reasons_aside().keys() == {7, 9}
    other = make_run(tmp_path / "other")
    hands = Hands(1, refused={("rollout", part): "no part can be made" for part in range(3)})
    with pytest.raises(RunError, match="no part can be made"):
        run_jobs([(other, job) for job in other.plan.jobs], hands, QUICK)
    assert len([task for task in hands.told if task.job.stage.name == "rollout"]) == 3  # whole, and each half


def test_a_poisoned_part_is_set_aside_and_the_run_ends_well(tmp_path: Path) -> None:
    run, hands = make_run(tmp_path), Hands(2, bad={("rollout", 1, 0)})
    run_jobs([(run, job) for job in run.plan.jobs], hands, FaultSettings(backoff_seconds=0.0, poisoned="set_aside"))
    rollouts = run.artifact(run.plan.job("rollout", 1).output)
    assert rollouts.reasons_aside() == {0: "it cannot be made"}
    assert all(run.is_done(job) for job in run.plan.jobs)


@pytest.mark.parametrize("bad", [{("train", 0, 0)}, {("rollout", 0, part) for part in range(3)}])
def test_what_cannot_be_done_without_is_not_set_aside(tmp_path: Path, bad: set[tuple[str, int, int]]) -> None:
    """Training; and a job none of whose parts can be made, where it is not the parts that are at fault."""
    run, hands = make_run(tmp_path), Hands(1, bad)
    policy = FaultSettings(backoff_seconds=0.0, poisoned="set_aside")
    with pytest.raises(RunError, match="it cannot be made"):
        run_jobs([(run, job) for job in run.plan.jobs], hands, policy)
    assert not run.artifact(run.plan.job("rollout", 0).output).reasons_aside()


def test_gpus_are_given_by_name_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    options = run.settings.score.model_copy(
        update={"engine_options": run.settings.score.engine_options.model_copy(update={"tensor_parallel": 2})}
    )
    settings = run.settings.model_copy(update={"launcher": LauncherSettings(gpus=[2, 5, 7]), "score": options})
    seen: list[str] = []

    class Waits(local.WarmWorker):
        def __post_init__(self) -> None:
            seen.append(self.environment["CUDA_VISIBLE_DEVICES"])
            self._answers, self._theirs = os.pipe()
            self.process = Leader(["-c", "input()"], stdin=subprocess.PIPE)  # type: ignore[assignment]

    monkeypatch.setattr(local, "WarmWorker", Waits)
    pool = LocalPool(settings, LineDisplay())
    stages = {stage.name: stage for stage in STAGES}
    rollout, score, train = (stages[name] for name in ("rollout", "score", "train"))
    assert (pool.room(rollout), pool.room(score), pool.room(train)) == (3, 1, 3)
    pool.start(Task(run, run.plan.job("score", 0), (0,)))
    assert (pool.room(rollout), pool.room(score)) == (1, 0)
    pool.start(Task(run, run.plan.job("rollout", 0), (0,)))
    assert seen == ["2,5", "7"]
    assert pool.room(stages["evaluation_summary"]) == 2, "a stage that needs no GPU does not wait for one"
    pool.close()
    assert pool.room(rollout) == 3


@pytest.mark.parametrize(("workers", "own", "given"), [(2, None, "shared out"), (1, None, None), (2, "3", "3")])
def test_workers_on_a_cpu_share_its_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, own: str | None, given: str | None
) -> None:
    """Unless the person has said how many threads; a worker that is alone takes what it likes."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    run = make_run(tmp_path)
    settings = run.settings.model_copy(update={"launcher": LauncherSettings(workers=workers)})
    pool = LocalPool(settings, LineDisplay())
    threads = pool._environment(()).get("OMP_NUM_THREADS")
    pool.close()
    assert threads == (str(threads_each(workers)) if given == "shared out" else given)
