"""What would be submitted to Slurm: arrays, dependencies and scripts, from a plan and what the store holds of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from eopd.pipeline.config import parse_settings
from eopd.pipeline.launchers.slurm.arrays import Array, arrays_of
from eopd.pipeline.launchers.slurm.script import Place, dependency, dry_run
from eopd.pipeline.plan import make_plan
from eopd.pipeline.runner import Runner
from eopd.stages.job import NullProgress
from tests.pipeline.plan_case import RAW, commit, make_facts

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


def runner(store: str, **changes: object) -> Runner:
    slurm = SLURM | changes
    raw = RAW | {"store": store, "rounds": 2, "launcher": {"kind": "slurm", "slurm": slurm}}
    raw["train"] = {**RAW["train"], "processes": 4}  # type: ignore[dict-item]
    settings = parse_settings(raw, "test")
    return Runner(settings, make_facts(), make_plan(settings, make_facts()), NullProgress())


def arrays(run: Runner) -> list[Array]:
    return arrays_of([(run, job) for job in run.plan.jobs], run.settings.launcher.slurm)


def waits(found: list[Array]) -> dict[str, str | None]:
    return {array.name: dependency(array, {other: other.name for other in found}) for array in found}


def test_a_whole_plan_is_submitted_at_once(tmp_path: Path) -> None:
    found = arrays(runner(str(tmp_path)))
    assert {array.name: array.indices for array in found} == {
        "evaluate-0": "0-1",
        "rollout-0": "0-1",
        "score-0": "0-1",
        "train-0": "0",
        "evaluate-1": "0-1",
        "rollout-1": "0-1",
        "score-1": "0-1",
        "train-1": "0",
        "evaluate-2": "0-1",
    }
    assert waits(found) == {
        "evaluate-0": None,
        "rollout-0": None,
        "score-0": "aftercorr:rollout-0",
        "train-0": "afterok:rollout-0:score-0",
        "evaluate-1": "afterok:train-0",
        "rollout-1": "afterok:train-0",
        "score-1": "aftercorr:rollout-1",
        "train-1": "afterok:rollout-1:score-1:train-0",
        "evaluate-2": "afterok:train-1",
    }
    assert found[0].chunks == {0: (0, 1), 1: (2,)}  # its last part is the summary: whoever ends last writes it


def test_what_is_committed_is_left_out(tmp_path: Path) -> None:
    run = runner(str(tmp_path))
    commit(run, run.plan.job("rollout", 0), [0, 1])
    commit(run, run.plan.job("score", 0), [0])
    commit(run, run.plan.job("evaluate", 0), [0, 1, 2, 3])
    found = arrays(run)
    chunks = {array.name: dict(array.chunks) for array in found}
    assert "evaluate-0" not in chunks
    assert chunks["rollout-0"] == {1: (2,)}
    assert chunks["score-0.ready"] == {0: (1,)}
    assert chunks["score-0"] == {1: (2,)}
    assert waits(found)["score-0.ready"] is None
    assert waits(found)["train-0"] == "afterok:rollout-0:score-0.ready:score-0"
    commit(run, run.plan.job("rollout", 0), [2])
    found = arrays(run)
    assert waits(found)["score-0"] is None
    assert waits(found)["train-0"] == "afterok:score-0"


def test_only_the_summary_is_missing(tmp_path: Path) -> None:
    run = runner(str(tmp_path))
    commit(run, run.plan.job("evaluate", 0), [0, 1, 2])
    assert arrays(run)[0].chunks == {1: (3,)}


def test_arrays_stay_below_the_clusters_limit(tmp_path: Path) -> None:
    found = arrays(runner(str(tmp_path), parts_per_task=1, array_size=2))
    by_name = {array.name: array for array in found}
    assert by_name["rollout-0"].chunks == {0: (0,), 1: (1,)}
    assert by_name["rollout-0-1"].chunks == {0: (2,)}
    assert waits(found)["score-0-1"] == "aftercorr:rollout-0-1"
    assert waits(found)["train-0"] == "afterok:rollout-0:rollout-0-1:score-0:score-0-1"


def test_two_runs_that_share_a_job_submit_it_once(tmp_path: Path) -> None:
    one = runner(str(tmp_path))
    settings = one.settings.model_copy(update={"name": "other"})
    other = Runner(settings, make_facts(), make_plan(settings, make_facts()), NullProgress())
    work = [(run, job) for run in (one, other) for job in run.plan.jobs]
    assert {array.runner.settings.name for array in arrays_of(work, one.settings.launcher.slurm)} == {"x"}


def test_runs_that_want_another_side_artifact_sample_once(tmp_path: Path) -> None:
    """The second array finds the responses of the first and adds what is beside them; each waits for its own."""
    one = runner(str(tmp_path))
    rollout = one.settings.rollout.model_copy(update={"student_topk": 4})
    settings = one.settings.model_copy(update={"name": "other", "rollout": rollout})
    other = Runner(settings, make_facts(), make_plan(settings, make_facts()), NullProgress())
    found = arrays_of([(run, job) for run in (one, other) for job in run.plan.jobs], one.settings.launcher.slurm)
    names = {array: f"{array.runner.settings.name}:{array.name}" for array in found}
    waiting = {names[array]: dependency(array, names) for array in found}
    assert waiting["other:rollout-0"] == "afterok:x:rollout-0"
    assert waiting["other:score-0"] == "aftercorr:other:rollout-0"
    assert waiting["x:score-0"] == "aftercorr:x:rollout-0"
    assert "other:evaluate-0" not in waiting  # that is one job


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    run = runner("store")
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
