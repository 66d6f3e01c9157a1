"""Loading, tokenizers and their fingerprints: what is refused, and what counts as the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from eopd.stages.job import ModelRef
from eopd.stages.models.chat_templates import Conversation
from eopd.stages.models.loading import load_model, load_tokenizer, load_tokenizer_at
from eopd.stages.models.tokenizers import check_same_vocabulary, id_to_bytes, render_chat, vocabulary_fingerprint
from eopd.storage.errors import InputError
from tests.raises import raises
from tests.stages.tiny_models import save_tiny, tiny_tokenizer


def test_a_missing_folder_and_a_missing_hub_id_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises(InputError, file="/no/such/model", remedy="check the path"):
        load_model(ModelRef("/no/such/model"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with raises(InputError, "Qwen/Qwen3-8B", remedy="hf download Qwen/Qwen3-8B"):
        load_model(ModelRef("Qwen/Qwen3-8B"))


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with raises(InputError, "safetensors", file=tmp_path):
        load_model(ModelRef(str(tmp_path)))
    (tmp_path / "config.json").unlink()
    with raises(InputError, file=tmp_path / "config.json"):
        load_model(ModelRef(str(tmp_path)))


def test_dtype(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    assert load_model(ModelRef(str(tmp_path))).dtype == torch.float32
    assert load_model(ModelRef(str(tmp_path), dtype="bfloat16")).dtype == torch.bfloat16
    with raises(InputError, "'int4'", setting="dtype"):
        load_model(ModelRef(str(tmp_path), dtype="int4"))


def test_gemma_2_is_loaded_with_the_attention_that_caps(tmp_path: Path) -> None:
    save_tiny("gemma2", tmp_path)
    assert load_model(ModelRef(str(tmp_path))).config._attn_implementation == "eager"


def test_bytes_of_a_byte_level_tokenizer(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    tokenizer = load_tokenizer_at(str(tmp_path))
    table = id_to_bytes(tokenizer)
    assert len(table) == 300
    assert table[2] == b"<|end|>"
    text = "see é\n\x00 it"
    ids = tokenizer(text)["input_ids"]
    assert b"".join(table[number] for number in ids) == text.encode()
    assert {bytes([byte]) for byte in range(256)} <= set(table.values())


def test_bytes_of_a_sentencepiece_style_tokenizer() -> None:
    vocabulary = {"<unk>": 0, "<0x0A>": 1, "\u2581the": 2, "a": 3}
    backend = Tokenizer(BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>"])
    table = id_to_bytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert table == {0: b"<unk>", 1: b"\n", 2: b" the", 3: b"a"}


def test_vocabularies_that_differ_in_special_tokens_templates_and_length_agree(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "a")
    tiny_tokenizer(tmp_path / "b", template=None)
    tiny_tokenizer(tmp_path / "c", swapped=True)
    a, b, c = (load_tokenizer_at(str(tmp_path / name)) for name in "abc")
    b.add_tokens(["<|more|>"])
    check_same_vocabulary(a, b)
    with raises(InputError, "2 ids, first at id 259: b'ee' against b'et'"):
        check_same_vocabulary(a, c)


def test_the_fingerprint_is_of_the_vocabulary_alone(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "a")
    tiny_tokenizer(tmp_path / "b", template="{{ messages }}")
    tiny_tokenizer(tmp_path / "c", swapped=True)
    a, b, c = (vocabulary_fingerprint(load_tokenizer_at(str(tmp_path / name))) for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_rendering_equals_apply_chat_template(tmp_path: Path, arguments: dict[str, bool]) -> None:
    tiny_tokenizer(tmp_path)
    tokenizer = load_tokenizer(ModelRef("/nowhere", tokenizer=str(tmp_path)))
    messages = [{"role": "system", "content": "be é"}, {"role": "user", "content": "teste <|end|> it"}]
    own = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **arguments)["input_ids"]
    assert render_chat(tokenizer, Conversation(tuple(messages)), arguments) == own
    tokenizer.chat_template = None
    with raises(InputError, setting="template"):
        render_chat(tokenizer, Conversation(tuple(messages)))


def test_a_revision_of_the_model_is_none_of_another_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, commit = tmp_path / "models--someone--tokens", "a" * 40
    tiny_tokenizer(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert len(load_tokenizer(ModelRef("someone/model", revision="b" * 40, tokenizer="someone/tokens"))) == 300
    with pytest.raises(ValueError, match=r"someone/tokens' \(revision b+\)"):
        load_tokenizer(ModelRef("someone/tokens", revision="b" * 40))


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with raises(InputError, "no tokenizer", file=tmp_path):
        load_tokenizer(ModelRef(str(tmp_path)))
