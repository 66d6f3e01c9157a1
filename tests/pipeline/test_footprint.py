"""Sizes before anything is made, against what torch and safetensors write, and the peak against a walk by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from eopd.pipeline.forecast import Keep, peak_bytes
from eopd.stages.train.optimizer import make_optimizer, optimizer_tensors
from eopd.stages.train.settings import TrainSettings
from eopd.stages.train.stage import CheckpointBytes, checkpoint_bytes, parameter_count, read_shapes
from eopd.storage.errors import InputError
from tests.raises import raises


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config)


@pytest.fixture(scope="module")
def folder(model: Qwen3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def test_a_checkpoint_is_as_large_as_the_files_it_will_have(
    model: Qwen3ForCausalLM, folder: Path, tmp_path: Path
) -> None:
    settings = TrainSettings()
    optimizer = make_optimizer(model, settings.optimizer)
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    save_file(optimizer_tensors(model, optimizer), tmp_path / "optimizer.safetensors")
    written = (tmp_path / "optimizer.safetensors").stat().st_size
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert len(list(folder.glob("*.safetensors"))) > 2
    shapes = read_shapes(folder)
    assert parameter_count(shapes) == sum(p.numel() for p in model.parameters())
    sizes = checkpoint_bytes(shapes, settings)
    assert sizes.weights == pytest.approx(weights, rel=0.1)
    assert sizes.optimizer == pytest.approx(written, rel=0.1)
    assert sizes.state == sizes.weights + sizes.optimizer
    half = checkpoint_bytes(shapes, TrainSettings(param_dtype="bfloat16", autocast="bf16"))
    assert half.weights * 2 == sizes.weights
    averaged = checkpoint_bytes(shapes, TrainSettings(ema=0.9))
    assert averaged.optimizer - sizes.optimizer == sizes.weights


def test_adapters_are_counted_as_peft_makes_them(model: Qwen3ForCausalLM, folder: Path) -> None:
    import copy

    from eopd.stages.train.lora import add_adapters

    settings = TrainSettings.model_validate({"lora": {"rank": 4}})
    assert settings.lora is not None
    adapted = add_adapters(copy.deepcopy(model), settings.lora, 0, 0)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad) * 4
    sizes = checkpoint_bytes(read_shapes(folder), settings)
    assert sizes.optimizer == 3 * trained  # two moments and the adapter itself
    assert sizes.weights == checkpoint_bytes(read_shapes(folder), TrainSettings()).weights


def test_the_peak_of_a_pruned_run() -> None:
    sizes = CheckpointBytes(weights=10, optimizer=20, state=30)
    # the last round: data of all rounds, what pruning left of the first two, the new checkpoint beside its last state
    assert peak_bytes(sizes, [5, 5, 5], Keep()) == 15 + 2 * (10 + 20) + (10 + 20 + 30)
    assert peak_bytes(sizes, [5, 5, 5], Keep(weights=None, optimizer=1)) == 15 + 2 * 10 + 20 + 60
    assert peak_bytes(sizes, [5, 5, 5], Keep(1, 1)) == 15 + 30 + 60
    assert peak_bytes(sizes, [5, 5, 5], Keep(1, 1), states=3) == 15 + 30 + 30 + 3 * 30
    assert peak_bytes(sizes, [5, 5, 5], Keep(1, 1), trained=3) == 15 + 30
    assert peak_bytes(sizes, [5] * 200, Keep(2, 1)) == 1000 + 2 * 10 + 20 + 60


def test_two_hundred_rounds_of_a_4b_student_are_about_ten_terabytes() -> None:
    sizes = checkpoint_bytes({"all": (4_000_000_000,)}, TrainSettings())
    assert 9e12 < peak_bytes(sizes, [0] * 200, Keep()) < 11e12
    assert peak_bytes(sizes, [0] * 200, Keep(weights=2, optimizer=1)) < 0.2e12


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with raises(InputError, file="model.safetensors"):
        read_shapes(tmp_path)
