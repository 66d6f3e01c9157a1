"""The recipe of the language-model pair: every text once an epoch, and a killed training goes on as if nothing was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from eopd.examples.gsm8k import data, pair, training
from eopd.examples.gsm8k.make import END_OF_TEXT, train_tokenizer
from eopd.stages.models.loading import load_tokenizer_at
from eopd.stages.models.tokenizers import vocabulary_fingerprint

TINY = training.Recipe(layers=1, width=32, heads=1, kv_heads=1, feed_forward=32, steps=7, batch=4, warmup=2)
PROBLEMS = [
    {"problem": f"What is {n} plus {n}?", "solution": f"{n} + {n} = {2 * n}" + "." * (n % 9)} for n in range(41)
]


def test_an_epoch_has_every_text_once_and_little_padding() -> None:
    texts = [[index + 1] * (1 + index % 50) for index in range(203)]
    seen: list[int] = []
    width = real = 0
    for step in range(50):
        ids, labels = training.batch_of(texts, step, 4, seed=3)
        assert ((labels == training.IGNORED) == (ids == 0)).all()
        seen += ids[:, 0].tolist()
        width += ids.numel()
        real += int((labels != training.IGNORED).sum())
    assert len(set(seen)) == len(seen) == 200
    assert real / width > 0.9
    again, _ = training.batch_of(texts, 50, 4, seed=3)
    first, _ = training.batch_of(texts, 0, 4, seed=3)
    assert again.tolist() != first.tolist()
    with pytest.raises(ValueError, match="fewer than a batch"):
        training.batch_of(texts[:3], 0, 4, seed=3)


class Killed(Exception):
    pass


def test_an_interrupted_training_gives_the_same_weights(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([row["problem"] + row["solution"] for row in PROBLEMS], 300)
    texts, prompts = pair.encode(tokenizer, PROBLEMS)
    stop = tokenizer.token_to_id(END_OF_TEXT)
    assert all(text[-1] == stop and 0 < prompt < len(text) for text, prompt in zip(texts, prompts, strict=True))

    def train(state: Path, kill_at: int | None, recipe: training.Recipe = TINY) -> torch.Tensor:
        def report(line: str) -> None:
            if kill_at is not None and line.startswith(f"step {kill_at}/"):
                raise Killed

        model = training.train(recipe, texts, 300, stop, 0, state, report, every=2)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = train(tmp_path / "whole", None)
    with pytest.raises(Killed):
        train(tmp_path / "cut", 6)
    assert (tmp_path / "cut").exists()
    assert torch.equal(train(tmp_path / "cut", None), whole)
    other = dataclasses.replace(TINY, steps=8)
    assert not torch.equal(train(tmp_path / "cut", None, other), whole)  # a state of another recipe is not gone on with


def test_the_pair_is_two_model_folders_that_share_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair, "MODELS", {"teacher": TINY, "student": TINY})
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in PROBLEMS))
    command = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--vocabulary", "300"]
    pair.main([*command, "--teacher-steps", "30", "--student-steps", "2", "--threads", "1"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    losses = {row[1].strip(): float(row[4]) for row in rows[1:]}
    assert losses["teacher"] < losses["student"] < 7
    teacher, student = (load_tokenizer_at(str(tmp_path / "out" / name)) for name in ("teacher", "student"))
    assert vocabulary_fingerprint(teacher) == vocabulary_fingerprint(student)
    pair.main([*command, "--only", "teacher"])
    assert "there already" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.state"))


def test_the_hubs_rows_become_problems() -> None:
    hub = [{"question": "How many?", "answer": "She sold 48/2 = <<48/2=24>>24 clips.\nThat is all.\n#### 1,024"}]
    assert list(data.converted(hub, "train")) == [
        {
            "id": "gsm8k-train/0",
            "problem": "How many?",
            "solution": "She sold 48/2 = 24 clips.\nThat is all.",
            "answer": "1024",
        }
    ]
    with pytest.raises(ValueError, match="test row 0: no line '#### ANSWER'"):
        list(data.converted([{"question": "q", "answer": "none"}], "test"))
