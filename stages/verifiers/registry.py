"""Verifiers by name, the values of ``verifier:``, and verdicts on responses as token ids.

A verifier judges many (response, reference answer) pairs at once, so that one that needs processes can use several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, get_args

from eopd.stages.models.prompts import VerifierName
from eopd.stages.models.tokenizers import response_text
from eopd.stages.verifiers import countdown, exact
from eopd.stages.verifiers.mathematics import MATH_RULES, MathVerifier
from eopd.stages.verifiers.verdict import UNREADABLE, Verdict
from eopd.storage.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Judge = Callable[[str, str], Verdict]


class Verifier(Protocol):
    def verify_many(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Judge (response, reference answer) pairs, in order; ``UNREADABLE`` if this verifier cannot read the reference
        answer, whatever the others are."""

    def check_answer(self, answer: str) -> None:
        """Raise ValueError if this verifier cannot read the reference answer; called before anything is sampled."""

    def named(self) -> str:
        """Return name and version of the judge, for the results; call it after ``verify_many``."""

    def close(self) -> None:
        """Free all resources."""


class PlainVerifier:
    """A pure function of response and answer, in this process."""

    def __init__(self, name: str, judge: Judge, version: int) -> None:
        self._name = name
        self._judge = judge
        self._version = version

    def verify_many(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        readable = {answer: self._reads(answer) for _, answer in pairs}
        return [
            self._judge(response, answer) if readable[answer] else Verdict(False, reason=UNREADABLE)
            for response, answer in pairs
        ]

    def check_answer(self, answer: str) -> None:
        self._judge("", answer)

    def named(self) -> str:
        return f"{self._name} {self._version}"

    def close(self) -> None:
        pass

    def _reads(self, answer: str) -> bool:
        try:
            self.check_answer(answer)
        except ValueError:
            return False
        return True


PLAIN: dict[str, tuple[Judge, int]] = {
    "countdown": (countdown.verify, countdown.VERSION),
    "exact": (exact.verify, exact.VERSION),
}
"""Verifiers that are a pure function, which raises ValueError where it cannot read the reference answer; and its
version. One more here, and in ``VerifierName``, is all that a new task needs.
"""

RULES: dict[str, int] = {"math": MATH_RULES, **{name: version for name, (_, version) in PLAIN.items()}}
"""Version of each verifier's rules. It enters the keys of evaluations and verdicts."""

NAMES: tuple[str, ...] = get_args(VerifierName)


def open_verifier(name: str, *, seconds: float = 5.0, workers: int = 1) -> Verifier:
    """Open the verifier called ``name``.

    Args:
        seconds: limit for one answer (``math``).
        workers: grading processes (``math``).

    Raises:
        ValueError: there is none of that name.
    """
    if name == "math":
        return MathVerifier(seconds=seconds, workers=workers)
    if name not in PLAIN:
        raise ValueError(f"verifier {name!r} is unknown; there are {', '.join(sorted(NAMES))}")
    return PlainVerifier(name, *PLAIN[name])


# -- responses --------------------------------------------------------------------------------------------------------

# Verdicts on responses as token ids, by the verifier of their prompts.


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
                remedy = "name its column in prompts.columns.answer"
                raise InputError("there is no reference answer", setting="prompts.columns.answer", remedy=remedy)
            verifier.check_answer(answer)
        except ValueError as error:
            raise InputError.of(error, f"{where}, prompt {prompt!r}", prompt=prompt) from error
