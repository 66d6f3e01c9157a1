"""The attribution example: its bins and benchmarks, its plan, and at small size the whole with bergson."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from eopd.pipeline.config import load_config
from eopd.pipeline.run import open_run
from eopd.stages.attribute.documents import Text
from eopd.stages.attribute.settings import bergson_version
from eopd.stages.verifiers.countdown import verify
from examples.attribution.__main__ import CONFIG, as_changes, places, table, without
from examples.attribution.data import BINS, OPERATORS, documents, last_operator, make
from examples.attribution.unlearn import gradient, unlearn

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"train.epochs": 1, "attribute.min_documents": 4, "evaluate.resamples": 100, "attribute.permutations": 100}


def test_bins_have_equal_sizes_and_right_responses() -> None:
    rows = list(documents(3))
    assert Counter(row["bin"] for row in rows) == dict.fromkeys({row["bin"] for row in rows}, 3)
    assert len(rows) == 3 * BINS
    assert all(verify(row["response"], row["answer"]).correct for row in rows)
    assert all(row["bin"] == f"{last_operator(row['response'])} {row['answer'].count(',') + 1}" for row in rows)
    assert rows == list(documents(3))


def test_a_bin_that_is_left_out_shares_everything_but_the_training(tmp_path: Path) -> None:
    make(tmp_path, 2, 3)
    bins = sorted({json.loads(line)["bin"] for line in (tmp_path / "documents.jsonl").read_text().splitlines()})
    full, part = (
        open_run(load_config(str(CONFIG), places(tmp_path, changes)))
        for changes in ([], as_changes(without(bins, bins[0], 0)))
    )
    keys = {job.name: job.output.key for job in full.plan.jobs}
    shared = {job.name for job in part.plan.jobs if keys.get(job.name) == job.output.key}
    assert shared == {"evaluate 0", "evaluation_summary 0", "rollout 0"}
    assert part.experiment.most_responses(0) == 2 * (BINS - 1)
    assert {job.variant for job in full.plan.of_command("attribute", 1)} == {"", *OPERATORS.values()}


def test_unlearning_raises_the_loss_of_what_is_forgotten() -> None:
    model = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "countdown" / "student")
    forget, retain = [Text("f", [18, 19, 6, 20, 9], 2)], [Text("r", [22, 6, 25, 30], 1), Text("s", [25, 7, 12], 1)]

    def loss(text: Text) -> float:
        ids = torch.tensor([text.ids])
        return float(model(input_ids=ids, labels=torch.tensor([text.labels])).loss.detach())

    assert sum(float((one**2).sum()) for one in gradient(model, retain)) == pytest.approx(1.0, rel=1e-4)
    alone, padded = (gradient(model, texts) for texts in ([retain[1]], [retain[1], Text("none", [18] * 9, 9)]))
    for one, other in zip(alone, padded, strict=True):
        assert torch.allclose(one, other, atol=1e-5), "padding changes nothing"
    before = loss(forget[0]), loss(retain[0])
    unlearn(model, forget, retain, seed=0, steps=5)
    assert loss(forget[0]) > before[0]
    assert loss(retain[0]) < before[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif("EOPD_EXAMPLES" not in os.environ, reason="trains three students; .ci/run sets EOPD_EXAMPLES")
@pytest.mark.skipif(not bergson_version(), reason="bergson is not installed: the extra `attribution` brings it")
def test_the_example_runs_at_small_size(tmp_path: Path) -> None:
    overrides = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "examples.attribution", "--documents", "10", "--seeds", "1", "--query", "plus"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path), *overrides], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (summary,) = tmp_path.glob("store/attribution_summaries/*/part-*/attribution.json")
    results = json.loads(summary.read_text())
    assert table(results) in done.stdout
    assert {row["n"] for row in results["queries"]["plus"]["bins"]} == {10}
    assert "paired by seed" in done.stdout
    assert "attribution" in (tmp_path / "runs" / "attribution" / "report" / "index.html").read_text()
