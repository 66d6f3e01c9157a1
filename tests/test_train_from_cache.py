"""The example that other people's trainers start from: a plain transformers.Trainer reads the cache and learns."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from eopd.storage.artifacts import Artifact
from eopd.storage.identity import Identity
from eopd.storage.rollouts import write_rollouts
from eopd.storage.teacher_cache import TeacherCache, write_part
from eopd.storage.teacher_record import HeadRule
from examples.train_from_cache import Collator, Scored, train
from tests.storage.making import Dense, header, rows_of

VOCABULARY = 40


def teacher(tokens: np.ndarray, seed: int = 0) -> np.ndarray:
    """[T, V] log-probs that depend on the token before: something that can be learnt."""
    table = np.random.default_rng(seed).standard_normal((VOCABULARY, VOCABULARY)) * 2.0
    logits = table[np.concatenate([[1], tokens[:-1]])]
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def make_store(store: Path) -> Artifact:
    rng = np.random.default_rng(1)
    rollouts = Artifact(store, Identity("rollouts", 1, 2))
    scores = Artifact(store, Identity("scores", 1, 2, {}, {"rollouts": rollouts.key}, {"head": "aware"}))
    for part in range(2):
        lengths = [7, 0, 12, 5]
        responses = [rng.integers(0, VOCABULARY, length) for length in lengths]
        records = [
            {
                "prompt_id": str(row), "prompt_index": row, "sample": 0, "seed": 0, "finish_reason": "length",
                "prompt_token_ids": [2, 1], "response_token_ids": tokens.tolist(),
            }
            for row, tokens in enumerate(responses)
        ]  # fmt: skip
        with rollouts.write_part(part) as folder:
            write_rollouts(folder, records)
        logprobs = np.concatenate([teacher(tokens) for tokens in responses if len(tokens)])
        found = Dense(logprobs, np.concatenate(responses), np.asarray(lengths))
        with scores.write_part(part) as folder:
            write_part(folder, rows_of(found, HeadRule(k_max=8)), header(HeadRule(k_max=8), VOCABULARY))
    return scores


def test_positions_and_targets(tmp_path: Path) -> None:
    scores = make_store(tmp_path)
    cache = TeacherCache(scores)
    places = Scored(cache).places
    assert places == [(0, 0), (0, 2), (0, 3), (1, 0), (1, 2), (1, 3)]
    short = Artifact(tmp_path, Identity("scores", 1, 2, {}, {"rollouts": "other"}, {"head": "aware"}))
    with short.write_part(0) as folder:
        shutil.copytree(scores.part_folder(0), folder, dirs_exist_ok=True)
    short.set_aside(1, "NaN logits")
    assert Scored(TeacherCache(short)).places == [(0, 0), (0, 2), (0, 3)], "a part that was set aside holds nothing"
    rollouts = Artifact(tmp_path, Identity("rollouts", 1, 2))
    batch = Collator(cache, rollouts)([(0, 2), (1, 0)])
    ids = batch["input_ids"]
    assert ids.shape == (2, 14)
    assert batch["attention_mask"].sum().item() == 14 + 9
    rows = cache.read([(0, 2), (1, 0)])
    # the first support entry of each token is the teacher's best id after the token that is read at its position
    flat = ids.flatten()
    best = np.asarray([teacher(np.asarray([0, 0]))[0]] * 1)  # after token 1
    assert flat[batch["position"][0]].item() == 1
    assert rows.head_ids[0] == best[0].argmax()
    mass = torch.zeros(ids.numel()).index_add(0, batch["position"], batch["target"])
    assert abs(mass.sum().item() / rows.tokens - 1.0) < 0.05


def test_a_plain_trainer_learns_from_the_cache(tmp_path: Path) -> None:
    scores = make_store(tmp_path / "store")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "student")
    losses = train(
        tmp_path / "store", scores.key[:8], str(tmp_path / "student"), tmp_path / "out", steps=30, batch=6, rate=1e-2
    )
    assert losses[-1] < losses[0] - 0.3
    assert (tmp_path / "out" / "config.json").exists()
