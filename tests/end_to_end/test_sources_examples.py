"""The examples of who writes the responses: they load, share what they say they share, and run at small size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from eopd.pipeline.config import load_config
from eopd.pipeline.run import open_run
from examples.sources.__main__ import EXAMPLES, HERE, figures, runs, table
from examples.sources.data import LIMIT, PROBLEMS, solved

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = {
    "rollout.prompts_per_round": 12,
    "rollout.rows_per_part": 8,
    "train.batch_responses": 4,
    "evaluate.benchmarks": json.dumps(
        [
            {
                "name": "countdown",
                "path": str(PROBLEMS.with_name("evaluate.jsonl")),
                "verifier": "countdown",
                "limit": 6,
            }
        ]
    ),
}


def test_solutions_are_right_and_drawn_once() -> None:
    from eopd.stages.verifiers.countdown import verify

    rows = list(solved(PROBLEMS, 40))
    assert 30 <= len(rows) <= 40
    assert rows == list(solved(PROBLEMS, 40))
    assert all(verify(row["response"], row["answer"]).correct for row in rows)
    assert all(int(step.split("=")[1]) <= LIMIT for row in rows for step in row["response"].split(","))


def test_variants_share_the_teacher_s_answers_and_scores(tmp_path: Path) -> None:
    places = [f"store={tmp_path / 'store'}", f"runs={tmp_path / 'runs'}"]

    def keys(example: str, number: int, stage: str) -> set[str]:
        changes = [
            f"{group}.{name}={json.dumps(value)}"
            for group, values in EXAMPLES[example][number].changes.items()
            for name, value in values.items()
        ]
        run = open_run(load_config(str(HERE / f"{example}.yaml"), [*places, *changes]))
        return {job.output.key for job in run.plan.jobs if job.stage.name == stage}

    assert keys("best_of_n", 0, "rollout") == keys("best_of_n", 1, "rollout") != set()
    assert keys("guidance", 0, "guide") == keys("guidance", 2, "guide") != set()
    assert keys("guidance", 1, "guide") == set()
    assert keys("guidance", 0, "rollout") & keys("guidance", 2, "rollout")  # round 0: no objective has acted yet


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif("EOPD_EXAMPLES" not in os.environ, reason="runs 12 small experiments; .ci/run sets EOPD_EXAMPLES")
@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_and_its_controls_run_at_small_size(tmp_path: Path, example: str) -> None:
    changes = {**SMALL, **({"rounds": 2, "evaluate.every": 2} if example == "guidance" else {})}
    overrides = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "examples.sources", "--only", example, "--seeds", "1", "--out", str(tmp_path)]
    done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(variant.name in done.stdout for variant in EXAMPLES[example])
    assert table(example, 1, tmp_path) in done.stdout
    before, after = figures(example, 0, 0, tmp_path)
    assert before["round"] == 0 < after["round"]
    sweep = yaml.safe_load((tmp_path / f"{example}.yaml").read_text())["sweep"]
    assert sweep == list(runs(example, 1))
