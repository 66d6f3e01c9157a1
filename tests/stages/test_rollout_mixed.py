"""Responses of which some tokens are written under the plain prompt and the others under an expert prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eopd.stages.engines.sampling import derive_seed
from eopd.stages.job import ModelRef
from eopd.stages.judge.settings import JudgeSettings
from eopd.stages.models.chat_templates import parse_conversation
from eopd.stages.models.prompts import Prompt, PromptSettings
from eopd.stages.rollout.mixed import coins, expert_reader
from eopd.stages.rollout.run import RolloutJob, run
from eopd.stages.rollout.segments import Draft, Draw
from eopd.stages.rollout.settings import ExpertSettings
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import InputError
from eopd.storage.identity import Identity
from eopd.storage.records import Writer
from tests.raises import raises
from tests.stages import sampled_oracle
from tests.stages.test_rollout import PARTS, STOPS, Recorded, checksums, make_job, policy, rows_of
from tests.stages.tiny_tokenizer import TEMPLATE, tiny_tokenizer

__all__ = ["policy"]

SUFFIX = " The answer is {{answer}}."


def mixed_job(
    folder: Path, student: ModelRef, share: float, *, temperature: float | None = None, **changes: Any
) -> RolloutJob:
    settings = {"student_share": share, "temperature": temperature, "expert": {"suffix": SUFFIX}}
    prompts = changes.pop("prompts", {})
    job = make_job(folder, student, rollout={"source": "mixed", "mixed": settings, **changes}, **prompts)
    return replace(job, output=Artifact(folder, Identity("rollouts", 1, len(PARTS), {"share": share})))


def rows(job: RolloutJob) -> list[dict[str, Any]]:
    return [row for part in range(len(PARTS)) for row in rows_of(job, part)]


def expert_ids(row: dict[str, Any]) -> list[int]:
    text = f"<turn>user: {json.loads(row['messages'])[0]['content']} The answer is {row['answer']}.</turn>"
    return [int(token) for token in tiny_tokenizer()(f"{text}<turn>assistant: ")["input_ids"]]


@pytest.mark.parametrize("writer", [Writer.POLICY, Writer.EXPERT])
def test_at_its_ends_it_is_what_one_of_the_two_samples(
    tmp_path: Path, policy: tuple[ModelRef, Any], writer: Writer
) -> None:
    job = mixed_job(tmp_path / "mixed", policy[0], float(writer is Writer.POLICY))
    run(job)
    alone = make_job(tmp_path / "alone", policy[0])
    if writer is Writer.EXPERT:
        path = Path(alone.prompts.path)
        prompts = [json.loads(line) for line in path.read_text().splitlines()]
        shown = [{**row, "prompt": f"{row['prompt']} The answer is {row['answer']}."} for row in prompts]
        path.write_text("\n".join(map(json.dumps, shown)))
    run(alone)
    for ours, theirs in zip(rows(job), rows(alone), strict=True):
        assert ours["response_token_ids"] == theirs["response_token_ids"]
        assert ours["written"] == [writer] * len(ours["response_token_ids"])
        assert (ours["seed"], ours["finish_reason"]) == (theirs["seed"], theirs["finish_reason"])
        np.testing.assert_allclose(ours["logprobs"], theirs["logprobs"], atol=1e-4)
        assert "The answer" not in tiny_tokenizer().decode(ours["prompt_token_ids"])


@pytest.mark.parametrize("temperature", [None, 0.0])
def test_each_token_is_drawn_under_its_writer_s_context(
    tmp_path: Path, policy: tuple[ModelRef, Any], temperature: float | None
) -> None:
    job = mixed_job(tmp_path, policy[0], 0.5, temperature=temperature)
    run(job)
    used = 1.0 if temperature == 0.0 else 0.8
    for row in rows(job):
        ids, by_expert = row["response_token_ids"], np.asarray(row["written"]) == Writer.EXPERT
        plain = sampled_oracle.tempered(policy[1], row["prompt_token_ids"], ids, used)
        expert = sampled_oracle.tempered(policy[1], expert_ids(row), ids, used)
        drawn_from = np.where(by_expert[:, None], expert, plain)
        np.testing.assert_allclose(row["logprobs"], sampled_oracle.at(drawn_from, ids), atol=1e-4)
        if temperature == 0.0:
            assert np.argmax(drawn_from, axis=1).tolist() == ids
    written = {token for row in rows(job) for token in row["written"]}
    assert written == {Writer.POLICY, Writer.EXPERT}
    experts = sum(row["written"].count(Writer.EXPERT) for row in rows_of(job, 0))
    assert job.output.marker(0).info["expert_tokens"] == experts


def draft(name: str, sample: int, attempt: int = 0) -> Draft:
    prompt = Prompt(0, name, parse_conversation("x"), None, None, None)
    return Draft(Draw(prompt, [1], [1], 0, 0), sample, derive_seed(7, name, sample), attempt)


def test_coins_follow_from_seed_prompt_sample_and_attempt_alone() -> None:
    first = coins(7, draft("p", 0), 400, 0.5)
    assert np.array_equal(first, coins(7, replace(draft("p", 0), seed=99), 400, 0.5))
    assert np.array_equal(first[:10], coins(7, draft("p", 0), 10, 0.5))
    others = [draft("q", 0), draft("p", 1), draft("p", 0, attempt=1)]
    for other in (coins(8, draft("p", 0), 400, 0.5), *(coins(7, one, 400, 0.5) for one in others)):
        assert 0.4 < (other != first).mean() < 0.6
    more, fewer = coins(7, draft("p", 0), 400, 0.3), coins(7, draft("p", 0), 400, 0.7)
    assert 0.62 < more.mean() < 0.78
    assert not (fewer & ~more).any()


def test_tokens_depend_on_neither_batch_nor_interruption(tmp_path: Path, policy: tuple[ModelRef, Any]) -> None:
    whole, broken = (mixed_job(tmp_path / name, policy[0], 0.4) for name in ("whole", "broken"))
    run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(replace(broken, progress=Recorded(fail_at=9)))
    assert 0 < len(broken.output.committed()) < len(PARTS)
    run(broken)
    assert checksums(broken.output) == checksums(whole.output)
    single = mixed_job(tmp_path / "single", policy[0], 0.4, engine_options={"max_batch": 1})
    run(single)
    for one, other in zip(rows(single), rows(whole), strict=True):
        assert (one["response_token_ids"], one["written"]) == (other["response_token_ids"], other["written"])


def test_another_attempt_has_other_coins(tmp_path: Path, policy: tuple[ModelRef, Any]) -> None:
    """With the most probable token of either context, coins are all that is random."""
    job = mixed_job(tmp_path, policy[0], 0.5, temperature=0.0, attempts={"most": 3})
    job = replace(job, judge=JudgeSettings())
    run(job)
    for row in rows(job):
        assert (row["correct"], row["attempts"]) == (False, 3)
        length = len(row["response_token_ids"])
        expected = coins(7, draft(row["prompt_id"], row["sample"], attempt=2), 12, 0.5)[:length]
        assert (np.asarray(row["written"]) == Writer.EXPERT).tolist() == expected.tolist()


def test_an_expert_prompt_that_is_too_long_is_skipped_or_refused(tmp_path: Path, policy: tuple[ModelRef, Any]) -> None:
    plain = make_job(tmp_path / "plain", policy[0])
    run(plain)
    lengths = {row["prompt_id"]: len(row["prompt_token_ids"]) for row in rows(plain)}
    limit = {"max_prompt_tokens": lengths["p3"]}  # p2 and p3 fit as the student reads them
    skipping = mixed_job(tmp_path / "skip", policy[0], 0.5, prompts=limit)
    run(skipping)
    assert {row["prompt_id"] for row in rows(skipping)} == {"p0", "p1"}
    refusing = mixed_job(tmp_path / "refuse", policy[0], 0.5, prompts={**limit, "too_long": "refuse"})
    with raises(InputError, "rollout.mixed.expert", setting="prompts.max_prompt_tokens", prompt="p3"):
        run(refusing)


@pytest.mark.parametrize(
    ("template", "expert", "words"),
    [
        (TEMPLATE, {"suffix": SUFFIX}, "no answer"),
        (
            TEMPLATE.replace("assistant: ", "assistant{{ messages | length }}: "),
            {"system": "Be right."},
            "assistant2.*assistant1",
        ),
    ],
)
def test_what_the_expert_could_not_go_on_from_is_refused(template: str, expert: dict[str, str], words: str) -> None:
    tokenizer, settings = tiny_tokenizer(), PromptSettings(path="p.jsonl")
    tokenizer.chat_template = template
    reader = expert_reader(tokenizer, settings, ExpertSettings.model_validate(expert))
    with raises(InputError, words, setting="rollout.mixed.expert", file="p.jsonl", prompt="p"):
        reader(draft("p", 0).draw.prompt, [1])


def test_stops_end_mixed_responses(tmp_path: Path, policy: tuple[ModelRef, Any]) -> None:
    job = replace(mixed_job(tmp_path, policy[0], 0.5), stop_ids=(*STOPS, *range(50, 120)))
    run(job)
    ended = [row for row in rows(job) if row["finish_reason"] == "stop"]
    assert ended
    assert all(row["response_token_ids"][-1] == row["stop_token_id"] for row in ended)
    assert all(len(row["written"]) == len(row["response_token_ids"]) for row in rows(job))
