"""Responses of which several may write a part: what is to be sampled, and what was written, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eopd.stages.engines.sampling import Sample, SamplingRequest, derive_seed
from eopd.stages.models.prompts import Prompt
from eopd.stages.rollout.settings import RolloutSettings
from eopd.storage.errors import InputError
from eopd.storage.records import Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Draw:
    """A prompt of a part."""

    prompt: Prompt
    token_ids: list[int]  # as the student reads it
    context_ids: list[int]  # as the model reads it that samples
    first_sample: int  # number of its first sample: above 0 when the round has drawn it before
    rank: int  # of its first sample among the responses of the round
    expert_ids: Sequence[int] = ()  # as the same model reads it under the expert prompt (source: mixed)


@dataclass(frozen=True)
class Draft:
    """A response to write, of which the teacher has written the beginning, or all."""

    draw: Draw
    sample: int
    seed: int
    attempt: int = 0
    prefix: Sequence[int] = ()
    ended: Mapping[str, Any] | None = None  # how it ended, if the prefix is all of it

    def again(self, seed: int, attempt: int) -> Draft:
        """The same response under the seed of another attempt."""
        return replace(self, seed=derive_seed(seed, self.draw.prompt.id, self.sample, attempt), attempt=attempt)


@dataclass(frozen=True)
class Written:
    """A response of T tokens, or a piece of one."""

    token_ids: NDArray[np.int32]  # [T]
    written: NDArray[np.int8]  # [T] writer of each token
    finish_reason: str = "length"
    stop_token_id: int | None = None
    logprobs: NDArray[np.float32] | None = None  # [T] NaN where the policy did not sample; None: the engine gave none
    truncated_logprobs: NDArray[np.float32] | None = None  # [T] the same; None also if nothing was truncated
    correct: bool | None = None  # None: not judged
    attempts: int = 1
    is_cut: bool = False  # before an id that the student does not know

    @classmethod
    def sampled(cls, sample: Sample, writer: Writer | NDArray[np.int8]) -> Written:
        """A sample, of one writer or of one a token."""
        return cls(
            sample.token_ids,
            np.broadcast_to(writer, len(sample.token_ids)).astype(np.int8),
            sample.finish_reason,
            sample.stop_token_id,
            sample.logprobs,
            sample.truncated_logprobs,
        )

    @classmethod
    def fixed(cls, ids: Sequence[int], writer: Writer) -> Written:
        """Tokens that the policy did not sample."""
        written, unknown = np.full(len(ids), writer, np.int8), np.full(len(ids), math.nan, np.float32)
        return cls(np.asarray(ids, np.int32), written, logprobs=unknown)

    def followed_by(self, rest: Written) -> Written:
        """The response that goes on with ``rest`` and ends as it does."""
        logprobs, truncated = None, None
        if self.logprobs is not None and rest.logprobs is not None:
            logprobs = np.concatenate([self.logprobs, rest.logprobs])
        if self.truncated_logprobs is not None or rest.truncated_logprobs is not None:
            truncated = np.concatenate([_known(one.truncated_logprobs, len(one.token_ids)) for one in (self, rest)])
        return replace(
            rest,
            token_ids=np.concatenate([self.token_ids, rest.token_ids]),
            written=np.concatenate([self.written, rest.written]),
            logprobs=logprobs,
            truncated_logprobs=truncated,
        )

    def without_stop(self) -> Written:
        """The tokens before the stop token, or all of them if there is none."""
        return self if self.stop_token_id is None else self._first(len(self.token_ids) - 1)

    def before_unknown(self, vocabulary: int) -> Written:
        """The response up to the first id beyond a vocabulary."""
        unknown = self.token_ids >= vocabulary
        if not unknown.any():
            return self
        return replace(self._first(int(np.argmax(unknown))), is_cut=True)

    def _first(self, length: int) -> Written:
        return replace(
            self,
            token_ids=self.token_ids[:length],
            written=self.written[:length],
            finish_reason="length",
            stop_token_id=None,
            logprobs=None if self.logprobs is None else self.logprobs[:length],
            truncated_logprobs=None if self.truncated_logprobs is None else self.truncated_logprobs[:length],
        )


def _known(logprobs: NDArray[np.float32] | None, length: int) -> NDArray[np.float32]:
    return np.full(length, math.nan, np.float32) if logprobs is None else logprobs


Sampling = Callable[[Sequence[SamplingRequest]], list[Sample]]
"""An engine call."""

Writing = Callable[[Sequence[Draft]], list[Written]]
"""Writes responses."""

Judging = Callable[[Sequence[Draft], Sequence[Written]], list[bool]]
"""Says which responses, or pieces of them, the verifier finds right."""


# -- attempts ---------------------------------------------------------------------------------------------------------

# Sampling until the verifier finds a response right (`rollout.attempts`).


def until_right(drafts: Sequence[Draft], write: Writing, most: int, seed: int) -> list[tuple[Draft, Written]]:
    """Write responses, and those that are wrong again, each at most ``most`` times. The last attempt stays.

    A first attempt is what is written without attempts. The seed of another depends on ``seed``, the prompt's id, the
    number of the sample and that of the attempt alone. What the teacher wrote whole is not written again.

    Args:
        write: gives responses with verdicts.
    """
    results = list(zip(drafts, write(drafts), strict=True))
    for attempt in range(1, most):
        wrong = [n for n, (draft, written) in enumerate(results) if not written.correct and draft.ended is None]
        if not wrong:
            break
        again = [results[number][0].again(seed, attempt) for number in wrong]
        for number, draft, written in zip(wrong, again, write(again), strict=True):
            results[number] = draft, replace(written, attempts=attempt + 1)
    return results


# -- prefixes of responses --------------------------------------------------------------------------------------------

# Length of the teacher's part of a response (arXiv 2606.01249).


@dataclass(frozen=True)
class Prefixes:
    """Limits on the teacher's tokens in one round.

    The limit falls from ``start`` to ``end`` by half a cosine: L(t) = end + (start - end) (1 + cos(pi t)) / 2, rounded
    down, where t goes from 0 to 1 over the run. The paper states that the limit starts at the longest response and ends
    at 0, not whether a prefix is as long as the limit (`cap`) or shorter (`uniform`).
    """

    start: int
    end: int
    first: int  # place in the run of the round's first response (or of the round)
    step: int  # from one response of the round to the next: 1, or 0 if the whole round has one limit
    total: int  # places of the run
    uniform: bool

    def limit(self, rank: int) -> int:
        """Return the most tokens of the teacher in the response of that rank in its round."""
        progress = (self.first + self.step * rank) / max(self.total - 1, 1)
        return math.floor(self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * progress)) + 1e-9)

    def length(self, rank: int, seed: int, prompt_id: str, sample: int) -> int:
        """Return the tokens of the teacher in a response, if the teacher's response is long enough."""
        limit = self.limit(rank)
        return derive_seed(seed, "prefix", prompt_id, sample) % (limit + 1) if self.uniform else limit

    def identity(self) -> dict[str, Any]:
        """Return the values that enter the key of the round's rollouts: its limit, or where in the cosine it lies."""
        how = "uniform" if self.uniform else "cap"
        if not self.step:
            return {"limit": self.limit(0), "length": how}
        return {"start": self.start, "end": self.end, "first": self.first, "total": self.total, "length": how}


def prefixes_of(settings: RolloutSettings, rounds: int, round_: int, responses: int) -> Prefixes | None:
    """Return the prefixes of a round of so many responses; None if the teacher writes nothing in it."""
    if settings.source != "prefix":
        return None
    prefix = settings.prefix
    by_response = prefix.over == "responses"
    prefixes = Prefixes(
        start=settings.max_new_tokens if prefix.start is None else prefix.start,
        end=prefix.end,
        first=round_ * responses if by_response else round_,
        step=int(by_response),
        total=rounds * responses if by_response else rounds,
        uniform=prefix.length == "uniform",
    )
    return prefixes if max(prefixes.limit(0), prefixes.limit(responses - 1)) > 0 else None


# -- second answers ---------------------------------------------------------------------------------------------------

# Responses that the policy revises: its first answer, a phrase by the verdict on it, and its second answer.
#
# SD-Zero, arXiv 2604.12002. All three are one response in the assistant's turn. The phrase is tokenised alone.


@dataclass(frozen=True)
class Phrases:
    """Token ids of the phrase that follows a first answer; None: such an answer is not revised."""

    wrong: tuple[int, ...]
    right: tuple[int, ...] | None

    @classmethod
    def of(cls, settings: RolloutSettings, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> Phrases:
        """Tokenise the phrases of `rollout.revise`.

        Raises:
            ValueError: a phrase holds a special token or a stop id, or leaves no room for a second answer.
        """
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, *stop_ids}
        phrases = settings.revise.phrases

        def ids(name: str, text: str) -> tuple[int, ...]:
            tokens = tuple(int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"])
            bad = next((token for token in tokens if token in special), None)
            if bad is not None:
                raise InputError(
                    f"rollout.revise.phrases.{name} holds {tokenizer.convert_ids_to_tokens(bad)!r} (id {bad}), a "
                    "special token or one that ends a response",
                    setting=f"rollout.revise.phrases.{name}",
                    remedy="write the phrase without it",
                )
            if settings.revised_from + len(tokens) >= settings.max_new_tokens:
                raise InputError(
                    f"rollout.revise: a first answer of up to {settings.revised_from} tokens and phrases.{name} of "
                    f"{len(tokens)} leave no room for a second answer within rollout.max_new_tokens = "
                    f"{settings.max_new_tokens}",
                    setting="rollout.revise",
                    remedy="raise it, or lower rollout.revise.first_tokens",
                )
            return tokens

        return cls(ids("wrong", phrases.wrong), None if phrases.right is None else ids("right", phrases.right))


def write(
    drafts: Sequence[Draft], sample: Sampling, judge: Judging, settings: RolloutSettings, phrases: Phrases, seed: int
) -> list[Written]:
    """Write responses, with the verdict on the answer that each ends with, by two engine calls.

    A first answer that was cut is wrong. Its stop token is left out if a phrase follows.

    Args:
        seed: of the round.
    """
    first_requests = [SamplingRequest(draft.draw.context_ids, draft.seed, settings.revised_from) for draft in drafts]
    written = [Written.sampled(one, Writer.POLICY) for one in sample(first_requests)]
    written = [replace(one, correct=correct) for one, correct in zip(written, judge(drafts, written), strict=True)]
    begun = {
        number: one.without_stop().followed_by(Written.fixed(phrase, Writer.TEXT))
        for number, one in enumerate(written)
        if (phrase := phrases.right if one.correct else phrases.wrong) is not None
    }
    revised = [drafts[number] for number in begun]
    requests = [
        SamplingRequest(
            [*draft.draw.context_ids, *first.token_ids.tolist()],
            derive_seed(seed, "revision", draft.draw.prompt.id, draft.sample, draft.attempt),
            settings.max_new_tokens - len(first.token_ids),
        )
        for draft, first in zip(revised, begun.values(), strict=True)
    ]
    second = [Written.sampled(one, Writer.POLICY) for one in sample(requests)]
    for (number, first), last, correct in zip(begun.items(), second, judge(revised, second), strict=True):
        written[number] = replace(first.followed_by(last), correct=correct)
    return written
