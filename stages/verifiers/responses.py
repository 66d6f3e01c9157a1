"""Verdicts on responses as token ids, by the verifier of their prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eopd.stages.models.tokenizers import response_text
from eopd.stages.verifiers.registry import Verifier
from eopd.stages.verifiers.verdict import Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATED = "the response was cut at the length limit"


@dataclass(frozen=True)
class Answered:
    """A response and the reference answer to its prompt."""

    token_ids: Sequence[int]
    finish_reason: str
    stop_token_id: int | None
    answer: str


def judge_responses(
    verifier: Verifier, tokenizer: PreTrainedTokenizerBase, responses: Sequence[Answered]
) -> list[Verdict]:
    """Judge responses. One that was cut at the length limit is wrong, whatever its text holds: it was not finished."""
    finished = [one for one in responses if one.finish_reason != "length"]
    pairs = [(response_text(tokenizer, one.token_ids, one.stop_token_id), one.answer) for one in finished]
    judged = iter(verifier.verify_many(pairs))
    return [Verdict(False, reason=TRUNCATED) if one.finish_reason == "length" else next(judged) for one in responses]


def check_answers(verifier: Verifier, answers: Iterable[tuple[str, str | None]], where: str) -> None:
    """Check the reference answers of prompts, given as pairs (prompt id, answer).

    Raises:
        ValueError: an answer is missing, or the verifier cannot read it; names the prompt.
    """
    for prompt, answer in dict.fromkeys(answers):
        try:
            if answer is None:
                raise ValueError("there is no reference answer; name its column in prompts.columns.answer")
            verifier.check_answer(answer)
        except ValueError as error:
            raise ValueError(f"{where}, prompt {prompt!r}: {error}") from error
