"""Another vocabulary is refused before anything is sampled."""

from __future__ import annotations

from pathlib import Path

import pytest

from eopd.pipeline.config import ConfigError
from eopd.pipeline.inputs import compare_vocabularies
from eopd.stages.models import tokenizers
from tests.end_to_end.conftest import World, eopd
from tests.stages.tiny_models import tiny_tokenizer


def test_folders_of_tokenizers_are_compared_by_what_ids_mean(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "student")
    tiny_tokenizer(tmp_path / "template", template=None)
    tiny_tokenizer(tmp_path / "other", swapped=True)
    compare_vocabularies(tmp_path / "template", tmp_path / "student")
    compare_vocabularies(tmp_path / "none", tmp_path / "student")  # the stage that loads it says that it is missing
    with pytest.raises(ConfigError, match="teacher and student differ at 2 ids, first at id 259"):
        compare_vocabularies(tmp_path / "other", tmp_path / "student")


def test_two_folders_are_compared_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_tokenizer(tmp_path / "student")
    tiny_tokenizer(tmp_path / "teacher", template=None)
    compared: list[object] = []
    check_same = tokenizers.check_same_vocabulary
    monkeypatch.setattr(tokenizers, "check_same_vocabulary", lambda *pair: compared.append(pair) or check_same(*pair))
    for _ in range(3):
        compare_vocabularies(tmp_path / "teacher", tmp_path / "student")
    assert len(compared) == 1


def test_a_run_of_two_vocabularies_samples_nothing(world: World, tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "other", swapped=True)
    places = {"teacher.tokenizer": tmp_path / "other", "store": tmp_path / "store", "runs": tmp_path / "runs"}
    overrides = [word for name, value in places.items() for word in ("--set", f"{name}={value}")]
    config = world.config("vocabularies")
    for command in ("run", "rollout"):
        refused = eopd(command, config, *overrides, check=False)
        assert refused.returncode == 1
        assert "the tokenizers of teacher and student differ at" in refused.stderr
    assert not (tmp_path / "store" / "rollouts").exists()
    assert eopd("plan", config, *overrides).returncode == 0  # looking is allowed
