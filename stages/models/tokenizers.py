"""Loaded tokenizers: comparison of vocabularies and rendering of chat templates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eopd.stages.models import vocabulary
from eopd.stages.models.chat_templates import ChatTemplate, Conversation, check_arguments, dated, write_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def id_to_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """Return the bytes of each id (``vocabulary.id_to_bytes``)."""
    return vocabulary.id_to_bytes(tokenizer.backend_tokenizer)  # type: ignore[attr-defined]


def check_same_vocabulary(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if two vocabularies differ (``vocabulary.check_same``)."""
    vocabulary.check_same(id_to_bytes(teacher), id_to_bytes(student))


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 (hex) of id -> bytes, which teacher and student must share."""
    meanings = [[number, text.hex()] for number, text in sorted(id_to_bytes(tokenizer).items())]
    return hashlib.sha256(json.dumps(meanings, separators=(",", ":")).encode()).hexdigest()


def response_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_token_id: int | None) -> str:
    """Return the text of a response as verifiers read it: without its stop token and without special tokens."""
    text = tokenizer.decode(list(ids[:-1] if stop_token_id is not None else ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def render_chat(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, arguments: Mapping[str, Any] | None = None
) -> list[int]:
    """Render a conversation to ids with the tokenizer's chat template, ready for the assistant's next token.

    A last message of the assistant is continued in its turn.

    Args:
        arguments: template variables, such as ``enable_thinking: false``.
    Raises:
        ValueError: the tokenizer has no chat template, or one that refuses the conversation, leaves a part of it out,
            or does not read an argument.
    """
    given = dict(arguments or {})
    template = ChatTemplate.of(tokenizer, tools=bool(conversation.tools or given.get("tools")))
    check_arguments(template, given)
    given = dated(given)

    def render(what: Conversation) -> str:
        text = tokenizer.apply_chat_template(
            list(what.messages),
            tokenize=False,
            add_generation_prompt=not what.is_prefilled,
            continue_final_message=what.is_prefilled,
            **({"tools": list(what.tools)} if what.tools else {}),
            **given,
        )
        assert isinstance(text, str)
        return text

    text = write_conversation(conversation, render)
    # the template writes the special tokens itself: adding them again would double the first
    return [int(number) for number in tokenizer(text, add_special_tokens=False)["input_ids"]]


def generation_prompt(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, arguments: Mapping[str, Any]
) -> str:
    """Return the text with which the chat template begins the assistant's turn; nothing if a message begins it."""
    if conversation.is_prefilled:
        return ""
    tools = {"tools": list(conversation.tools)} if conversation.tools else {}
    given = {**dated(arguments), **tools, "tokenize": False}
    messages = list(conversation.messages)
    before = str(tokenizer.apply_chat_template(messages, add_generation_prompt=False, **given))
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, **given)).removeprefix(before)
