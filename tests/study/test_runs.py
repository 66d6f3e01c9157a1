"""Real runs at toy size: whole, killed and resumed, and what they cost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from eopd.pipeline.run import Run
from eopd.stages.stage import Job
from eopd.stages.train.objectives.settings import own_file_hash
from examples.study import design, rates, results
from examples.study import run as study_run
from examples.study.__main__ import main
from examples.study.design import Task
from examples.study.errors import StudyError
from tests.study.toys import TINY, TOY, table, tiny


def test_a_smoke_run_ends_in_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.study.__main__.SMOKE", TOY)
    arguments = ["--smoke", "--only", "main", "--settings", "opd", "mix", "--seeds", "0", "--workers", "1"]
    assert main([*arguments, "--work", str(tmp_path)]) == 0
    text = (tmp_path / "smoke" / "study.md").read_text()
    assert "2 results, made at " in text
    levels = table(text, "setting")
    assert levels["mix"]["gate fraction"] == "1.000", "its gate is open everywhere"
    assert levels["opd"]["tokens (k)"] == "18"
    assert table(text, "against opd, in pairs")["mix"]["seeds"] == "1"
    assert not (tmp_path / "smoke" / "store-seed0").exists()


def test_a_killed_run_goes_on_after_its_last_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = tiny("gate")
    (task,) = rates.tasks_of(experiment, experiment.setting("random"), {"eopd-0.8": 2e-4}, (100,))
    sweep = study_run._sweep

    def killed(opened: Run, round_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study_run, "_sweep", killed)
    with pytest.raises(KeyboardInterrupt):
        study_run.run(task, tmp_path, tmp_path / "results")
    monkeypatch.setattr(study_run, "_sweep", sweep)
    rounds = tmp_path / "runs" / "gate.random-seed100" / "rounds.jsonl"
    rows = [json.loads(line) for line in rounds.read_text().splitlines()]
    before = {"cpu_seconds": 1000.0}
    next(row for row in rows if "seconds" in row).update(
        commit="c0ffee", **before
    )  # as by a process at another commit, and slower
    rounds.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = study_run.run(task, tmp_path, tmp_path / "results")
    content = json.loads(path.read_text())
    cost = content["cost"]
    assert cost["resumed_at_round"] == 1
    assert cost["responses"] == TINY.responses
    assert cost["seconds"] > sum(cost["stage_seconds"].values()) > 0
    assert cost["cpu_seconds"] > before["cpu_seconds"], "of both processes"
    assert cost["shared"] == []
    assert content["made"]["commits"] == sorted({"c0ffee", study_run.commit()})
    result = results.read(task, tmp_path / "results")
    assert result is not None
    assert content["inputs"]["objective"] == own_file_hash(str(design.HERE / "gates.py:random_gate"))
    assert str(design.HERE) not in path.read_text(), "a result says nothing of this machine's folders"
    assert result.correct.shape == result.distinct.shape == (TOY.problems,)
    assert (result.distinct <= result.correct).all()
    assert result.correct.mean() / 8 == pytest.approx(content["metrics"]["avg_at_k"])
    assert 0 < content["alignment"]["own"]["all"]["fkl"] < 2
    gates = content["training"]["gate_fraction"]
    assert 0.05 < sum(gates) / len(gates) < 0.35  # as many as the entropy gate has
    (second,) = rates.tasks_of(experiment, experiment.setting("proxy-4"), {"eopd-0.8": 2e-4}, (100,))
    study_run.run(second, tmp_path, tmp_path / "results")
    assert results.read(second, tmp_path / "results") is not None, "its round 0 was made by the first"
    left = {path.parent.name for path in tmp_path.glob("store-seed100/*/*/part-00000.json")}
    assert len(left) == 1, "the rollouts of round 0 stay for the other settings, nothing else does"
    other = dataclasses.replace(task, lr=3e-4)
    with pytest.raises(StudyError, match=rf"random-seed100.json is a .*{task.key}.* than gate/random.*{other.key}"):
        results.read(other, tmp_path / "results")


def test_what_was_made_for_another_setting_is_not_paid_for_again(tmp_path: Path) -> None:
    experiment = tiny("staleness")
    first, second = (
        Task(experiment, experiment.setting(name), 100, 5e-5) for name in ("old-ppo-once", "old-none-once")
    )
    costs = [
        json.loads(study_run.run(task, tmp_path, tmp_path / "results").read_text())["cost"] for task in (first, second)
    ]
    assert [cost["shared"] for cost in costs] == [[], ["rollout", "score"]]
    assert costs[1]["tokens"] == costs[0]["tokens"] > 0
    assert "rollout" in costs[0]["stage_seconds"]
    assert "rollout" not in costs[1]["stage_seconds"]


def test_a_cost_that_a_killed_process_did_not_write_down_is_not_said_to_be_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny("staleness")
    task = Task(experiment, experiment.setting("old-none-once"), 100, 5e-5)
    execute = study_run.execute

    def killed_after_scoring(opened: Run, job: Job) -> bool:
        made = execute(opened, job)
        if job.stage.name == "score":
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(study_run, "execute", killed_after_scoring)
    with pytest.raises(KeyboardInterrupt):
        study_run.run(task, tmp_path, tmp_path / "results")
    monkeypatch.setattr(study_run, "execute", execute)
    with (tmp_path / "runs" / "staleness.old-none-once-seed100" / "rounds.jsonl").open("a") as file:
        file.write('{"round": 0, "sta')  # a write cut short
    cost = json.loads(study_run.run(task, tmp_path, tmp_path / "results").read_text())["cost"]
    assert cost["shared"] is None, "not known, as what scoring cost is not"
    assert cost["responses"] == TINY.responses
    assert cost["score_bytes"] > 0
