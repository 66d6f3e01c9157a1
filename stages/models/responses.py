"""Responses that come with their prompts, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from eopd.stages.models.chat_templates import Message, dated
from eopd.stages.models.prompts import Prompt, PromptSettings, student_conversation
from eopd.storage.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NoResponse(InputError):
    """A response that cannot be trained on. The message goes on after "the response to ..."."""


def response_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, settings: PromptSettings, stop_ids: Sequence[int]
) -> list[int]:
    """Token ids of a prompt's own response, as the student would have to sample them after the prompt.

    Token ids are taken as they are. Text is tokenised alone, as it stands, and the main stop id follows it. A message
    is what the chat template writes of it after the prompt, up to the first stop id.

    Args:
        stop_ids: the main one first; a response ends at the first of them that it holds.

    Raises:
        NoResponse: there is none; it holds a stop id before its end, or an id that the tokenizer does not know; the
            template does not write the message after the prompt.
    """
    response = prompt.response
    if response is None:
        raise NoResponse("is missing: prompts.columns.response names no column", setting="prompts.columns.response")
    if isinstance(response, str):
        ids = [int(token) for token in tokenizer(response, add_special_tokens=False)["input_ids"]]
        if ids and ids[-1] not in stop_ids:
            ids += stop_ids[:1]
    elif isinstance(response, tuple):
        ids = list(response)
    else:
        ids = _of_message(tokenizer, prompt, settings, response, stop_ids)
    if not ids:
        raise NoResponse("has no tokens")
    unknown = next((token for token in ids if not 0 <= token < len(tokenizer)), None)
    if unknown is not None:
        raise NoResponse(f"holds the id {unknown}, and the student's tokenizer has {len(tokenizer)}")
    early = next((place for place, token in enumerate(ids[:-1]) if token in stop_ids), None)
    if early is not None:
        raise NoResponse(
            f"holds the stop id {ids[early]} as token {early} of {len(ids)}, and would end there",
            remedy="remove what follows",
        )
    return ids


def _of_message(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    settings: PromptSettings,
    message: Message,
    stop_ids: Sequence[int],
) -> list[int]:
    if prompt.token_ids is not None:
        raise NoResponse(
            "is a message, which cannot be written after a prompt of token ids", remedy="give it as token ids"
        )
    if settings.template != "chat":
        raise NoResponse(
            "is a message, which template: plain cannot write",
            setting="prompts.template",
            remedy="use template: chat, or a column of text",
        )
    conversation = student_conversation(prompt, settings)
    tools = {"tools": list(conversation.tools)} if conversation.tools else {}
    arguments = {**dated(settings.template_arguments), **tools, "tokenize": False}
    before = str(tokenizer.apply_chat_template(list(conversation.messages), add_generation_prompt=True, **arguments))
    whole = str(tokenizer.apply_chat_template([*conversation.messages, message], **arguments))
    if not whole.startswith(before):
        raise NoResponse(
            "is not written after the prompt by the chat template, which begins the assistant's turn otherwise",
            setting="prompts.template_arguments",
            remedy="set prompts.template_arguments (such as enable_thinking: false), or give the response as text",
        )
    ids = [int(token) for token in tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"]]
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    return ids if end is None else ids[: end + 1]
