"""The committed demo on real text: random tiny models, 94 GSM8K problems; vLLM where it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.conftest import eopd

ROOT = Path(__file__).resolve().parent.parent.parent
PROBLEMS = ROOT.parent / "shared" / "data" / "gsm8k"


@pytest.mark.skipif(not PROBLEMS.exists(), reason="the GSM8K problems are not beside this checkout (../shared/data)")
def test_every_stage_runs_on_a_pair_of_ones_own(tmp_path: Path) -> None:
    models = tmp_path / "models"
    make = [sys.executable, "-m", "examples.gsm8k.make", "--data", PROBLEMS / "train.jsonl", "--out", models]
    subprocess.run([*map(str, make)], cwd=ROOT, check=True, capture_output=True)
    places = {"student.path": models / "student", "teacher.path": models / "teacher"}
    benchmark = {"name": "gsm8k", "path": str(PROBLEMS / "test.jsonl"), "limit": 30}
    places |= {"prompts.path": PROBLEMS / "train.jsonl", "evaluate.benchmarks": json.dumps([benchmark])}
    places |= {"store": tmp_path / "store", "runs": tmp_path / "runs", "launcher.kind": "inline"}
    overrides = [part for name, value in places.items() for part in ("--set", f"{name}={value}")]
    result = eopd("run", "gsm8k-demo", *overrides)
    for stage in ("rollout 0", "score 0", "train 0", "evaluate 1", "align 1"):
        assert f"{stage}: done in" in result.stderr
    rows = json.loads((tmp_path / "runs" / "gsm8k-demo" / "summary.json").read_text())["rounds"]
    assert rows[0]["gate_fraction"] > 0.9  # a random teacher is unsure of everything
    results = sorted((tmp_path / "store" / "evaluation_summaries").glob("*/part-*/results.json"))
    assert len(results) == 2
    aligned = sorted((tmp_path / "store" / "alignment_summaries").glob("*/part-*/alignment.json"))
    own = json.loads(aligned[0].read_text())["responses"]["own"]
    assert own["all"]["fkl"] > 0
    assert own["teacher_outside"] > 0  # the teacher's vocabulary has more rows
    assert all(json.loads(path.read_text())["benchmarks"]["gsm8k"]["problems"] == 30 for path in results)
