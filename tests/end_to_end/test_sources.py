"""Runs whose responses the student does not write alone, from the command to the report; kills during the new job."""

from __future__ import annotations

import json
from typing import Any

import pytest

from eopd.storage import listing
from eopd.storage.rollouts import Writer, read_rollouts
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
    found: set[int] = set()
    for kind, key in listing.keys(world.store(name)):
        if kind == "rollouts":
            artifact = listing.find(world.store(name), f"{kind}/{key}")
            for part in artifact.committed():
                for row in read_rollouts(artifact.part_folder(part), ["written"]).to_pylist():
                    found |= set(row["written"])
    return found


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
