"""Predicted memory of the stages, as `eopd plan` and `eopd doctor` show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eopd.pipeline import doctor_inputs
from eopd.pipeline import forecast as memory
from eopd.pipeline.config import load_config, parse_settings
from eopd.pipeline.forecast import Need, lines, models_of, needs, needs_of
from eopd.stages.memory import GIB, ModelSize
from eopd.stages.stage import Models
from tests.pipeline.plan_case import make_facts, make_run
from tests.stages.fake_cuda import QWEN3, qwen3

MODEL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 320,
}


def size_of(name: str) -> ModelSize:
    size = ModelSize.of({**qwen3(name).to_dict(), "dtype": "bfloat16"})
    assert size is not None
    return size


def by_stage(student: str, gpu: int, **train: Any) -> dict[str, Need]:
    settings = load_config(f"paper/qwen3-{student}", [f"train.{name}={value}" for name, value in train.items()])
    return {need.stage: need for need in needs(settings, Models(size_of(student), size_of("8b")), gpu)}


@pytest.mark.parametrize("student", [name for name in QWEN3 if name != "8b"])
def test_every_stage_that_holds_a_model_is_predicted(student: str) -> None:
    result = by_stage(student, 80 * GIB)
    assert {"rollout", "score", "train", "evaluate", "align"} <= result.keys()
    weights = 4 * size_of(student).parameters
    assert 4 * weights < result["train"].memory.bytes < 4 * weights + 25 * GIB  # weights, gradients and two moments
    assert result["score"].memory.bytes > 2 * size_of("8b").parameters


def test_what_saves_memory_is_predicted_to() -> None:
    whole = by_stage("4b", 80 * GIB, gradient_checkpointing="false")["train"].memory.bytes
    checkpointing = by_stage("4b", 80 * GIB)["train"].memory.bytes
    sharded = by_stage("4b", 80 * GIB, processes=4, sharding="fsdp")["train"].memory.bytes
    adapters = by_stage("4b", 80 * GIB, lora="{rank: 16}")["train"].memory.bytes
    assert whole > 80 * GIB > checkpointing > sharded > adapters > 4 * size_of("4b").parameters


def test_two_contexts_take_the_keys_and_values_of_both() -> None:
    models = Models(size_of("1.7b"), size_of("1.7b"))
    one, two = (
        next(need.memory for need in needs(settings, models, 80 * GIB) if need.stage == "rollout")
        for settings in (
            load_config(
                "paper/mixsd-qwen3-1.7b", ["rollout.source=student", "rollout.mixed={}", "rollout.engine=transformers"]
            ),
            load_config("paper/mixsd-qwen3-1.7b"),
        )
    )
    assert two.parts["keys and values"] == 2 * one.parts["keys and values"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [("student", {"rollout": "0.6b"}), ("teacher", {"rollout": "4b"}), ("prefix", {"guide": "4b", "rollout": "0.6b"})],
)
def test_the_memory_of_sampling_is_that_of_the_model_that_samples(source: str, expected: dict[str, str]) -> None:
    models = Models(size_of("0.6b"), size_of("4b"))
    train = "{name: fkl}" if source == "teacher" else "{name: opd}"
    settings = load_config(
        "paper/qwen3-0.6b", [f"rollout.source={source}", f"train.objective={train}", "rollout.engine=transformers"]
    )
    by_stage = {need.stage: need.memory for need in needs(settings, models, 80 * GIB)}
    assert expected.keys() == by_stage.keys() & {"guide", "rollout"}
    for stage, size in expected.items():
        assert by_stage[stage].parts["weights"] == size_of(size).parameters * 2


def test_a_stage_that_does_not_fit_is_named() -> None:
    small, large = by_stage("4b", 24 * GIB)["train"], by_stage("0.6b", 80 * GIB)["train"]
    assert (small.fits, large.fits) == (False, True)
    first, second = lines([large, small])
    assert first.startswith("Memory of `train`: needs about")
    assert first.endswith("NOT ENOUGH.")
    assert "of 85.9 GB" in second


def test_a_model_of_another_kind_is_not_predicted(tmp_path: Path) -> None:
    for name, config in {"good": MODEL, "experts": {**MODEL, "num_experts": 4}, "gpt2": {"n_embd": 64}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    good = tmp_path / "good"
    assert models_of(good, good) is not None
    assert models_of(good, tmp_path / "experts") is None
    assert models_of(tmp_path / "gpt2", good) is None
    assert models_of(good, tmp_path / "none") is None


def test_a_plan_shows_the_most_that_its_runs_need(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    runs = [make_run(tmp_path, make_facts(folder=tmp_path), train={"ema": ema}) for ema in (None, 0.9)]
    result = {need.stage: need for need in needs_of(runs, 80 * GIB)}
    assert "average" in result["train"].memory.parts
    assert result["evaluate"].available == 80 * GIB


def test_doctor_compares_with_this_machine_or_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    monkeypatch.setattr(doctor_inputs, "find_weights", lambda *_: tmp_path)
    raw = {"name": "x", "student": {"path": "s"}, "teacher": {"path": "t"}, "prompts": {"path": "p.jsonl"}}
    settings = parse_settings({**raw, "rollout": {"engine": "transformers"}}, "test")
    for gpu, text in ((0, "; on a GPU about"), (24 * GIB, "of 25.8 GB")):
        monkeypatch.setattr(doctor_inputs, "gpu_bytes", lambda gpu=gpu: gpu)
        findings = {finding.name: finding for finding in doctor_inputs._memory(settings)}
        assert findings["memory of train"].state == "ok"
        assert text in findings["memory of train"].text
    monkeypatch.setattr(doctor_inputs, "gpu_bytes", lambda: GIB)
    findings = {finding.name: finding for finding in doctor_inputs._memory(settings)}
    assert findings["memory of train"].state == "warning"
    assert "lora" in findings["memory of train"].remedy


def test_the_smallest_gpu_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 81559\necho 24564\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert memory.gpu_bytes() == 24564 * 2**20
