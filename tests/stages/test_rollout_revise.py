"""Responses that hold a first answer, a phrase by the verdict on it, and a second answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eopd.stages.job import ModelRef
from eopd.stages.judge.settings import JudgeSettings
from eopd.stages.models.loading import load_model
from eopd.stages.models.tokenizers import response_text
from eopd.stages.rollout import run as stage
from eopd.stages.rollout.run import RolloutJob, run
from eopd.stages.train.responses import load_responses, region_of
from eopd.stages.train.run import run as train
from eopd.stages.verifiers.registry import PlainVerifier
from eopd.stages.verifiers.verdict import Verdict
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import InputError
from eopd.storage.identity import Identity
from eopd.storage.records import Writer, write_rollouts
from tests.raises import raises
from tests.stages import sampled_oracle
from tests.stages.score_case import random_responses
from tests.stages.test_rollout import PARTS, Recorded, checksums, make_job, policy, rows_of
from tests.stages.tiny_models import save_teacher
from tests.stages.tiny_tokenizer import tiny_tokenizer
from tests.stages.train_case import read_rows, train_job

__all__ = ["policy"]

STOPS = (2, *range(40, 100))
FIRST, LONGEST = 8, 24
PHRASES = {"wrong": " It is not.", "right": " It is."}


def is_right(text: str) -> bool:
    return sum(text.encode()) % 2 == 0


@pytest.fixture(autouse=True)
def verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    made = PlainVerifier("even", lambda response, _: Verdict(is_right(response)), 1)
    monkeypatch.setattr(stage, "open_verifier", lambda name, **_: made)


def revise_job(folder: Path, student: ModelRef, *, always: bool = False, **changes: Any) -> RolloutJob:
    phrases = PHRASES if always else {"wrong": PHRASES["wrong"]}
    settings = {"when": "always" if always else "wrong", "phrases": phrases, "first_tokens": FIRST, **changes}
    job = make_job(folder, student, rollout={"source": "revise", "revise": settings, "max_new_tokens": LONGEST})
    return replace(job, judge=JudgeSettings(), stop_ids=STOPS)


def rows(job: RolloutJob) -> list[dict[str, Any]]:
    return [row for part in range(len(PARTS)) for row in rows_of(job, part)]


def right(ids: list[int], stop: int | None) -> bool:
    return stop is not None and is_right(response_text(tiny_tokenizer(), ids, stop))


@pytest.mark.parametrize("always", [False, True])
def test_a_phrase_by_the_verdict_and_a_second_answer_follow(
    tmp_path: Path, policy: tuple[ModelRef, Any], always: bool
) -> None:
    firsts = replace(make_job(tmp_path / "first", policy[0], rollout={"max_new_tokens": FIRST}), stop_ids=STOPS)
    run(firsts)
    job = revise_job(tmp_path / "revised", policy[0], always=always)
    run(job)
    seen = set()
    for row, first in zip(rows(job), rows(firsts), strict=True):
        ids, writers = row["response_token_ids"], row["written"]
        was_right = right(first["response_token_ids"], first["stop_token_id"])
        seen.add(was_right)
        full = sampled_oracle.tempered(policy[1], row["prompt_token_ids"], ids, 0.8)
        sampled = np.asarray(writers) == Writer.POLICY
        np.testing.assert_allclose(
            np.asarray(row["logprobs"])[sampled], sampled_oracle.at(full, ids)[sampled], atol=1e-4
        )
        if was_right and not always:
            assert (ids, row["correct"], set(writers)) == (first["response_token_ids"], True, {Writer.POLICY})
            continue
        answer = [token for token in first["response_token_ids"] if token not in STOPS]
        phrase = tiny_tokenizer()(PHRASES["right" if was_right else "wrong"], add_special_tokens=False)["input_ids"]
        begun = [*answer, *phrase]
        assert ids[: len(begun)] == begun
        rest = len(ids) - len(begun)
        assert writers == [Writer.POLICY] * len(answer) + [Writer.TEXT] * len(phrase) + [Writer.POLICY] * rest
        assert np.isnan(np.asarray(row["logprobs"])[~sampled]).all()
        assert row["correct"] == right(ids[len(begun) :], row["stop_token_id"])
        assert 0 < rest <= LONGEST - len(begun)
        assert (row["finish_reason"] == "stop") == (ids[-1] in STOPS)
    assert seen == {False, True}
    assert job.output.marker(0).info["revised"] == sum(Writer.TEXT in row["written"] for row in rows_of(job, 0))


def test_interrupted_revisions_are_the_same_bytes(tmp_path: Path, policy: tuple[ModelRef, Any]) -> None:
    whole, broken = (revise_job(tmp_path / name, policy[0]) for name in ("whole", "broken"))
    run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(replace(broken, progress=Recorded(fail_at=15)))
    assert 0 < len(broken.output.committed()) < len(PARTS)
    run(broken)
    assert checksums(broken.output) == checksums(whole.output)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"phrases": {"wrong": "No.</turn>"}}, "rollout.revise.phrases.wrong"),
        ({"phrases": {"wrong": "What"}}, "rollout.revise.phrases.wrong"),
        ({"phrases": {"wrong": "not " * 20}}, "rollout.revise"),
    ],
)
def test_a_phrase_that_would_end_or_fill_a_response_is_refused(
    tmp_path: Path, policy: tuple[ModelRef, Any], changes: dict[str, Any], setting: str
) -> None:
    job = revise_job(tmp_path, policy[0], **changes)
    stops = tiny_tokenizer()("What", add_special_tokens=False)["input_ids"] if "What" in str(changes) else (2,)
    with raises(InputError, setting=setting):
        run(replace(job, stop_ids=tuple(stops)))
    assert not job.output.committed()


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "source", "region"),
    [
        ("own", "revise", ["110011", "1111"]),
        ("all", "revise", ["111111", "0000"]),
        ("after_text", "revise", ["000011", "0000"]),
        ("own", "mixed", ["110011", "1111"]),
        ("all", "mixed", None),
        ("own", "student", None),
        ("own", "prefix", None),
        ("all", "data", None),
    ],
)
def test_which_tokens_are_trained_on(tokens: Any, source: Any, region: list[str] | None) -> None:
    result = region_of(tokens, source)
    if region is None:
        assert result is None
        return
    assert result is not None
    other = Writer.TEXT if source == "revise" else Writer.EXPERT
    for written, expected in zip(([0, 0, other, other, 0, 0], [0] * 4), region, strict=True):
        assert "".join(str(int(one)) for one in result(np.asarray(written, np.int8))) == expected


def revised_world(folder: Path) -> tuple[Artifact, list[dict[str, Any]]]:
    """Eight responses in two parts; every other one holds two tokens of text after its first three."""
    save_teacher("qwen3", folder / "student", seed=1)
    made = random_responses(8, seed=3, most=12)
    for number, row in enumerate(made):
        length = len(row["response_token_ids"])
        row["written"] = [0] * length
        if number % 2 and length > 6:
            row["written"][3:5] = [int(Writer.TEXT)] * 2
    artifact = Artifact(folder / "store", Identity("rollouts", 1, 2, settings={"name": "revised"}))
    for part, of_part in enumerate((made[:5], made[5:])):
        with artifact.write_part(part) as target:
            write_rollouts(target, of_part, writers=True)
    return artifact, made


@pytest.mark.parametrize("tokens", ["all", "own", "after_text"])
def test_the_loss_is_of_the_tokens_in_the_region_alone(tmp_path: Path, tokens: Any) -> None:
    rollouts, made = revised_world(tmp_path)
    region = region_of(tokens, "revise")
    assert region is not None
    model = load_model(ModelRef(str(tmp_path / "student")))
    losses: list[float] = []
    kept = 0
    for row in made:
        ids, mask = row["response_token_ids"], region(np.asarray(row["written"], np.int8))
        logprobs = sampled_oracle.at(sampled_oracle.tempered(model, row["prompt_token_ids"], ids, 1.0), ids)
        losses += (-logprobs[mask]).tolist()
        kept += bool(mask.any())
    responses = load_responses(rollouts, None, None, region)
    assert (len(responses), responses.left_out) == (kept, 8 - kept)
    job = train_job(
        tmp_path,
        tokens,
        rollouts=rollouts,
        scores=(),
        source="revise",
        tokens=tokens,
        objective={"name": "sft"},
        batch_responses=8,
        epochs=1,
        max_logprob_gap=100.0,
    )
    train(job)
    (step,) = read_rows(job)
    assert step["tokens"] == len(losses)
    assert step["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
