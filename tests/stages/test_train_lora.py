"""LoRA: adapters alone are trained, the merged model is the checkpoint, and resuming is exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eopd.stages.job import ModelRef
from eopd.stages.models.lm_head import lm_head_of
from eopd.stages.models.loading import load_model
from eopd.stages.models.packing import Sequence, final_hidden, pack
from eopd.stages.train.lora import add_adapters
from eopd.stages.train.run import run
from eopd.stages.train.settings import LoraSettings, TrainSettings
from eopd.storage.errors import InputError
from eopd.storage.paths import OPTIMIZER, WEIGHTS
from tests.raises import raises
from tests.stages.tiny_models import save_teacher, tiny_model
from tests.stages.train_case import KillAfter, Killed, logits_of, make_world, part_bytes, read_rows, train_job

LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    save_teacher("gpt2", folder / "gpt2", seed=1)
    save_teacher("qwen2", folder / "qwen2", seed=1)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


@pytest.mark.parametrize("student", ["student", "gpt2", "qwen2"])  # plain, Conv1D and tied, tied
def test_the_checkpoint_is_the_adapted_model_merged(world: Path, student: str) -> None:
    from peft import PeftModel

    job = train_job(world, f"lora-{student}", student=ModelRef(str(world / student)), lora=LORA, optimizer={"lr": 1e-2})
    run(job)
    merged, rest = job.output.part_folder(WEIGHTS), job.output.part_folder(OPTIMIZER)
    moments = load_file(rest / "optimizer.safetensors")
    assert moments
    assert all("lora_" in name for name in moments if name != "step")
    before, after = (load_file(folder / "model.safetensors") for folder in (world / student, merged))
    assert before.keys() == after.keys()
    assert config_of(merged) == config_of(world / student)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith(("proj.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight")) for name in changed)

    adapted = PeftModel.from_pretrained(load_model(ModelRef(str(world / student))), rest / "adapter")
    (packed,) = pack([Sequence([5, 6, 7], [11, 12, 13, 14])], 64)
    with torch.no_grad():
        theirs = lm_head_of(adapted).logits(final_hidden(adapted, packed)).numpy()
    ours, first = logits_of(merged), logits_of(world / student)
    scale = np.abs(theirs).max()
    assert np.abs(ours - theirs).max() <= 1e-5 * scale
    assert np.abs(ours - first).max() > 1e-3 * scale


def test_new_adapters_change_nothing_and_depend_on_seed_and_round_alone() -> None:
    model = tiny_model("qwen3")
    (packed,) = pack([Sequence([5, 6, 7], [11, 12, 13, 14])], 64)
    with torch.no_grad():
        plain = final_hidden(model, packed)
    made = []
    for seed, round_ in ((1, 0), (1, 0), (1, 1), (2, 0)):
        torch.manual_seed(len(made))  # the generator around it must not matter
        adapted = add_adapters(tiny_model("qwen3"), LoraSettings(rank=2), seed, round_)
        with torch.no_grad():
            assert torch.equal(final_hidden(adapted, packed), plain)
        made.append(torch.cat([p.flatten() for p in adapted.parameters() if p.requires_grad]))
        assert not lm_head_of(adapted).weight.requires_grad
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert not torch.equal(made[0], made[3])


@pytest.mark.parametrize("kills", [1, 3])
def test_resuming_is_exact(world: Path, kills: int) -> None:
    undisturbed, job = train_job(world, "whole", lora=LORA), train_job(world, f"killed-{kills}", lora=LORA)
    run(undisturbed)
    for _ in range(kills):
        with pytest.raises(Killed):
            run(replace(job, progress=KillAfter(1)))
    states = sorted(job.progress_states.committed() - {0})
    assert states == [kills]
    state = load_file(job.progress_states.part_folder(states[0]) / "weights.safetensors")
    assert all("lora_" in name for name in state)
    run(job)
    for part in (WEIGHTS, OPTIMIZER):
        assert part_bytes(job.output, part) == part_bytes(undisturbed.output, part)


def test_the_next_round_starts_from_the_merged_model_with_new_adapters(world: Path) -> None:
    first = train_job(world, "first", lora=LORA)
    run(first)
    merged = first.output.part_folder(WEIGHTS)
    second = replace(
        train_job(world, "second", lora=LORA),
        round=1,
        first_step=4,
        student=ModelRef(str(merged)),
        previous=first.output,
    )
    run(second)
    steps = load_file(second.output.part_folder(OPTIMIZER) / "optimizer.safetensors")["step"]
    assert steps.item() == 4.0  # moments of this round only
    losses = [row["loss"] for row in read_rows(second)]
    assert losses != [row["loss"] for row in read_rows(first)]
    assert np.abs(logits_of(second.output.part_folder(WEIGHTS)) - logits_of(merged)).max() > 0


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("q_proj", "lm_head"), "'lm_head', the LM head"),
        (("embed_tokens",), "'embed_tokens', the embeddings"),
        (("q_prj",), "'q_prj', .*: down_proj, gate_proj"),
        (("norm",), "'norm', a Qwen3RMSNorm"),
        (("mlp",), "'mlp', a Qwen3MLP"),
    ],
)
def test_what_cannot_be_adapted_is_named(targets: tuple[str, ...], words: str) -> None:
    with raises(InputError, words, setting="train.lora.target_modules"):
        add_adapters(tiny_model("qwen3"), LoraSettings(target_modules=targets), 0, 0)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.ema=0\.9 with train\.lora is refused"):
        TrainSettings.model_validate({"lora": LORA, "ema": 0.9})
    with pytest.raises(ValueError, match="names no module"):
        TrainSettings.model_validate({"lora": {"target_modules": []}})
