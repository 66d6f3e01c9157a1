"""The paper's evaluation as a preset: six benchmarks, eight samples at T 1.0 and top-p 0.8, on a random tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from eopd.pipeline.config import load_config
from eopd.stages.models.prompts import load_prompts, render_prompt
from eopd.storage import records as evaluations
from tests.end_to_end.conftest import World, eopd
from tests.stages.tiny_tokenizer import tiny_tokenizer

BENCHMARKS = Path(__file__).resolve().parents[3] / "shared" / "data" / "benchmarks"
SIX = {"math500", "amc23", "minerva_math", "olympiadbench", "aime24", "aime25"}


def test_the_papers_prompts_are_separated_from_what_they_ask_for(tmp_path: Path) -> None:
    """A suffix is put after the problem as it is: without a separator of its own it would run into the last word."""
    problem = "How long was Aya in the coffee shop."
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"id": "a", "problem": problem, "answer": "204"}) + "\n")
    preset = load_config("paper/qwen3-0.6b")
    assert preset.evaluate is not None
    benchmark = preset.evaluate.benchmarks[0].model_copy(update={"path": str(path)})
    tokenizer = tiny_tokenizer()
    rendered = [
        tokenizer.decode(render_prompt(tokenizer, load_prompts(settings)[0], settings))
        for settings in (preset.prompts.model_copy(update={"path": str(path)}), preset.evaluate.prompts_of(benchmark))
    ]
    assert rendered == [
        f"{problem} Let's think step by step and output the final answer within \\boxed{{}}.",
        f"{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
    ]


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks are not beside this checkout (../shared/data)")
def test_the_papers_evaluation_runs_and_says_all_it_was_made_with(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the preset's own paths, which are relative to the folder that eopd is started in."""
    preset = load_config("paper/qwen3-0.6b").evaluate
    assert preset is not None
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "benchmarks").symlink_to(BENCHMARKS)
    monkeypatch.chdir(tmp_path)
    asked = [{"name": one.name, "path": one.path, "limit": 2} for one in preset.benchmarks]
    config = tmp_path / "paper.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "extends": str(Path(load_config.__code__.co_filename).parents[1] / "configs/paper/qwen3-0.6b.yaml"),
                "store": str(tmp_path / "store"),
                "runs": str(tmp_path / "runs"),
                "student": {"path": str(world.folder / "student"), "dtype": "float32"},
                "teacher": {"path": str(world.folder / "teacher"), "dtype": "float32"},
                "prompts": {"path": str(world.folder / "problems.jsonl")},
                "evaluate": {"benchmarks": asked, "max_new_tokens": 12, "engine": "transformers", "resamples": 100},
                "launcher": {"kind": "inline"},
            }
        )
    )
    eopd("evaluate", config)
    (summary,) = (tmp_path / "store" / "evaluation_summaries").glob("*/part-*/results.json")
    values = json.loads(summary.read_text())
    assert set(values["benchmarks"]) == SIX
    settings = values["settings"]
    assert (settings["samples"], settings["temperature"], settings["top_p"]) == (8, 1.0, 0.8)
    assert settings["suffix"] == "\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert settings["template"] == "plain"
    assert all(one["verifier"] == "math" for one in settings["benchmarks"])
    for one in values["benchmarks"].values():
        assert (one["problems"], one["samples"]) == (2, 8)
        assert set(one["pass_at_k"]) == {str(k) for k in range(1, 9)}
        assert one["stop_rate"] + one["truncation_rate"] == pytest.approx(1.0)
        assert one["token_entropy"] > 0
        assert one["self_bleu"] is not None
    assert values["model"]["fingerprint"]
    assert len([name for name in values["artifact"]["inputs"] if name.startswith("benchmark ")]) == 6
    samples = next((tmp_path / "store" / "evaluations").glob("*/part-00000.*/samples.parquet"))
    table = evaluations.SAMPLES.read(samples.parent)
    assert table.num_rows == 16
    eopd("align", config)
    (aligned,) = (tmp_path / "store" / "alignment_summaries").glob("*/part-*/alignment.json")
    own = json.loads(aligned.read_text())["responses"]["own"]
    assert (own["tau"], own["problems"]) == (0.8, 12)
