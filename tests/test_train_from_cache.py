"""The examples that other people's trainers start from: transformers.Trainer and TRL read the cache, or an export."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.exchange import export_sequences
from eopd.storage.identity import Identity
from eopd.storage.records import write_rollouts
from eopd.storage.teacher_cache import TeacherCache, write_part
from eopd.storage.teacher_record import HeadRule
from examples.trainers import train_from_cache, train_from_export
from examples.trainers.train_from_cache import Collator, responses
from tests.stages.tiny_tokenizer import save_tokenizer
from tests.storage.making import Dense, header, rows_of

VOCABULARY = 40


def teacher(tokens: np.ndarray, seed: int = 0) -> np.ndarray:
    """[T, V] log-probs that depend on the token before: something that can be learnt."""
    table = np.random.default_rng(seed).standard_normal((VOCABULARY, VOCABULARY)) * 2.0
    logits = table[np.concatenate([[1], tokens[:-1]])]
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def make_store(store: Path, rule: HeadRule | None = None) -> Artifact:
    rule = rule or HeadRule(k_max=8)
    rng = np.random.default_rng(1)
    rollouts = Artifact(store, Identity("rollouts", 1, 2))
    scores = Artifact(store, Identity("scores", 1, 2, {}, {"rollouts": rollouts.key}, {"head": "aware"}))
    for part in range(2):
        lengths = [7, 0, 12, 5]
        sampled = [rng.integers(0, VOCABULARY, length) for length in lengths]
        records = [
            {
                "prompt_id": str(row), "prompt_index": row, "sample": 0, "seed": 0, "finish_reason": "length",
                "prompt_token_ids": [2, 1], "response_token_ids": tokens.tolist(),
            }
            for row, tokens in enumerate(sampled)
        ]  # fmt: skip
        with rollouts.write_part(part) as folder:
            write_rollouts(folder, records)
        logprobs = np.concatenate([teacher(tokens) for tokens in sampled if len(tokens)])
        result = Dense(logprobs, np.concatenate(sampled), np.asarray(lengths))
        with scores.write_part(part) as folder:
            write_part(folder, rows_of(result, rule), header(rule, VOCABULARY))
    return scores


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def rows(*places: tuple[int, int]) -> list[dict[str, int]]:
    return [{"part": part, "row": row} for part, row in places]


def test_positions_and_targets(tmp_path: Path) -> None:
    scores = make_store(tmp_path)
    cache = TeacherCache(scores)
    assert responses(cache) == rows((0, 0), (0, 2), (0, 3), (1, 0), (1, 2), (1, 3))
    short = Artifact(tmp_path, Identity("scores", 1, 2, {}, {"rollouts": "other"}, {"head": "aware"}))
    with short.write_part(0) as folder:
        shutil.copytree(scores.part_folder(0), folder, dirs_exist_ok=True)
    short.set_aside(1, "NaN logits")
    assert len(responses(TeacherCache(short))) == 3, "a part that was set aside holds nothing"
    rollouts = Artifact(tmp_path, Identity("rollouts", 1, 2))
    batch = Collator(cache, rollouts)(rows((0, 2), (1, 0)))
    ids = batch["input_ids"]
    assert ids.shape == (2, 14)
    assert batch["attention_mask"].sum().item() == 14 + 9
    assert batch["labels"].ne(-100).sum(dim=1).tolist() == [12, 7]
    stored = cache.read([(0, 2), (1, 0)])
    # the first support entry of each token is the teacher's best id after the token that is read at its position
    flat = ids.flatten()
    best = np.asarray([teacher(np.asarray([0, 0]))[0]] * 1)  # after token 1
    assert flat[batch["position"][0]].item() == 1
    assert stored.head_ids[0] == best[0].argmax()
    mass = torch.zeros(ids.numel()).index_add(0, batch["position"], batch["target"])
    assert abs(mass.sum().item() / stored.tokens - 1.0) < 0.05


TRAINERS = pytest.mark.parametrize("trainer", ["transformers", "trl"])


@TRAINERS
def test_a_trainer_learns_from_the_cache(tmp_path: Path, student: Path, trainer: str) -> None:
    if trainer == "trl":
        pytest.importorskip("trl", reason="TRL is not installed (the extra `peers`): its recipe is not tested")
    scores = make_store(tmp_path / "store")
    losses = train_from_cache.train(
        str(tmp_path / "store"), scores.key[:8], str(student), tmp_path / "out", steps=30, batch=6, rate=1e-2,
        trainer=trainer,
    )  # fmt: skip
    assert losses[-1] < losses[0] - 0.3
    assert (tmp_path / "out" / "config.json").exists()


def test_a_step_of_several_batches_is_that_of_one(tmp_path: Path, student: Path) -> None:
    """Tokens are weighed alike in batches of other lengths."""
    scores = make_store(tmp_path / "store")
    logged = [
        train_from_cache.train(
            str(tmp_path / "store"), scores.key, str(student), tmp_path / f"{batch}", steps=1, batch=batch, rate=1e-2,
            accumulate=6 // batch,
        )
        for batch in (6, 2)
    ]  # fmt: skip
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


@TRAINERS
def test_a_trainer_learns_from_an_export(tmp_path: Path, student: Path, trainer: str) -> None:
    if trainer == "trl":
        pytest.importorskip("trl", reason="TRL is not installed (the extra `peers`): its recipe is not tested")
    scores = make_store(tmp_path / "store")
    rollouts = open_artifact(tmp_path / "store", "rollouts", scores.identity.inputs["rollouts"])
    export_sequences(TeacherCache(scores), rollouts, tmp_path / "kd.parquet")
    losses = train_from_export.train(
        tmp_path / "kd.parquet", str(student), tmp_path / "out", steps=30, batch=6, rate=1e-2, trainer=trainer
    )
    assert losses[-1] < losses[0] - 0.3
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("k", [VOCABULARY, 3])
def test_the_loss_of_an_export_is_the_divergence(tmp_path: Path, student: Path, k: int) -> None:
    """Cross-entropy to the teacher where everything is stored; where it is not, of a coarser distribution."""
    scores = make_store(tmp_path / "store", HeadRule(k_max=k, full_head_above=-1.0, draws="none"))
    rollouts = open_artifact(tmp_path / "store", "rollouts", scores.identity.inputs["rollouts"])
    export_sequences(TeacherCache(scores), rollouts, tmp_path / "kd.parquet")
    table = load_dataset("parquet", data_files=str(tmp_path / "kd.parquet"), cache_dir=str(tmp_path), split="train")
    batch = train_from_export.collate(table.to_list())
    model = AutoModelForCausalLM.from_pretrained(student)
    loss = train_from_export.ExportLoss().compute_loss(model, batch)
    exact, tokens = 0.0, 0
    with torch.no_grad():
        for row in table.to_list():
            response = np.asarray([token for token in row["labels"] if token != -100])
            logits = model(torch.tensor([row["input_ids"]])).logits[0, -len(response) - 1 : -1]
            exact -= float((torch.tensor(teacher(response)).exp() * logits.log_softmax(-1)).sum())
            tokens += len(response)
    exact /= tokens
    if k == VOCABULARY:
        assert loss.item() == pytest.approx(exact, rel=1e-3)
    else:
        assert 0.0 < loss.item() < exact
    loss.backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())
