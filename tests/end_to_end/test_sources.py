"""Runs whose responses the student does not write alone, from the command to the report; kills during the new job."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eopd.pipeline.config import find_config, load_config
from eopd.pipeline.run import Run, open_run
from eopd.storage import listing
from eopd.storage.records import Writer, read_rollouts
from eopd.storage.teacher_cache import TeacherCache
from tests.end_to_end.conftest import World, checksums, eopd
from tests.end_to_end.test_kills import start

PREFIX: dict[str, Any] = {
    "rollout": {"source": "prefix", "prefix": {"over": "responses"}},
    "train": {"objective": {"name": "opd"}, "max_logprob_gap": 1.0},
    "rounds": 1,
    "evaluate": None,
}


def writers(world: World, name: str) -> set[int]:
    """Writers of the tokens of all rollouts of a run."""
    names: set[int] = set()
    for kind, key in listing.keys(world.store(name)):
        if kind == "rollouts":
            artifact = listing.find(world.store(name), f"{kind}/{key}")
            for part in artifact.committed():
                for row in read_rollouts(artifact.part_folder(part), ["written"]).to_pylist():
                    names |= set(row["written"])
    return names


@pytest.mark.parametrize("objective", ["sft", "fkl"])
def test_responses_that_come_with_their_prompts(world: World, objective: str) -> None:
    problems = [json.loads(line) for line in (world.folder / "problems.jsonl").read_text().splitlines()]
    path = world.folder / "responses.jsonl"
    path.write_text("".join(json.dumps({**problem, "response": problem["answer"]}) + "\n" for problem in problems))
    name = f"data-{objective}"
    config = world.config(
        name,
        prompts={
            "path": str(path),
            "columns": {"id": "id", "prompt": "problem", "answer": "answer", "response": "response"},
        },
        rollout={"source": "data", "samples_per_prompt": 1},
        train={"objective": {"name": objective}},
        rounds=1,
    )
    eopd("run", config)
    assert writers(world, name) == {Writer.DATA}
    kinds = {kind for kind, _ in listing.keys(world.store(name))}
    assert ("scores" in kinds) == (objective != "sft")
    assert (world.runs(name) / "report" / "index.html").exists()


@pytest.fixture(scope="module")
def exported(world: World) -> Path:
    """Sequences with the teacher's top-k lists, as the run `captured` stored and exported them."""
    config = world.config(
        "captured",
        rounds=1,
        evaluate=None,
        rollout={"samples_per_prompt": 1, "prompts_per_round": 24},
        score={"head": {"k_max": 6, "full_head_above": -1, "draws": "none"}},
        train={"objective": {"name": "fkl"}},
    )
    eopd("run", config)
    path, store = world.folder / "captured.parquet", world.store("captured")
    eopd("store", "export", "scores/", path, "--format", "axolotl", "--store", store)
    return path


def heads(world: World, name: str) -> dict[tuple[int, ...], tuple[list[int], list[float]]]:
    """Head ids and log-probs that a run stored, by the ids of prompt and response."""
    store = world.store(name)
    scores, rollouts = (listing.find(store, f"{kind}/") for kind in ("scores", "rollouts"))
    cache, result = TeacherCache(scores), {}
    for part in sorted(scores.committed()):
        columns = ["prompt_token_ids", "response_token_ids"]
        for row, ids in enumerate(read_rollouts(rollouts.part_folder(part), columns).to_pylist()):
            rows = cache.read([(part, row)])
            result[(*ids["prompt_token_ids"], *ids["response_token_ids"])] = (
                rows.head_ids.tolist(),
                rows.head_logprobs.tolist(),
            )
    return result


@pytest.mark.parametrize("form", ["axolotl", "distillkit"])
def test_a_run_trains_on_what_another_tool_captured(world: World, exported: Path, form: str) -> None:
    path = exported
    if form == "distillkit":
        table, path = pq.read_table(exported), world.folder / "distillkit.parquet"
        lists = {"top_indices": table["target_token_ids"], "top_values": table["target_logprobs"]}
        pq.write_table(pa.table({"input_ids": table["input_ids"], "labels": table["labels"], **lists}), path)
    name = f"on-{form}"
    columns = {"prompt": "input_ids", "response": "input_ids", "labels": "labels"}
    config = world.config(
        name,
        rounds=1,
        teacher={"path": None, "capture": str(path)},
        prompts={"path": str(path), "columns": columns, "suffix": ""},
        rollout={"source": "data", "samples_per_prompt": 1, "prompts_per_round": 24},
        score={"teacher_prompt": {}},
        train={"objective": {"name": "fkl"}},
        evaluate=None,
    )
    eopd("run", config)
    assert writers(world, name) == {Writer.DATA}
    ours, theirs = heads(world, name), heads(world, "captured")
    assert ours.keys() == theirs.keys()
    for sequence, (ids, logprobs) in theirs.items():
        assert ours[sequence][0] == ids
        assert ours[sequence][1] == pytest.approx(logprobs, abs=1e-6)
    assert (world.runs(name) / "report" / "index.html").exists()


@pytest.mark.slow
def test_a_guide_and_its_rollouts_survive_kills(world: World, tmp_path: Any) -> None:
    eopd("run", world.config("prefix-whole", **PREFIX))
    assert writers(world, "prefix-whole") == {Writer.POLICY, Writer.TEACHER}
    config = world.config("prefix-killed", **PREFIX)
    store = world.store("prefix-killed")
    for stage in ("guide", "rollout"):
        before = len(list(store.glob("rollouts/*/part-*.json")))
        process = start(tmp_path, stage, config)
        while process.is_alive() and len(list(store.glob("rollouts/*/part-*.json"))) == before:
            pass
        process.kill()
        process.join()
        eopd(stage, config)
    eopd("run", config)
    assert checksums(store) == checksums(world.store("prefix-whole"))


def preset(world: World, tmp_path: Path, name: str, **changes: Any) -> Run:
    """Run a preset at small size, whose random student answers nothing right: wrong responses are trained on too."""
    problems = [json.loads(line) for line in (world.folder / "problems.jsonl").read_text().splitlines()]
    path = tmp_path / "solved.jsonl"
    path.write_text("".join(json.dumps({**one, "solution": f"It is {one['answer']}."}) + "\n" for one in problems))
    rollout = {"prompts_per_round": 4, "max_new_tokens": 96, "engine": "transformers", **changes.pop("rollout", {})}
    small = {
        "extends": str(find_config(f"paper/{name}").resolve()),
        "store": str(tmp_path / "store"),
        "runs": str(tmp_path / "runs"),
        "prompts": {"path": str(path), "verifier": "exact"},
        "rollout": rollout,
        "score": {"engine": "transformers"},
        "train": {"select": {"verdict": "any"}, "batch_responses": 4, "epochs": 1, "autocast": "no", "device": "cpu"},
        "evaluate": None,
        "launcher": {"kind": "inline"},
    }
    config = tmp_path / f"{name}.yaml"
    config.write_text(json.dumps({**small, **changes}))
    eopd("run", config)
    run = open_run(load_config(str(config)))
    assert all(run.is_done(job) for job in run.plan.jobs)
    return run


def rollouts_of(run: Run) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_rollouts(
        run.artifact(run.plan.job("rollout", 0).output).part_folder(0)
    ).to_pylist()
    return rows


def test_the_mixsd_preset_runs_at_small_size(world: World, tmp_path: Path) -> None:
    student = {"path": str(world.folder / "teacher"), "dtype": "float32"}
    attempts = {"attempts": {"most": 2}}
    run = preset(world, tmp_path, "mixsd-qwen3-1.7b", student=student, rollout={**attempts, "max_new_tokens": 12})
    assert {token for row in rollouts_of(run) for token in row["written"]} == {Writer.POLICY, Writer.EXPERT}
    assert {(row["correct"], row["attempts"]) for row in rollouts_of(run)} == {(False, 2)}
    assert {job.stage.name for job in run.plan.jobs} == {"rollout", "train"}


@pytest.mark.slow
@pytest.mark.skipif("EOPD_EXAMPLES" not in os.environ, reason="runs three phases; .ci/run sets EOPD_EXAMPLES")
def test_the_sd_zero_presets_run_at_small_size_one_after_another(world: World, tmp_path: Path) -> None:
    student = {"path": str(world.folder / "teacher"), "dtype": "float32"}
    revise = {"revise": {"first_tokens": 8}}
    first = preset(world, tmp_path, "sd-zero-1-qwen3-4b", student=student, rollout=revise)
    assert {token for row in rollouts_of(first) for token in row["written"]} == {Writer.POLICY, Writer.TEXT}
    second = preset(world, tmp_path, "sd-zero-2-qwen3-4b", rollout=revise)
    assert second.plan.job("train", 0).output.inputs["student"] == first.plan.job("train", 0).output.key
    third = preset(world, tmp_path, "sd-zero-3-qwen3-4b")
    cache = TeacherCache(third.artifact(third.plan.job("score", 0).output))
    assert sorted(json.loads(cache.header(0).teacher_context)["placeholders"]) == ["response", "verdict"]
    assert cache.header(0).teacher == second.plan.job("train", 0).output.key
