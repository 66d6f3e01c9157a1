"""What would be submitted to Slurm: arrays, dependencies and scripts, from a plan and what the store holds of it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from eopd.pipeline.config import ConfigError, parse_settings
from eopd.pipeline.launchers.slurm import Failure
from eopd.pipeline.launchers.slurm_arrays import Array, Place, arrays_of, dependency, dry_run
from eopd.pipeline.run import Run
from tests.pipeline.plan_case import RAW, commit, make_facts, run_of
from tests.raises import raises

GOLDEN = Path(__file__).parent / "golden" / "slurm.txt"
PLACE = Place(Path("/cluster/project"), "python")
SLURM = {
    "parts_per_task": 2,
    "tasks_at_once": 8,
    "resources": {"partition": "gpu", "time": "04:00:00", "gpus": 1, "cpus": 8, "memory": "64G"},
    "score": {"gpus": 4, "extra": ["--qos=high"]},
    "train": {"nodes": 2, "gpus": 4},
    "evaluate": {"partition": "short"},
    "setup": ["module load cuda", "export HF_HUB_OFFLINE=1"],
}


def slurm_run(store: str, **changes: object) -> Run:
    slurm = SLURM | changes
    raw = RAW | {"store": store, "rounds": 2, "launcher": {"kind": "slurm", "slurm": slurm}}
    raw["train"] = {**RAW["train"], "processes": 4}  # type: ignore[dict-item]
    settings = parse_settings(raw, "test")
    return run_of(settings, make_facts())


def arrays(run: Run) -> list[Array]:
    return arrays_of([(run, job) for job in run.plan.jobs], run.settings.launcher.slurm)


def waits(result: list[Array]) -> dict[str, str | None]:
    return {array.name: dependency(array, {other: other.name for other in result}) for array in result}


def test_a_whole_plan_is_submitted_at_once(tmp_path: Path) -> None:
    stored = arrays(slurm_run(str(tmp_path)))
    assert {array.name: array.indices for array in stored} == {
        "evaluate-0": "0-1",
        "evaluation_summary-0": "0",
        "rollout-0": "0-1",
        "score-0": "0-1",
        "train-0": "0",
        "evaluate-1": "0-1",
        "evaluation_summary-1": "0",
        "rollout-1": "0-1",
        "score-1": "0-1",
        "train-1": "0",
        "evaluate-2": "0-1",
        "evaluation_summary-2": "0",
    }
    assert waits(stored) == {
        "evaluate-0": None,
        "evaluation_summary-0": "afterok:evaluate-0",
        "rollout-0": None,
        "score-0": "aftercorr:rollout-0",
        "train-0": "afterok:rollout-0:score-0",
        "evaluate-1": "afterok:train-0",
        "evaluation_summary-1": "afterok:evaluate-1",
        "rollout-1": "afterok:train-0",
        "score-1": "aftercorr:rollout-1",
        "train-1": "afterok:rollout-1:score-1:train-0",
        "evaluate-2": "afterok:train-1",
        "evaluation_summary-2": "afterok:evaluate-2",
    }
    assert stored[0].chunks == {0: (0, 1), 1: (2,)}


def test_what_is_committed_is_left_out(tmp_path: Path) -> None:
    run = slurm_run(str(tmp_path))
    commit(run, run.plan.job("rollout", 0), [0, 1])
    commit(run, run.plan.job("score", 0), [0])
    commit(run, run.plan.job("evaluate", 0))
    stored = arrays(run)
    chunks = {array.name: dict(array.chunks) for array in stored}
    assert "evaluate-0" not in chunks
    assert chunks["rollout-0"] == {1: (2,)}
    assert chunks["score-0.ready"] == {0: (1,)}
    assert chunks["score-0"] == {1: (2,)}
    assert waits(stored)["score-0.ready"] is None
    assert waits(stored)["train-0"] == "afterok:rollout-0:score-0.ready:score-0"
    commit(run, run.plan.job("rollout", 0), [2])
    stored = arrays(run)
    assert waits(stored)["score-0"] is None
    assert waits(stored)["train-0"] == "afterok:score-0"


def test_arrays_stay_below_the_clusters_limit(tmp_path: Path) -> None:
    stored = arrays(slurm_run(str(tmp_path), parts_per_task=1, array_size=2))
    by_name = {array.name: array for array in stored}
    assert by_name["rollout-0"].chunks == {0: (0,), 1: (1,)}
    assert by_name["rollout-0-1"].chunks == {0: (2,)}
    assert waits(stored)["score-0-1"] == "aftercorr:rollout-0-1"
    assert waits(stored)["train-0"] == "afterok:rollout-0:rollout-0-1:score-0:score-0-1"


def test_two_runs_that_share_a_job_submit_it_once(tmp_path: Path) -> None:
    one = slurm_run(str(tmp_path))
    settings = one.settings.model_copy(update={"name": "other"})
    other = run_of(settings, make_facts())
    work = [(run, job) for run in (one, other) for job in run.plan.jobs]
    assert {array.run.settings.name for array in arrays_of(work, one.settings.launcher.slurm)} == {"x"}


def test_runs_that_want_the_students_top_k_sample_once(tmp_path: Path) -> None:
    one = slurm_run(str(tmp_path))
    rollout = one.settings.rollout.model_copy(update={"student_topk": 4})
    settings = one.settings.model_copy(update={"name": "other", "rollout": rollout})
    other = run_of(settings, make_facts())
    result = arrays_of([(run, job) for run in (one, other) for job in run.plan.jobs], one.settings.launcher.slurm)
    names = {array: f"{array.run.name}:{array.name}" for array in result}
    waiting = {names[array]: dependency(array, names) for array in result}
    assert "other:rollout-0" not in waiting
    assert waiting["other:student_topk-0"] == "aftercorr:x:rollout-0"
    assert waiting["other:score-0"] == "aftercorr:x:rollout-0,aftercorr:other:student_topk-0"
    assert waiting["x:score-0"] == "aftercorr:x:rollout-0"
    assert "other:evaluate-0" not in waiting  # that is one job


def test_tasks_that_wait_for_different_arrays_stand_apart(tmp_path: Path) -> None:
    run = slurm_run(str(tmp_path), parts_per_task=1)
    settings = run.settings.model_copy(update={"rollout": run.settings.rollout.model_copy(update={"student_topk": 4})})
    run = run_of(settings, make_facts())
    commit(run, run.plan.job("rollout", 0), [0, 1])
    commit(run, run.plan.job("student_topk", 0), [0])
    stored = {array.name: array for array in arrays(run)}
    names = {array: name for name, array in stored.items()}
    scores = {name: array for name, array in stored.items() if name.startswith("score-0")}
    assert {name: tuple(array.chunks) for name, array in scores.items()} == {
        "score-0.ready": (0,),
        "score-0.1": (1,),
        "score-0": (2,),
    }
    assert [dependency(array, names) for array in scores.values()] == [
        None,
        "aftercorr:student_topk-0.ready",
        "aftercorr:rollout-0,aftercorr:student_topk-0",
    ]


@pytest.mark.parametrize("name", ["losses", "backoff_seconds", "backoff_limit_seconds", "full_poll_seconds"])
def test_fault_settings_that_slurm_would_ignore_are_refused(name: str) -> None:
    with raises(ConfigError, setting=f"launcher.faults.{name}"):
        parse_settings(RAW | {"launcher": {"kind": "slurm", "faults": {name: 7}}}, "test")


def test_tasks_are_written_beside_the_script(tmp_path: Path) -> None:
    array = arrays(slurm_run(str(tmp_path)))[0]
    tasks = json.loads(array.tasks_text())
    assert [task["parts"] for task in tasks.values()] == [[0, 1], [2]]
    assert {(task["stage"], task["round"]) for task in tasks.values()} == {("evaluate", 0)}


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    run = slurm_run("store")
    text = dry_run([(run, job) for job in run.plan.jobs], run.settings.launcher.slurm, 3, PLACE)
    assert not list(tmp_path.iterdir())
    return text


def test_a_dry_run_is_the_golden_text(shown: str) -> None:
    """To accept a change: write ``shown`` to the golden file."""
    assert shown == GOLDEN.read_text()


def test_every_script_is_shell(shown: str) -> None:
    for script in shown.split("# ==> ")[1:]:
        text = script.partition("\n")[2]
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=True).stderr == ""


def test_a_part_alone_in_its_task_is_to_blame_unless_its_worker_was_killed_or_its_disk_full(tmp_path: Path) -> None:
    rollout, train = (
        next(a for a in arrays(slurm_run("store")) if a.job.stage.name == name) for name in ("rollout", "train")
    )

    def blames(array: Array, code: int | None, parts: tuple[int, ...] = (3,)) -> bool:
        return Failure(array, "1_0", parts, parts, "FAILED", tmp_path, code, "").blames_a_part

    assert [blames(rollout, code) for code in (1, 2, 65)] == [True] * 3
    assert not any(blames(rollout, code) for code in (None, 0, 28, 130, 137))
    assert not blames(rollout, 65, (3, 4))
    assert not blames(train, 65, (0,))
