"""The study of five objectives: one scoring answers all of them, the plan shows it once, and a run makes it once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from eopd.pipeline.config import ConfigError, load_sweep
from eopd.stages.train.objectives.registry import make_objective
from eopd.storage.coverage import Coverage, HeadNeed
from tests.end_to_end.conftest import eopd
from tests.raises import raises

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "countdown"
STUDY, SWEEP = str(FOLDER / "study.yaml"), str(FOLDER / "objectives.yaml")
TOY = [
    *("rollout.prompts_per_round=16", "rollout.rows_per_part=8", "rollout.engine=transformers"),
    *("score.engine=transformers", "train.epochs=1", "train.batch_responses=16", "evaluate=null"),
]


def arguments(tmp_path: Path, *more: str) -> list[str]:
    changes = [*TOY, f"store={tmp_path / 'store'}", f"runs={tmp_path / 'runs'}", *more]
    return [STUDY, "--sweep", SWEEP, *(word for change in changes for word in ("--set", change))]


def test_its_coverage_answers_every_objective() -> None:
    runs = load_sweep(STUDY, SWEEP)
    assert [run.train.objective.name for run in runs] == ["opd", "eopd", "eopd", "fkl", "tropd"]
    assert [run.train.objective.tau for run in runs if run.train.objective.name == "eopd"] == [0.4, 0.8]
    needs = [make_objective(run.train.objective).needs for run in runs]
    assert any(isinstance(need, HeadNeed) and need.k == 64 for need in needs[-1])
    for run, asked in zip(runs, needs, strict=True):
        Coverage(run.score.head.rule()).require(asked, run.name)


def test_it_is_planned_and_made_once(tmp_path: Path) -> None:
    plan = json.loads(eopd("plan", *arguments(tmp_path), "--json").stdout)
    stages = [job["stage"] for job in plan["jobs"]]
    assert {stage: stages.count(stage) for stage in stages} == {"rollout": 1, "score": 1, "train": 5}
    assert plan["planned_jobs"] == 15
    scoring = next(job for job in plan["jobs"] if job["stage"] == "score")
    assert scoring["runs"] == [f"study-{name}" for name in ("opd", "eopd-0.4", "eopd-0.8", "fkl", "tropd")]

    eopd("run", *arguments(tmp_path))
    store = tmp_path / "store"
    assert len(list(store.glob("scores/*/*/manifest.json"))) == 1
    assert len(list(store.glob("rollouts/*/manifest.json"))) == 1
    assert len(list(store.glob("checkpoints/*/manifest.json"))) == 5
    done = [(path.parent.name, line) for path in tmp_path.glob("runs/*/jobs.jsonl") for line in read(path)]
    assert [run for run, line in done if line["stage"] in ("rollout", "score")] == ["study-opd"] * 2
    assert sorted(run for run, line in done if line["stage"] == "train") == sorted(scoring["runs"])
    for run in scoring["runs"]:
        assert (tmp_path / "runs" / run / "report" / "index.html").exists()

    after = eopd("plan", *arguments(tmp_path))
    assert after.stdout.count("complete") == 7
    assert "Nothing is left to do" in after.stdout
    alone = eopd("plan", *arguments(tmp_path)[:1], *arguments(tmp_path)[3:], "--set", "name=sixth")
    assert len(re.findall(r" (?:rollout|score) +shared +2/2 ", alone.stdout)) == 2


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "words", "setting"),
    [
        ("sweep: []", "`sweep:`", None),
        ("other: 1", "`sweep:`", None),
        ("sweep: [{seed: 1}]", "entry 1", None),
        ("sweep: [{name: a}, {name: a}]", "entry 2", "name"),
        ("sweep: [{name: a, store: x}]", "entry 1", "store"),
        ("sweep: [{name: a, read_only_stores: [x]}]", "entry 1", "read_only_stores"),
        ("sweep: [{name: a, sed: 1}]", "Did you mean seed?", "sed"),
        ("sweep: [{name: a/b}]", "entry 1", "name"),
    ],
)
def test_a_wrong_sweep_is_named(tmp_path: Path, text: str, words: str, setting: str | None) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with raises(ConfigError, re.escape(words), file=path, setting=setting):
        load_sweep(STUDY, str(path))


def test_a_sweep_that_is_not_there_is_named() -> None:
    with raises(ConfigError, file="nowhere.yaml"):
        load_sweep(STUDY, "nowhere.yaml")
