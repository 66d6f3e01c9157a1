"""Responses of which several may write a part: what is to be sampled, and what was written, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eopd.stages.engines.sampling import Sample, SamplingRequest, derive_seed
from eopd.stages.models.prompts import Prompt
from eopd.storage.rollouts import Writer


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
