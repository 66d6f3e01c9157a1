"""The rollout stage with real tiny models: what it commits, and that interruptions do not show."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from eopd.stages.engines.sampling import derive_seed
from eopd.stages.job import ModelRef, NullProgress
from eopd.stages.models.prompts import PromptSettings
from eopd.stages.rollout import student_topk
from eopd.stages.rollout.run import RolloutJob, run
from eopd.stages.rollout.settings import RolloutSettings
from eopd.stages.rollout.student_topk import StudentTopkJob
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import InputError
from eopd.storage.identity import Identity
from eopd.storage.records import read_rollouts
from eopd.storage.student_topk import StudentTopk, read_student_topk, write_student_topk
from tests.raises import raises
from tests.stages import sampled_oracle
from tests.stages.tiny_models import save_tiny
from tests.stages.tiny_tokenizer import save_tokenizer

PARTS = [[3, 0], [5, 1], [2, 3]]  # prompt 3 is drawn twice
STOPS = (2, 40, 41, 42, 43, 44, 45)


class Recorded(NullProgress):
    """Keeps what was shown; can fail when so many responses (or parts of a top-k) are done."""

    def __init__(self, fail_at: int = 10**9) -> None:
        self.lines: list[str] = []
        self.totals: dict[str, int] = {}
        self.tokens = self.done = self.responses = 0
        self.expected: list[tuple[int, int]] = []
        self.fail_at = fail_at

    def start(self, what: str, total: int, unit: str = "tokens") -> None:
        self.totals[what] = total

    def advance(self, n: int, **figures: float) -> None:
        finished = int(figures["responses"]) - self.responses if figures else n
        self.tokens += n if figures else 0
        self.responses += finished if figures else 0
        self.done += finished
        if self.done >= self.fail_at:
            raise KeyboardInterrupt

    def expect(self, total: int, in_hand: int = 0) -> None:
        self.expected.append((total, in_hand))

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelRef, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("policy")
    model = save_tiny("qwen3", folder)
    save_tokenizer(folder)
    return ModelRef(str(folder), fingerprint="f" * 64), model


def make_job(folder: Path, policy: ModelRef, *, rollout: dict[str, Any] | None = None, **prompts: Any) -> RolloutJob:
    folder.mkdir(exist_ok=True)
    rows = [{"id": f"p{i}", "prompt": "What is two plus two? " * (i + 1), "answer": str(i)} for i in range(6)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chosen: dict[str, Any] = {
        "samples_per_prompt": 3,
        "temperature": 0.8,
        "max_new_tokens": 12,
        "engine": "transformers",
    }
    columns = {"id": "id", "answer": "answer"}
    return RolloutJob(
        output=Artifact(folder, Identity("rollouts", 1, len(PARTS))),
        parts=range(len(PARTS)),
        settings=RolloutSettings(**(chosen | (rollout or {}))),
        progress=Recorded(),
        log_dir=folder,
        policy=policy,
        prompts=PromptSettings(
            **({"path": str(folder / "prompts.jsonl"), "columns": columns, "verifier": "exact"} | prompts)
        ),
        prompt_indices=PARTS,
        stop_ids=STOPS,
        seed=7,
    )


def topk_job(rollouts: RolloutJob, k: int = 5) -> StudentTopkJob:
    """The student's own top-k of what ``rollouts`` sampled."""
    return StudentTopkJob(
        output=Artifact(rollouts.output.folder.parent.parent, Identity("student_topk", 1, len(PARTS), {"k": k})),
        parts=range(len(PARTS)),
        rollouts=rollouts.output,
        policy=rollouts.policy,
        settings=rollouts.settings.model_copy(update={"student_topk": k}),
        progress=Recorded(),
    )


def checksums(artifact: Artifact) -> list[str]:
    return [artifact.marker(part).checksum for part in range(artifact.parts)]


def rows_of(job: RolloutJob, part: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_rollouts(job.output.part_folder(part)).to_pylist()
    return rows


def test_a_part_holds_the_samples_of_its_prompts(tmp_path: Path, policy: tuple[ModelRef, PreTrainedModel]) -> None:
    job = make_job(tmp_path, policy[0])
    run(job)
    assert job.output.is_complete()
    for part, indices in enumerate(PARTS):
        rows = rows_of(job, part)
        assert [row["prompt_index"] for row in rows] == [index for index in indices for _ in range(3)]
        for row in rows:
            assert row["prompt_id"] == f"p{row['prompt_index']}"
            assert (row["answer"], row["verifier"]) == (str(row["prompt_index"]), "exact")
            assert row["seed"] == derive_seed(7, row["prompt_id"], row["sample"])
            assert row["truncated_logprobs"] is None
            stop = row["stop_token_id"]
            assert (stop in STOPS) == (row["finish_reason"] == "stop")
            ids = row["response_token_ids"]
            assert not set(ids[:-1]) & set(STOPS)
            full = sampled_oracle.tempered(policy[1], row["prompt_token_ids"], ids, 0.8)
            np.testing.assert_allclose(row["logprobs"], sampled_oracle.at(full, ids), atol=1e-4)
    info = job.output.marker(1).info
    assert (info["prompts"], info["skipped"], info["responses"], info["engine"]) == (2, 0, 6, "transformers")
    assert info["tokens"] == sum(len(row["response_token_ids"]) for row in rows_of(job, 1))
    assert info["stop_rate"] == sum(row["finish_reason"] == "stop" for row in rows_of(job, 1)) / 6
    progress = job.progress
    assert isinstance(progress, Recorded)
    assert progress.lines[0].startswith("rollout: 18 responses")
    assert progress.done == 18
    assert progress.tokens == sum(job.output.marker(part).info["tokens"] for part in range(3))
    assert progress.expected[-1] == (progress.tokens, 0)
    assert "18 responses" in progress.lines[-1]


def test_a_prompt_drawn_twice_is_sampled_anew(tmp_path: Path, policy: tuple[ModelRef, PreTrainedModel]) -> None:
    job = make_job(tmp_path, policy[0])
    run(job)
    twice = [row for part in range(3) for row in rows_of(job, part) if row["prompt_index"] == 3]
    assert [row["sample"] for row in twice] == [0, 1, 2, 3, 4, 5]
    assert len({tuple(row["response_token_ids"]) for row in twice}) == 6


def test_parts_are_the_same_bytes_however_they_are_done(
    tmp_path: Path, policy: tuple[ModelRef, PreTrainedModel]
) -> None:
    whole, pieces = (make_job(tmp_path / name, policy[0]) for name in ("whole", "pieces"))
    run(whole)
    run(replace(pieces, parts=[2]))
    assert pieces.output.committed() == {2}
    with pytest.raises(KeyboardInterrupt):
        run(replace(pieces, progress=Recorded(fail_at=8)))  # in the second of the two parts that are left
    assert pieces.output.committed() == {0, 2}
    nonce = pieces.output.marker(0).nonce
    run(pieces)
    assert checksums(pieces.output) == checksums(whole.output)
    assert pieces.output.marker(0).nonce == nonce
    topk, topk_in_pieces = topk_job(whole), topk_job(pieces)
    student_topk.run(topk)
    with pytest.raises(KeyboardInterrupt):
        student_topk.run(replace(topk_in_pieces, progress=Recorded(fail_at=1)))
    assert topk_in_pieces.output.committed() == {0}
    student_topk.run(topk_in_pieces)
    student_topk.run(replace(topk_in_pieces, policy=ModelRef("./nowhere")))  # nothing is missing, nothing is loaded
    assert checksums(topk_in_pieces.output) == checksums(topk.output)
    assert not [folder for folder in pieces.output.folder.glob("part-*.*") if folder.is_dir() and not _named(folder)]


def _named(folder: Path) -> bool:
    marker = folder.parent / f"{folder.name.split('.')[0]}.json"
    return bool(json.loads(marker.read_text())["nonce"] == folder.suffix[1:])


def test_the_students_own_top_k(tmp_path: Path, policy: tuple[ModelRef, PreTrainedModel]) -> None:
    job = make_job(tmp_path, policy[0])
    run(job)
    topk = topk_job(job)
    student_topk.run(topk)
    assert topk.output.is_complete()
    assert topk.output.marker(0).inputs["rollouts"] == job.output.marker(0).checksum
    result, rows = read_student_topk(topk.output.part_folder(0)), rows_of(job, 0)
    assert result.lengths.tolist() == [len(row["response_token_ids"]) for row in rows]
    full = np.concatenate(
        [sampled_oracle.tempered(policy[1], r["prompt_token_ids"], r["response_token_ids"], 0.8) for r in rows]
    )
    expected = np.sort(full, axis=1)[:, ::-1][:, :5]
    np.testing.assert_allclose(result.logprobs, expected, atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(full, result.ids, 1), expected, atol=1e-4)


@pytest.mark.parametrize("k", [0, 321])
def test_a_top_k_that_the_vocabulary_cannot_give_is_refused(
    tmp_path: Path, policy: tuple[ModelRef, PreTrainedModel], k: int
) -> None:
    with raises(InputError, "320", setting="rollout.student_topk"):
        student_topk.run(topk_job(make_job(tmp_path, policy[0]), k))


def test_longer_prompts_are_skipped_and_counted_or_refused(
    tmp_path: Path, policy: tuple[ModelRef, PreTrainedModel]
) -> None:
    job = make_job(tmp_path / "skip", policy[0], template="plain", max_prompt_tokens=20)
    run(job)
    lengths = [len(rows_of(job, part)) for part in range(3)]
    infos = [job.output.marker(part).info for part in range(3)]
    skipped = [info["skipped"] for info in infos]
    assert lengths == [3 * info["prompts"] for info in infos]
    assert skipped == [1, 1, 2]  # prompts 3, 5, 2 and 3 again
    assert lengths[2] == 0
    assert infos[2]["stop_rate"] is None
    assert isinstance(job.progress, Recorded)
    assert job.progress.lines[0].startswith("rollout: skipped 4 of 6 prompts are longer than")
    refusing = make_job(tmp_path / "refuse", policy[0], template="plain", max_prompt_tokens=20, too_long="refuse")
    with raises(InputError, setting="prompts.max_prompt_tokens", file="prompts.jsonl", prompt="p3"):
        run(refusing)
    none_left = make_job(tmp_path / "none", policy[0], template="plain", max_prompt_tokens=2)
    with raises(InputError, "6 of 6", setting="prompts.max_prompt_tokens", file="prompts.jsonl"):
        run(none_left)
    assert not refusing.output.committed()
    assert not none_left.output.committed()


def test_bad_prompts_are_found_before_a_model_is_loaded(
    tmp_path: Path, policy: tuple[ModelRef, PreTrainedModel]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    save_tokenizer(bare)  # a tokenizer and no model: loading one would fail otherwise
    job = make_job(tmp_path, ModelRef(str(bare)))
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "x", "answer": "1"}\nno\n')
    with raises(InputError, file="prompts.jsonl", line=2):
        run(job)
    assert not job.output.committed()


def test_nothing_is_loaded_when_nothing_is_missing(tmp_path: Path, policy: tuple[ModelRef, PreTrainedModel]) -> None:
    job = make_job(tmp_path, policy[0])
    run(job)
    (tmp_path / "prompts.jsonl").unlink()
    run(replace(job, policy=ModelRef("./nowhere")))


def test_a_stored_top_k_keeps_its_shape(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lengths = np.array([2, 0, 3], dtype=np.int32)
    written = StudentTopk(lengths, random.integers(0, 9, (5, 2), np.int32), random.random((5, 2), np.float32))
    write_student_topk(tmp_path, written)
    rows = read_student_topk(tmp_path)
    np.testing.assert_array_equal(rows.lengths, lengths)
    np.testing.assert_array_equal(rows.ids, written.ids)
    np.testing.assert_array_equal(rows.logprobs, written.logprobs)
    none = StudentTopk(np.zeros(0, np.int32), np.zeros((0, 2), np.int32), np.zeros((0, 2), np.float32))
    write_student_topk(tmp_path, none)
    assert read_student_topk(tmp_path).ids.shape == (0, 2)


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_with_vllm_a_part_sampled_alone_is_the_same_bytes(
    tmp_path: Path, policy: tuple[ModelRef, PreTrainedModel]
) -> None:
    options = {"engine": "vllm", "engine_options": {"cpu_kv_cache_gib": 0.25, "cpu_threads": 1}, "top_p": 0.9}
    whole = make_job(tmp_path / "whole", policy[0], rollout=options)
    run(whole)
    alone = make_job(tmp_path / "alone", policy[0], rollout=options)
    run(replace(alone, parts=[2]))
    assert alone.output.marker(2).checksum == whole.output.marker(2).checksum
    assert whole.output.marker(0).info["engine"] == "vllm"
    for row in rows_of(whole, 0):
        full = sampled_oracle.tempered(policy[1], row["prompt_token_ids"], row["response_token_ids"], 0.8)
        cut = sampled_oracle.at(sampled_oracle.truncated(full, top_p=0.9), row["response_token_ids"])
        assert row["logprobs"] is None
        np.testing.assert_allclose(row["truncated_logprobs"], cut, atol=1e-3)


class Threads(NullProgress):
    """Keeps how many threads torch used when a bar moved."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def advance(self, n: int, **figures: float) -> None:
        self.seen.append(torch.get_num_threads())


def test_the_students_top_k_is_computed_on_as_many_threads_as_configured(
    tmp_path: Path, policy: tuple[ModelRef, PreTrainedModel]
) -> None:
    before = torch.get_num_threads()
    run(make_job(tmp_path, policy[0]))
    job = topk_job(make_job(tmp_path, policy[0], rollout={"engine_options": {"cpu_threads": before + 2}}))
    threads = Threads()
    student_topk.run(replace(job, progress=threads))
    assert threads.seen == [before + 2] * len(PARTS)
    assert torch.get_num_threads() == before


def test_a_student_is_not_sampled_where_its_positions_scale_otherwise(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "rope_theta": 1e4}
    save_tiny("phi3", tmp_path / "student", rope_parameters=rope, original_max_position_embeddings=64)
    save_tokenizer(tmp_path / "student")
    job = make_job(tmp_path, ModelRef(str(tmp_path / "student")), max_prompt_tokens=200)
    with raises(InputError, "64 tokens", remedy="rollout.max_new_tokens"):
        run(job)
    assert job.output.committed() == set()
