"""Whole runs whose teacher is the student itself, shown the answer; and a phase that goes on from another run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eopd.pipeline.config import find_config, load_config
from eopd.pipeline.run import Run, open_run
from eopd.storage.records import read_rollouts
from eopd.storage.teacher_cache import TeacherCache
from tests.end_to_end.conftest import World, checksums, eopd
from tests.end_to_end.world import start

SHOWN: dict[str, Any] = {"score": {"teacher_prompt": {"opening": "The answer is {{answer}}. "}}}


def self_taught(world: World, name: str, teacher: dict[str, Any], **changes: Any) -> Path:
    return world.config(
        name, **{"rounds": 1, "evaluate": None, "teacher": {"path": None, **teacher}, **SHOWN, **changes}
    )


def opened(path: Path) -> Run:
    return open_run(load_config(str(path)))


def test_a_run_and_the_phase_that_follows_it(world: World) -> None:
    first = self_taught(world, "self-taught", {"student": "initial"})
    shared = {"store": str(world.store("self-taught")), "student": {"path": None, "run": str(first)}}
    second = self_taught(world, "next-phase", {"student": "initial"}, **shared)
    planned = opened(second).plan.job("rollout", 0).output
    refused = eopd("run", second, check=False)
    assert refused.returncode != 0
    assert "student.run: student 1 of the run self-taught" in refused.stderr
    eopd("run", first)
    run = opened(first)
    rows = read_rollouts(run.artifact(run.plan.job("rollout", 0).output).part_folder(0))
    cache = TeacherCache(run.artifact(run.plan.job("score", 0).output))
    assert json.loads(cache.header(0).teacher_context)["placeholders"] == ["answer"]
    sampled = np.concatenate([np.asarray(logprobs) for logprobs in rows.column("logprobs").to_pylist()])
    scored = cache.read_part(0).sampled_logprob
    assert np.abs(sampled - scored).max() > 0.05, "the same weights, shown the answer, say something else"
    eopd("run", second)
    after = opened(second)
    assert after.plan.job("rollout", 0).output == planned
    assert all(after.is_done(job) for job in after.plan.jobs)
    assert planned.inputs["policy"] == run.plan.job("train", 0).output.key
    lines = eopd("student", second, "--round", 0).stdout
    assert run.plan.job("train", 0).output.key in lines


@pytest.mark.slow
def test_scoring_with_a_trained_self_teacher_is_killed_and_ends_the_same(world: World, tmp_path: Path) -> None:
    latest = {"student": "latest", "renewed": 1}
    verdicts = {"right": "Right. Again: ", "wrong": "Wrong. Better: "}
    changes: dict[str, Any] = {
        "rounds": 2,
        "prompts": {"verifier": "exact"},
        "score": {"teacher_prompt": {"opening": "{{response}}\n{{verdict}}", "verdicts": verdicts}},
    }
    whole, killed = (self_taught(world, name, latest, **changes) for name in ("self-whole", "self-killed"))
    eopd("run", whole)
    for stage in ("rollout", "judge", "score", "train"):
        eopd(stage, killed)
    missing = eopd("score", killed, "--round", 1, check=False)
    assert missing.returncode != 0
    for stage in ("rollout", "judge"):
        eopd(stage, killed, "--round", 1)
    run = opened(killed)
    scores = run.artifact(run.plan.job("score", 1).output)
    process = start(tmp_path, "score", killed, "--round", 1)
    while process.is_alive() and not scores.committed():
        time.sleep(0.002)
    process.kill()
    process.join()
    eopd("run", killed)
    assert checksums(world.store("self-killed")) == checksums(world.store("self-whole"))


def test_the_opsd_preset_runs_at_small_size(world: World, tmp_path: Path) -> None:
    problems = [json.loads(line) for line in (world.folder / "problems.jsonl").read_text().splitlines()]
    solved = tmp_path / "solved.jsonl"
    solved.write_text("".join(json.dumps({**one, "solution": f"It is {one['answer']}."}) + "\n" for one in problems))
    config = tmp_path / "opsd.yaml"
    changes = {
        "extends": str(find_config("paper/opsd-qwen3-4b").resolve()),
        "rounds": 1,
        "store": str(tmp_path / "store"),
        "runs": str(tmp_path / "runs"),
        "student": {"path": str(world.folder / "teacher"), "dtype": "float32"},
        "prompts": {"path": str(solved)},
        "rollout": {"prompts_per_round": 4, "max_new_tokens": 8, "engine": "transformers"},
        "score": {"engine": "transformers"},
        "train": {"batch_responses": 4, "lora": {"rank": 2}, "autocast": "no", "device": "cpu"},
        "evaluate": None,
        "launcher": {"kind": "inline"},
    }
    config.write_text(json.dumps(changes))
    eopd("run", config)
    run = opened(config)
    cache = TeacherCache(run.artifact(run.plan.job("score", 0).output))
    assert cache.header(0).teacher == run.facts.student.fingerprint
    assert json.loads(cache.header(0).teacher_context)["placeholders"] == ["solution"]
