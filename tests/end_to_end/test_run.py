"""Every stage on real files: in order, alone, twice, and what it leaves."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eopd.pipeline.config import load_config
from eopd.pipeline.run import open_run
from eopd.pipeline.tasks import Task
from tests.end_to_end.conftest import World, checksums, commit_times, eopd
from tests.end_to_end.world import environment


def test_a_run_leaves_a_report_and_a_summary(world: World, undisturbed: str) -> None:
    folder = world.runs(undisturbed)
    page = (folder / "report" / "index.html").read_text()
    assert undisturbed in page
    rows = json.loads((folder / "summary.json").read_text())["rounds"]
    assert [row["round"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert 0 <= row["avg_at_2"] <= row["pass_at_2"] <= 1
        for figure in ("student_entropy", "gate_fraction", "rkl", "fkl"):
            assert row[figure] is None if row["round"] == 2 else math.isfinite(row[figure]), (row["round"], figure)
    for row in rows[:2]:
        assert 0 <= row["gate_fraction"] <= 1
        assert row["student_entropy"] > 0
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["round"], row["step"]) for row in steps] == [(r, s) for r in range(2) for s in range(8)]
    assert list((folder / "tensorboard").glob("events*"))
    jobs = [json.loads(line) for line in (folder / "jobs.jsonl").read_text().splitlines()]
    assert [(job["stage"], job["round"]) for job in jobs][:5] == [
        ("evaluate", 0),
        ("evaluation_summary", 0),
        ("rollout", 0),
        ("score", 0),
        ("train", 0),
    ]


def test_a_second_run_does_nothing(world: World, undisturbed: str) -> None:
    before = commit_times(world.store(undisturbed))
    result = eopd("run", world.config(undisturbed))
    assert commit_times(world.store(undisturbed)) == before
    assert result.stderr.count("complete already") == 12


def test_each_stage_alone_gives_the_same_artifacts(world: World, undisturbed: str) -> None:
    """Stage by stage, each in its own process, scoring in shares, under another store and run name."""
    config = world.config("alone")
    for round_ in (0, 1):
        eopd("rollout", config, "--round", round_)
        eopd("score", config, "--round", round_, "--parts", "2/2")
        eopd("score", config, "--round", round_, "--parts", "1/2")
        eopd("train", config, "--round", round_)
        eopd("evaluate", config, "--round", round_)
    eopd("evaluate", config, "--round", 2)
    assert checksums(world.store("alone")) == checksums(world.store(undisturbed))


def test_the_checkpoint_loads_as_it_is(world: World, undisturbed: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = [path.parent for path in world.store(undisturbed).glob("checkpoints/*/part-00000.*/model.safetensors")]
    assert len(folders) == 2
    first = AutoModelForCausalLM.from_pretrained(world.folder / "student")
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
        moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), first.parameters(), strict=True)]
        assert all(moved)


def test_two_experiments_share_what_is_the_same(world: World, undisturbed: str) -> None:
    """Another objective on the same store: rollouts and scores of round 0 are found, not made."""
    store = world.folder / "shared" / "store"
    shutil.copytree(world.store(undisturbed), store)  # a store is a folder: a copy is as good
    config = world.config("other", store=str(store), rounds=1, train={"objective": {"name": "opd"}})
    before = commit_times(store)
    result = eopd("run", config)
    for stage in ("rollout 0", "score 0", "evaluate 0", "evaluation_summary 0"):
        assert f"{stage}: complete already" in result.stderr
    made = set(commit_times(store)) - set(before)
    assert {name.split("/")[0] for name in made} == {"checkpoints", "evaluations", "evaluation_summaries"}
    assert {name: time for name, time in commit_times(store).items() if name in before} == before


def test_a_late_policy_samples_what_a_newer_student_trains_on(world: World) -> None:
    """lag: 1. Round 1 is sampled from the first student, and trained by the one that round 0 made."""
    result = eopd("run", world.config("late", lag=1, evaluate=None))
    plan = json.loads(eopd("plan", world.config("late", lag=1, evaluate=None), "--json").stdout)
    assert {job["state"] for job in plan["jobs"]} == {"complete"}
    policies = {
        json.loads(path.read_text())["inputs"]["policy"]
        for path in world.store("late").glob("rollouts/*/identity.json")
    }
    assert len(policies) == 1
    assert "train 1: the policy that sampled is 1 rounds old" in result.stderr
    assert "train 0: the policy that sampled" not in result.stderr


def test_a_share_of_few_parts_may_be_empty(world: World) -> None:
    """Eight machines and three parts: five of them have nothing to do, which does not mean that all is done."""
    said = eopd("rollout", world.config("shares"), "--parts", "5/8").stderr
    assert said == "rollout 0: share 5/8 is empty, as there are only 3 parts\n"
    assert not (world.runs("shares") / "config.yaml").exists()


def test_plan_changes_nothing_and_tells_what_is_there(world: World, undisturbed: str) -> None:
    result = eopd("plan", world.config("planned"))
    assert len(re.findall(r" missing +0/", result.stdout)) == 12
    assert not world.store("planned").joinpath("rollouts").exists()
    result = eopd("plan", world.config(undisturbed))
    assert len(re.findall(r" complete\b", result.stdout)) == 12


def test_a_stage_without_its_input_says_what_makes_it(world: World) -> None:
    result = eopd("score", world.config("early"), check=False)
    assert result.returncode == 1
    assert "Run `eopd rollout CONFIG --round 0` first" in result.stderr
    assert "Traceback" not in result.stderr


def test_scores_that_training_could_not_read_are_not_made(world: World) -> None:
    """The rollouts are there already: nothing but the teacher's work would come before training's own refusal."""
    config = world.config("unread")
    eopd("rollout", config)
    result = eopd("run", config, "--set", "train.objective={name: tropd}", check=False)
    assert result.returncode == 1
    assert "they lack heads of 64 entries (it keeps 16)" in result.stderr
    assert not world.store("unread").joinpath("scores").exists()


@pytest.mark.parametrize("debug", ["", "1"])
def test_a_workers_log_says_why_its_task_failed(world: World, tmp_path: Path, debug: str) -> None:
    log = tmp_path / "score-0.log"
    config = world.config("unscored")
    eopd("rollout", config, "--parts", "0")  # writes the resolved config that workers read
    run = open_run(load_config(str(config)))
    task = Task(run, run.plan.job("score", 0), (1,))
    command = [sys.executable, "-m", "eopd.pipeline.worker", task.to_json(log=log)]
    result = subprocess.run(command, env={**environment(), "EOPD_DEBUG": debug}, capture_output=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (1, b"", b"")
    last = log.read_text().splitlines()[-1]
    assert last.startswith("eopd.pipeline.errors.RunError: score 0 needs" if debug else "eopd: score 0 needs")
    assert ("Traceback" in log.read_text()) == bool(debug)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": {"path": "/nowhere/x.jsonl"}}, "/nowhere/x.jsonl"),
        ({"student": {"path": "/nowhere/model"}}, "there is no folder /nowhere/model"),
        ({"teacher": {"path": "Some/Model-8B"}}, "hf download Some/Model-8B"),
    ],
)
def test_missing_inputs_are_named_before_heavy_work(world: World, changes: dict[str, object], words: str) -> None:
    result = eopd("run", world.config("missing", **changes), check=False)
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_teacher_that_lost_a_tensor_is_refused_before_work(world: World, tmp_path: Path) -> None:
    teacher = shutil.copytree(world.folder / "teacher", tmp_path / "teacher")
    weights = load_file(teacher / "model.safetensors")
    lost = next(name for name in weights if name.endswith("1.mlp.down_proj.weight"))
    save_file({name: value for name, value in weights.items() if name != lost}, teacher / "model.safetensors")
    config = world.config("lost", teacher={"path": str(teacher)}, launcher={"kind": "local"})
    result = eopd("run", config, check=False)
    assert result.returncode == 1
    assert f"teacher.path: {teacher}" in result.stderr
    assert f"{lost} is missing" in result.stderr
    assert checksums(world.store("lost")) == {}


def test_wrong_weights_under_the_rollouts_stop_training(world: World, undisturbed: str, tmp_path: Path) -> None:
    """Sampler and trainer must mean the same policy: here the trainer's temperature is not the sampler's."""
    from dataclasses import replace

    from eopd.stages.engines.kept import Engines
    from eopd.stages.train.failures import TrainingStopped
    from eopd.stages.train.run import run
    from eopd.stages.train.stage import train_job
    from eopd.storage.artifacts import Artifact
    from eopd.storage.identity import Identity

    planned = open_run(load_config(str(world.config(undisturbed))))
    job = train_job(planned.context(planned.plan.job("train", 0), [0, 1], Engines()))
    elsewhere = Artifact(tmp_path, Identity("checkpoints", 1, 2))
    states = Artifact(tmp_path, Identity("progress", 1, 10))
    with pytest.raises(TrainingStopped, match="sampler's log-probs and the trainer's differ by"):
        run(replace(job, output=elsewhere, progress_states=states, temperature=0.25, run_dir=tmp_path))
    assert not elsewhere.committed()


@pytest.mark.slow
def test_parts_whose_prompts_are_all_too_long_read_as_no_responses(world: World) -> None:
    """Every second prompt is skipped, and a part has one prompt: in a run, its report, and what `eopd store` prints."""
    problems = world.folder / "every-second-is-long.jsonl"
    rows = [json.loads(line) for line in (world.folder / "problems.jsonl").read_text().splitlines()[:8]]
    for row in rows[1::2]:
        row["problem"] *= 12
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = world.config(
        "skipped",
        rounds=1,
        prompts={"path": str(problems), "max_prompt_tokens": 60},
        rollout={"prompts_per_round": 8, "rows_per_part": 1, "student_topk": 2},
        evaluate={
            "benchmarks": [{"name": "own", "path": str(problems), "verifier": "exact"}],
            "rows_per_part": 1,
            "alignment": {},
        },
    )
    eopd("run", config)
    store = world.store("skipped")
    (scores,) = store.glob("scores/*/*")
    markers = [json.loads(path.read_text()) for path in sorted(scores.glob("part-*.json"))]
    sizes = [marker["info"]["responses"] for marker in markers]
    assert sizes.count(0) == 4
    tokens = sum(marker["info"]["tokens"] for marker in markers)
    (training,) = store.glob("checkpoints/*/part-*/training.json")
    assert json.loads(training.read_text())["responses"] == sum(sizes) == 8
    for verb in ("stats", "export"):
        to = [world.folder / "skipped.parquet"] if verb == "export" else []
        told = eopd("store", verb, scores.relative_to(store), *to, "--store", store).stdout
        assert f"{tokens:,} tokens" in told
    assert "complete already" in eopd("run", config).stderr
