"""Responses of which the policy writes some tokens under the plain prompt and the others under an expert prompt.

MixSD, arXiv 2605.16865. The expert prompt shows more, such as a solution. A coin a token decides whose prediction is
written. Coins do not depend on what is written: all are drawn before, from the seed, the prompt's id, the number of the
sample and that of the attempt alone. So they are the same in any batch, and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eopd.stages.engines.sampling import Expert, SamplingRequest, derive_seed
from eopd.stages.models import teacher_prompts as placeholders
from eopd.stages.models.prompts import Prompt, PromptSettings, render_prompt, student_conversation
from eopd.stages.rollout.segments import Draft, Sampling, Written
from eopd.stages.rollout.settings import ExpertSettings, RolloutSettings
from eopd.storage.errors import InputError
from eopd.storage.records import Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def coins(seed: int, draft: Draft, count: int, student_share: float) -> NDArray[np.bool_]:
    """Return which of ``count`` tokens the expert writes.

    Args:
        seed: of the round.
        student_share: probability of each token to be written under the plain prompt.
    """
    own = derive_seed(seed, "coins", draft.draw.prompt.id, draft.sample, draft.attempt)
    heads = (np.random.PCG64(own).random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    writes: NDArray[np.bool_] = heads >= student_share
    return writes


def write(drafts: Sequence[Draft], sample: Sampling, settings: RolloutSettings, seed: int) -> list[Written]:
    """Write responses with one engine call.

    Args:
        seed: of the round.
    """
    count = settings.max_new_tokens
    experts = [
        Expert(draft.draw.expert_ids, coins(seed, draft, count, settings.mixed.student_share)) for draft in drafts
    ]
    requests = [
        SamplingRequest(draft.draw.context_ids, draft.seed, expert=expert)
        for draft, expert in zip(drafts, experts, strict=True)
    ]
    return [
        Written.sampled(one, np.where(expert.writes[: len(one.token_ids)], Writer.EXPERT, Writer.POLICY))
        for one, expert in zip(sample(requests), experts, strict=True)
    ]


def expert_settings(expert: ExpertSettings, prompts: PromptSettings, prompt: Prompt) -> PromptSettings:
    """Return how the expert reads a prompt: as the student does, with another system message or suffix.

    Raises:
        ValueError: a value is missing; names the prompt.
    """
    values = {name: prompt.value(name) for name in expert.values_needed}
    try:
        shown = {
            name: placeholders.fill(text, values)
            for name, text in (("system", expert.system), ("suffix", expert.suffix))
            if text is not None
        }
    except ValueError as error:
        raise InputError.of(error, setting="rollout.mixed.expert", file=prompts.path, prompt=prompt.id) from error
    return prompts.model_copy(update=shown)


def expert_reader(
    tokenizer: PreTrainedTokenizerBase, prompts: PromptSettings, expert: ExpertSettings
) -> Callable[[Prompt, list[int]], list[int]]:
    """Return a function that renders a prompt as the expert reads it, given its ids as the student reads it.

    The function raises ValueError if a value is missing, or if the assistant's turn does not begin as it does for the
    student; it names the prompt.
    """
    from eopd.stages.models.tokenizers import generation_prompt

    def turn(prompt: Prompt, settings: PromptSettings) -> str:
        if settings.template == "plain":
            return ""
        return generation_prompt(tokenizer, student_conversation(prompt, settings), settings.template_arguments)

    def render(prompt: Prompt, own: list[int]) -> list[int]:
        settings = expert_settings(expert, prompts, prompt)
        ids = render_prompt(tokenizer, prompt, settings)
        ours, theirs = turn(prompt, prompts), turn(prompt, settings)
        last = len(tokenizer(ours, add_special_tokens=False)["input_ids"])
        if ours != theirs or own[len(own) - last :] != ids[len(ids) - last :]:
            raise InputError(
                "the chat template begins the assistant's turn otherwise with rollout.mixed.expert than without it "
                f"({theirs!r}, {ours!r}), and a response must follow both alike",
                setting="rollout.mixed.expert",
                file=prompts.path,
                prompt=prompt.id,
                remedy="set prompts.template_arguments or another expert.system",
            )
        return ids

    return render
