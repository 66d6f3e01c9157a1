"""A run with two teachers, of which each scores the responses to its own prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eopd.pipeline.config import load_config
from eopd.pipeline.run import Run, open_run
from eopd.storage.records import read_rollouts
from eopd.storage.teacher_cache import JointCache, TeacherCache
from tests.end_to_end.conftest import World, eopd


@pytest.fixture(scope="module")
def prompts(world: World) -> Path:
    """The world's problems, two of three for the teacher called large."""
    path = world.folder / "taught.jsonl"
    problems = [json.loads(line) for line in (world.folder / "problems.jsonl").read_text().splitlines()]
    taught = [{**problem, "by": "own" if n % 3 == 0 else "large"} for n, problem in enumerate(problems)]
    path.write_text("".join(json.dumps(problem) + "\n" for problem in taught))
    return path


def config(world: World, prompts: Path, name: str, **changes: Any) -> Path:
    columns = {"id": "id", "prompt": "problem", "answer": "answer"}
    own = {} if "teacher" in changes else {"teacher": "by"}
    several = {
        "teacher": None,
        "teachers": {"large": {"path": str(world.folder / "teacher")}, "own": {"path": str(world.folder / "student")}},
    }
    return world.config(
        name,
        **{
            "rounds": 1,
            "evaluate": None,
            "score": {"teacher_prompt": {"kind": "same"}},  # a student without a chat template is one of the teachers
            "train": {"objective": {"name": "fkl"}},
            "store": str(world.store("taught")),
            "prompts": {"path": str(prompts), "columns": {**columns, **own}},
            **({} if own == {} else several),
            **changes,
        },
    )


def opened(path: Path) -> Run:
    return open_run(load_config(str(path)))


def test_each_teacher_scores_its_own_prompts(world: World, prompts: Path) -> None:
    path = config(world, prompts, "taught")
    plan = eopd("plan", path).stdout
    assert "score" in plan
    eopd("run", path)
    both = opened(path)
    joint = JointCache([both.artifact(job.output) for job in both.plan.by_teacher("score", 0)])
    alone = {}
    for name, folder in {"large": "teacher", "own": "student"}.items():
        single = config(world, prompts, f"taught-by-{name}", teacher={"path": str(world.folder / folder)})
        eopd("run", single)
        run = opened(single)
        alone[name] = TeacherCache(run.artifact(run.plan.job("score", 0).output))
    rollouts = both.artifact(both.plan.job("rollout", 0).output)
    seen = {"large": 0, "own": 0}
    for part in joint.parts():
        names = [
            int(index) % 3
            for index in read_rollouts(rollouts.part_folder(part), ["prompt_index"]).column(0).to_pylist()
        ]
        for row, rest in enumerate(names):
            name = "own" if rest == 0 else "large"
            scored, expected = joint.read([(part, row)]), alone[name].read([(part, row)])
            assert scored.token_ids.tolist() == expected.token_ids.tolist()
            np.testing.assert_allclose(scored.entropy, expected.entropy, atol=2e-3)
            np.testing.assert_allclose(scored.sampled_logprob, expected.sampled_logprob, atol=2e-2)
            seen[name] += scored.tokens > 0
    assert min(seen.values()) > 0
    checkpoint = both.artifact(both.plan.job("train", 0).output)
    summary = json.loads((checkpoint.part_folder(0) / "training.json").read_text())
    assert summary["responses"] == sum(seen.values())
    page = (world.runs("taught") / "report" / "index.html").read_text()
    assert "score large" in page
    assert "score own" in page
    logged = [json.loads(line) for line in (world.runs("taught") / "jobs.jsonl").read_text().splitlines()]
    assert {line["variant"] for line in logged if line["stage"] == "score"} == {"large", "own"}
    assert "complete already" in eopd("run", path).stderr


def test_a_prompt_of_an_unknown_teacher_is_refused_before_work(world: World, prompts: Path, tmp_path: Path) -> None:
    lines = prompts.read_text().splitlines()
    lines[4] = lines[4].replace('"large"', '"larg"')
    changed = tmp_path / "changed.jsonl"
    changed.write_text("\n".join(lines))
    path = config(world, changed, "unknown-teacher", store=str(tmp_path / "store"), runs=str(tmp_path / "runs"))
    for command in ("plan", "run"):
        refused = eopd(command, path, check=False)
        assert refused.returncode != 0
        assert f"of {changed} line " in refused.stderr
        assert "has the teacher \"larg\" (column 'by'), and teachers names large, own" in refused.stderr
    assert not (tmp_path / "store").exists()
    result = eopd("doctor", config(world, prompts, "doctored")).stdout
    assert "teachers.large" in result
    assert "teachers.own" in result
