"""Responses that the policy revises: its first answer, a phrase by the verdict on it, and its second answer.

SD-Zero, arXiv 2604.12002. All three are one response in the assistant's turn. The phrase is tokenised alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from eopd.stages.engines.sampling import SamplingRequest, derive_seed
from eopd.stages.rollout.segments import Draft, Judging, Sampling, Written
from eopd.stages.rollout.settings import RolloutSettings
from eopd.storage.errors import InputError
from eopd.storage.rollouts import Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
