"""Folders with lost, wrong, foreign or ambiguous weights: refused by name for every reader, before work."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eopd.pipeline import inputs
from eopd.pipeline.config import ConfigError
from eopd.stages.engines.kept import open_sampling_engine
from eopd.stages.engines.sampling import EngineKind, EngineOptions, SamplingEngine
from eopd.stages.job import ModelRef
from eopd.stages.models.lm_head import stored_lm_head
from eopd.stages.models.loading import check_weights, load_model
from eopd.stages.models.settings import ModelSettings
from eopd.stages.models.weight_files import INDEX, SINGLE, read_tensors, weight_files
from eopd.storage.errors import InputError
from eopd.storage.identity import Digests, model_files
from tests.raises import raises
from tests.stages.tiny_models import save_tiny, tiny_tokenizer

Damage = Callable[[dict[str, Tensor]], None]
ARCHITECTURES = ("qwen3", "llama", "gemma2", "mixtral", "gpt2", "granitemoe")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ARCHITECTURES}
    for name, folder in folders.items():
        save_tiny(name, folder)
    return folders


@pytest.fixture
def qwen3(originals: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(originals["qwen3"], tmp_path / "model")


def damage(folder: Path, change: Damage) -> None:
    weights = load_file(folder / SINGLE)
    change(weights)
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})


def shard(folder: Path) -> dict[str, str]:
    """Replace ``model.safetensors`` by two shards and their index; returns the weight map."""
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for number, half in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in half}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_tensor_that_is_missing_or_has_another_shape_is_refused_by_name(
    name: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(originals[name], tmp_path / "model")
    ref = ModelRef(str(folder))
    check_weights(ref)
    whole = load_file(folder / SINGLE)
    for tensor in whole:
        if ".1." in tensor.replace(".experts.1.", ""):  # the second layer is as the first
            continue
        for change, words in ((None, "is missing"), (whole[tensor][:-1].clone(), "has shape")):
            weights = {other: value for other, value in whole.items() if other != tensor}
            weights |= {} if change is None else {tensor: change}
            save_file(weights, folder / SINGLE, metadata={"format": "pt"})
            with raises(InputError, f"{re.escape(tensor)}.* {words}", file=folder):
                check_weights(ref)


def sampling(kind: EngineKind, ref: ModelRef) -> SamplingEngine:
    return open_sampling_engine(kind, ref, max_model_len=16, log_dir=Path(ref.path), options=EngineOptions())


READERS: dict[str, Callable[[ModelRef], object]] = {
    "loading": load_model,
    "transformers": partial(sampling, "transformers"),
    "vllm": partial(sampling, "vllm"),
}


@pytest.mark.parametrize(
    "tensor", ["lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"]
)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_a_lost_tensor(tensor: str, reader: str, qwen3: Path) -> None:
    if reader == "vllm":
        pytest.importorskip("vllm")
    damage(qwen3, lambda weights: weights.__delitem__(tensor))
    with raises(InputError, f"{tensor} is missing", file=qwen3):
        READERS[reader](ModelRef(str(qwen3)))


def test_a_tensor_of_no_layer_is_refused_and_a_known_leftover_is_not(qwen3: Path) -> None:
    damage(qwen3, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}))
    damage(qwen3, lambda weights: weights.update({"mtp.layers.0.weight": torch.ones(4)}))
    load_model(ModelRef(str(qwen3)))
    damage(qwen3, lambda weights: weights.update({"model.layers.2.mlp.down_proj.weight": torch.ones(4, 4)}))
    for check in (check_weights, load_model):
        with raises(InputError, "layers.2.mlp.down_proj.weight", file=qwen3):
            check(ModelRef(str(qwen3)))


def test_a_layer_for_multi_token_prediction_is_left_alone(qwen3: Path) -> None:
    damage(qwen3, lambda weights: weights.update({"model.layers.2.eh_proj.weight": torch.ones(4, 4)}))
    config = json.loads((qwen3 / "config.json").read_text())
    (qwen3 / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    load_model(ModelRef(str(qwen3)))
    damage(qwen3, lambda weights: weights.update({"model.layers.3.eh_proj.weight": torch.ones(4, 4)}))
    with raises(InputError, "layers.3.eh_proj.weight", file=qwen3):
        load_model(ModelRef(str(qwen3)))


def test_a_tied_head_may_be_stored_only_as_the_embeddings(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path, tie_word_embeddings=True)
    damage(tmp_path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    load_model(ModelRef(str(tmp_path)))
    damage(tmp_path, lambda weights: weights["lm_head.weight"].mul_(2))
    for check in (check_weights, load_model):
        with raises(InputError, "lm_head.weight", file=tmp_path):
            check(ModelRef(str(tmp_path)))


def test_a_quantised_layer_has_tensors_of_its_own_and_none_is_lost(qwen3: Path) -> None:
    config = json.loads((qwen3 / "config.json").read_text())
    (qwen3 / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    layer = "model.layers.0.mlp.down_proj"
    damage(qwen3, lambda w: w.update({f"{layer}.qweight": torch.ones(2), "x": w.pop(f"{layer}.weight")}))
    check_weights(ModelRef(str(qwen3)))
    damage(qwen3, lambda w: w.__delitem__(f"{layer}.qweight"))
    with raises(InputError, f"{layer}.weight is missing", file=qwen3):
        check_weights(ModelRef(str(qwen3)))


# -- which files are read ------------------------------------------------------------------------------------------


def test_shards_are_read_by_everyone(qwen3: Path) -> None:
    whole = stored_lm_head(qwen3, "float32").weight
    weight_map = shard(qwen3)
    assert [path.name for path in weight_files(qwen3)] == sorted(set(weight_map.values()))
    assert {name: tensor.file.name for name, tensor in read_tensors(qwen3).items()} == weight_map
    assert torch.equal(load_model(ModelRef(str(qwen3))).lm_head.weight, whole)
    assert torch.equal(stored_lm_head(qwen3, "float32").weight, whole)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "pytorch_model.bin", "original/model.safetensors"])
def test_files_that_no_reader_opens_beside_an_index_are_ignored(name: str, qwen3: Path) -> None:
    shard(qwen3)
    (qwen3 / "original").mkdir()
    (qwen3 / name).write_bytes(b"anything")
    assert {path.name for path in weight_files(qwen3)} == set(
        json.loads((qwen3 / INDEX).read_text())["weight_map"].values()
    )
    check_weights(ModelRef(str(qwen3)))


FIRST = "model-00001-of-00002.safetensors"


def unnamed_single(folder: Path, weight_map: dict[str, str]) -> None:
    shutil.copyfile(folder / FIRST, folder / SINGLE)


def unnamed_shard(folder: Path, weight_map: dict[str, str]) -> None:
    shutil.copyfile(folder / FIRST, folder / "model-00003-of-00003.safetensors")


def missing_shard(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / FIRST).unlink()


def dangling_shard(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to("../blobs/gone")


def pipe_for_a_shard(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / FIRST).unlink()
    os.mkfifo(folder / FIRST)


def folder_for_a_shard(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / FIRST).unlink()
    (folder / FIRST).mkdir()


def truncated_shard(folder: Path, weight_map: dict[str, str]) -> None:
    os.truncate(folder / FIRST, (folder / FIRST).stat().st_size - 4)


def tensor_in_two_shards(folder: Path, weight_map: dict[str, str]) -> None:
    tensors = {name: torch.ones(1) for name in weight_map}
    save_file(tensors, folder / FIRST, metadata={"format": "pt"})


def index_of_other_shards(folder: Path, weight_map: dict[str, str]) -> None:
    write_index(folder, weight_map | {"model.norm.weight": FIRST, "lm_head.weight": FIRST, "more": FIRST})


def index_without_a_map(folder: Path, weight_map: dict[str, str]) -> None:
    write_index(folder, [])


def index_that_is_a_list(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text("[]")


def index_of_many_levels(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text("[" * 100_000)


def index_of_a_single_file_and_more(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / FIRST).rename(folder / SINGLE)
    write_index(folder, {name: SINGLE if file == FIRST else file for name, file in weight_map.items()})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (unnamed_single, SINGLE),
        (unnamed_shard, "model-00003-of-00003.safetensors"),
        (missing_shard, FIRST),
        (dangling_shard, FIRST),
        (pipe_for_a_shard, FIRST),
        (folder_for_a_shard, FIRST),
        (truncated_shard, FIRST),
        (tensor_in_two_shards, FIRST),
        (index_of_other_shards, "more"),
        (index_without_a_map, INDEX),
        (index_that_is_a_list, INDEX),
        (index_of_many_levels, INDEX),
        (index_of_a_single_file_and_more, SINGLE),
    ],
)
def test_an_index_and_its_files_that_do_not_belong_together_are_refused(
    change: Callable[[Path, dict[str, str]], None], named: str, qwen3: Path
) -> None:
    change(qwen3, shard(qwen3))
    with raises(ConfigError, named, setting="teacher.path") as error:
        inputs.find_weights("teacher", ModelSettings(path=str(qwen3)))
    assert str(error.value.file).startswith(str(qwen3))
    for check in (check_weights, load_model):
        with raises(InputError, named, file=error.value.file):
            check(ModelRef(str(qwen3)))


@pytest.mark.parametrize(
    "name",
    [
        *("pytorch_model.bin", "../model.safetensors", "/tmp/model.safetensors", "weights/model.safetensors"),
        *("..", "", "model.safetensors/", ".hidden.safetensors", "model.SAFETENSORS", "a\\b.safetensors", 3, None),
    ],
)
def test_an_index_names_plain_safetensors_beside_it_and_nothing_else(name: Any, qwen3: Path) -> None:
    weight_map = shard(qwen3)
    torch.save(load_file(qwen3 / FIRST), qwen3 / "pytorch_model.bin")
    shutil.copyfile(qwen3 / FIRST, qwen3.parent / SINGLE)
    write_index(qwen3, {tensor: name if file == FIRST else file for tensor, file in weight_map.items()})
    with raises(InputError, file=qwen3 / INDEX, remedy="save_pretrained"):
        load_model(ModelRef(str(qwen3)))
    with raises(ConfigError, setting="student.path", file=qwen3 / INDEX):
        inputs.find_weights("student", ModelSettings(path=str(qwen3)))


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors", FIRST])
def test_without_an_index_there_is_one_file(name: str, qwen3: Path) -> None:
    shutil.copyfile(qwen3 / SINGLE, qwen3 / name)
    with raises(InputError, name, file=qwen3):
        check_weights(ModelRef(str(qwen3)))
    (qwen3 / SINGLE).unlink()
    with raises(InputError, name, file=qwen3):
        check_weights(ModelRef(str(qwen3)))


@pytest.mark.parametrize("name", ["adapter_config.json", "modules.json"])
def test_files_that_add_weights_for_one_reader_only_are_refused(name: str, qwen3: Path) -> None:
    (qwen3 / name).write_text("{}")
    with raises(InputError, file=qwen3 / name):
        check_weights(ModelRef(str(qwen3)))


def test_a_config_that_sends_transformers_to_another_file_is_refused(qwen3: Path) -> None:
    config = json.loads((qwen3 / "config.json").read_text())
    shutil.copyfile(qwen3 / SINGLE, qwen3 / "other.weights")
    (qwen3 / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    with raises(InputError, "transformers_weights", file=qwen3 / "config.json"):
        load_model(ModelRef(str(qwen3)))


def test_trusted_code_of_another_repository_is_refused(qwen3: Path) -> None:
    config = json.loads((qwen3 / "config.json").read_text())
    (qwen3 / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "someone/code--own.Model"}}))
    load_model(ModelRef(str(qwen3)))
    with raises(InputError, "someone/code--own", file=qwen3 / "config.json"):
        load_model(ModelRef(str(qwen3), trust_remote_code=True))


def test_links_of_the_hub_s_cache_are_followed(qwen3: Path, tmp_path: Path) -> None:
    shard(qwen3)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(qwen3.iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(f"../blobs/{number}")
    check_weights(ModelRef(str(qwen3)))


@pytest.mark.parametrize("sharded", [False, True])
def test_the_fingerprint_covers_every_file_that_is_read(sharded: bool, qwen3: Path) -> None:
    if sharded:
        shard(qwen3)
        assert qwen3 / INDEX in model_files(qwen3)
    assert {*weight_files(qwen3), qwen3 / "config.json"} <= set(model_files(qwen3))


def test_what_is_no_file_and_is_not_read_has_no_part_in_the_fingerprint(qwen3: Path) -> None:
    shard(qwen3)
    files = model_files(qwen3)
    os.mkfifo(qwen3 / "pipe.safetensors")
    (qwen3 / "folder.safetensors").mkdir()
    (qwen3 / "gone.safetensors").symlink_to("nothing")
    assert model_files(qwen3) == files
    check_weights(ModelRef(str(qwen3)))


# -- before work ---------------------------------------------------------------------------------------------------


def test_a_lost_tensor_is_refused_before_work(originals: dict[str, Path], qwen3: Path) -> None:
    damage(qwen3, lambda weights: weights.__delitem__("model.layers.1.self_attn.q_norm.weight"))
    roles = {"student": originals["llama"], "teacher": qwen3}
    models = {role: (ModelSettings(path=str(path)), path) for role, path in roles.items()}
    findings = inputs.check_architectures(models)
    assert findings.keys() == {"teacher"}
    assert "model.layers.1.self_attn.q_norm.weight is missing" in findings["teacher"].problem
    assert inputs.check_architectures(models, in_process=True)["teacher"].fields() == findings["teacher"].fields()


def test_models_are_checked_before_work_once(qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_tokenizer(qwen3)
    settings, refusals, checks = ModelSettings(path=str(qwen3)), {"teacher": InputError("it is broken")}, []

    def check(result: Any, *, in_process: bool) -> dict[str, InputError]:
        checks.append(list(result))
        return refusals

    def look() -> None:
        digests = Digests(tmp_path / "digests.json")
        facts = inputs.inspect_model("teacher", settings, digests)
        inputs.check_weights({"teacher": (settings, facts)}, digests)

    monkeypatch.setattr(inputs, "check_architectures", check)
    for _ in range(2):
        with raises(ConfigError, setting="teacher.path"):
            look()
    refusals.clear()
    look()
    look()
    assert len(checks) == 3
    damage(qwen3, lambda weights: weights["lm_head.weight"].mul_(2))
    look()
    assert len(checks) == 4
