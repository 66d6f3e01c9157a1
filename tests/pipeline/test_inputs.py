"""What a plan reads of a model's folder: its stop ids, the main one first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from eopd.pipeline.config import ConfigError, RunSettings
from eopd.pipeline.inputs import captured_teacher, check_architectures, find_weights, inspect_model, locate, stop_ids_of
from eopd.stages.models.settings import ModelSettings
from eopd.stages.train.stops import StopHandling, swap_stops
from eopd.storage.identity import Digests
from eopd.storage.teacher_record import HeadRule
from tests.pipeline.plan_case import make_facts, make_settings
from tests.raises import raises
from tests.stages.tiny_models import save_tiny
from tests.storage.making import dense, rows_of

END, CHAT_END = 3, 7
"""<|endoftext|> and <|im_end|>, as a chat model of two stop ids has them."""


def model(folder: Path, eos: str, generation: list[int], config: int) -> Path:
    folder.mkdir()
    added = [{"content": "<|endoftext|>", "id": END}, {"content": "<|im_end|>", "id": CHAT_END}]
    files = {
        "tokenizer_config.json": {"eos_token": eos},
        "tokenizer.json": {"added_tokens": added},
        "generation_config.json": {"eos_token_id": generation},
        "config.json": {"eos_token_id": config},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("eos", "generation", "config", "expected"),
    [
        ("<|im_end|>", [CHAT_END, END], CHAT_END, (CHAT_END, END)),
        ("<|im_end|>", [END, CHAT_END], END, (CHAT_END, END)),
        ("<|endoftext|>", [END], END, (END,)),
        ("<|nothing|>", [CHAT_END, END], END, (CHAT_END, END)),
    ],
)
def test_the_main_stop_id_comes_first(
    tmp_path: Path, eos: str, generation: list[int], config: int, expected: tuple[int, ...]
) -> None:
    folder = model(tmp_path / "model", eos, generation, config)
    assert stop_ids_of(folder, folder) == expected


@pytest.mark.parametrize("value", ["abc", [1, "2"], [[1]], {"id": 1}, 1.5, True, -1, 2**40, [None]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_stop_id_that_is_none_is_named_by_file_and_key(tmp_path: Path, name: str, value: object) -> None:
    folder = model(tmp_path / "model", "<|im_end|>", [END], END)
    (folder / name).write_text(json.dumps({"eos_token_id": value}))
    with raises(ConfigError, "eos_token_id", file=folder / name):
        stop_ids_of(folder, folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("where", ["vocab_size", "text_config"])
def test_a_stop_id_beyond_the_vocabulary_is_named_by_file_and_key(tmp_path: Path, name: str, where: str) -> None:
    folder = model(tmp_path / "model", "<|im_end|>", [END], END)
    config: dict[str, object] = {"vocab_size": 64} if where == "vocab_size" else {"text_config": {"vocab_size": 64}}
    for last in (63, 64):
        for file, content in (("config.json", config), (name, {**(config if name == "config.json" else {})})):
            (folder / file).write_text(json.dumps({**content, "eos_token_id": last if file == name else END}))
        if last < 64:
            assert last in stop_ids_of(folder, folder)
            continue
        with raises(ConfigError, "eos_token_id 64", file=folder / name):
            stop_ids_of(folder, folder)
        with raises(ConfigError, "eos_token_id 64", setting="student.path", file=folder / name):
            find_weights("student", ModelSettings(path=str(folder)))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_a_model_s_file_that_holds_no_object_is_named(tmp_path: Path, name: str, text: str) -> None:
    folder = model(tmp_path / "model", "<|im_end|>", [END], END)
    (folder / name).write_text(text)
    with raises(ConfigError, file=folder / name):
        stop_ids_of(folder, folder)


@pytest.mark.parametrize(
    "content", [{"vocab_size": "abc"}, {"vocab_size": -1}, {"vocab_size": 1.5}, {"text_config": 3}]
)
def test_a_vocabulary_that_is_none_is_named_by_role_and_file(tmp_path: Path, content: dict[str, object]) -> None:
    folder = model(tmp_path / "model", "<|im_end|>", [END], END)
    (folder / "config.json").write_text(json.dumps(content))
    (key,) = content
    with raises(ConfigError, key, setting="teacher.path", file=folder / "config.json"):
        find_weights("teacher", ModelSettings(path=str(folder)))


@pytest.mark.parametrize("in_process", [True, False])
def test_what_a_config_is_refused_for_is_one_line_with_the_file(tmp_path: Path, in_process: bool) -> None:
    changes: dict[str, dict[str, object]] = {
        "a": {"model_type": "nope\n\x1b[31m"},
        "b": {"hidden_size": -1},
        "c": {"num_hidden_layers": "two"},
        "d": {"num_attention_heads": 0},
        "e": {"vocab_size": "abc"},
    }
    models = {}
    for role, change in changes.items():
        save_tiny("qwen3", tmp_path / role)
        file = tmp_path / role / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        models[role] = ModelSettings(path=str(tmp_path / role)), tmp_path / role
    findings = check_architectures(models, in_process=in_process)
    assert findings.keys() == changes.keys()
    for role, refusal in findings.items():
        assert refusal.file == str(tmp_path / role / "config.json")
        assert "\n" not in refusal.problem
        assert len(refusal.problem) <= 300
    assert "model type `nope" in findings["a"].problem


@pytest.mark.parametrize("text", ["[" * 100_000, '{"added_tokens": [{"id": 1}]}', '{"added_tokens": 3}', "{"])
def test_a_tokenizer_s_file_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    folder = model(tmp_path / "model", "<|im_end|>", [END], END)
    (folder / "tokenizer.json").write_text(text)
    with raises(ConfigError, file=folder / "tokenizer.json"):
        stop_ids_of(folder, folder)


def test_remap_swaps_the_ends_of_a_chat_teacher_and_a_base_student(tmp_path: Path) -> None:
    teacher = model(tmp_path / "teacher", "<|im_end|>", [CHAT_END, END], CHAT_END)
    student = model(tmp_path / "student", "<|endoftext|>", [END], END)
    rows = rows_of(dense(1, [30], 20), HeadRule(k_max=8, full_head_above=-1.0), stops=(END, CHAT_END))
    swapped = swap_stops(rows, StopHandling("remap", stop_ids_of(student, student), stop_ids_of(teacher, teacher)))
    assert np.count_nonzero(rows.head_ids == END) != np.count_nonzero(rows.head_ids == CHAT_END)
    np.testing.assert_array_equal(swapped.head_ids == END, rows.head_ids == CHAT_END)


def test_code_that_is_trusted_is_part_of_the_model(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", "<|endoftext|>", [END], END)
    save_file({"weight": np.zeros(1, np.float32)}, folder / "model.safetensors")

    def facts(trusted: bool) -> tuple[str, str]:
        settings = ModelSettings(path=str(folder), trust_remote_code=trusted)
        description = inspect_model("student", settings, Digests())
        return description.fingerprint, description.tokenizer_fingerprint

    before = [facts(trusted) for trusted in (False, True)]
    (folder / "modeling_own.py").write_text("scale = 2")
    after = [facts(trusted) for trusted in (False, True)]
    assert after[0] == before[0]
    assert after[1][0] != before[1][0]
    assert after[1][1] != before[1][1]


def test_a_further_chat_template_is_part_of_the_tokenizer(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", "<|endoftext|>", [END], END)
    save_file({"weight": np.zeros(1, np.float32)}, folder / "model.safetensors")
    (folder / "additional_chat_templates").mkdir()
    prints = []
    for text in ("", "{{ tools }}", "{{ messages }}"):
        if text:
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text(text)
        facts = inspect_model("student", ModelSettings(path=str(folder)), Digests())
        prints.append(facts.tokenizer_fingerprint)
    assert len(set(prints)) == 3


@pytest.mark.parametrize("name", ["gpt2", "owner/model"])
def test_a_hub_id_is_found_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with raises(ConfigError, setting="student.path", remedy=f"hf download {name}"):
        locate("student.path", name, None)
    commit, cached = "a" * 40, tmp_path / f"models--{name.replace('/', '--')}"
    snapshot = cached / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    assert locate("student.path", name, None) == snapshot


def captured_settings(folder: Path, rows: int, **columns: str) -> RunSettings:
    """A run over a file of two prompts, with a capture of ``rows`` sequences."""
    (folder / "prompts.jsonl").write_text('{"prompt": [5], "response": [6]}\n' * 2)
    lists = {"target_token_ids": [[[6], [0]]] * rows, "target_logprobs": [[[-0.1], [0.0]]] * rows}
    pq.write_table(pa.table({"input_ids": [[5, 6]] * rows, **lists}), folder / "kd.parquet")
    return make_settings(
        teacher={"path": None, "capture": {"path": str(folder / "kd.parquet"), **columns}},
        prompts={"path": str(folder / "prompts.jsonl"), "columns": {"response": "response"}},
        rollout={"source": "data", "samples_per_prompt": 1},
        train={"objective": {"name": "fkl"}},
        evaluate=None,
    )


def test_a_capture_is_known_by_its_content_and_columns(tmp_path: Path) -> None:
    student = make_facts().student
    settings = captured_settings(tmp_path, rows=2)
    teacher = captured_teacher(settings, student, Digests())
    assert teacher.stop_ids == student.stop_ids
    assert teacher.fingerprint != student.fingerprint
    named = captured_settings(tmp_path, rows=2, ids="input_ids")
    assert captured_teacher(named, student, Digests()).fingerprint == teacher.fingerprint
    moved = replace(student, tokenizer_fingerprint="another")
    assert captured_teacher(settings, moved, Digests()).fingerprint != teacher.fingerprint


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        (1, {}, "1 rows"),
        (3, {}, "3 rows"),
        (2, {"ids": "tokens"}, "no column 'tokens'"),
        (2, {"top_logprobs": "target_token_ids"}, "floats"),
    ],
)
def test_a_capture_of_other_rows_or_columns_is_refused(
    tmp_path: Path, rows: int, columns: dict[str, str], words: str
) -> None:
    top = {"top_ids": "target_token_ids", **columns} if "top_logprobs" in columns else columns
    with raises(ConfigError, words, setting="teacher.capture", file="kd.parquet"):
        captured_teacher(captured_settings(tmp_path, rows, **top), make_facts().student, Digests())


def test_a_capture_that_is_not_there_is_named(tmp_path: Path) -> None:
    settings = captured_settings(tmp_path, rows=2)
    (tmp_path / "kd.parquet").unlink()
    with raises(ConfigError, setting="teacher.capture.path", file="kd.parquet"):
        captured_teacher(settings, make_facts().student, Digests())
