"""Tokenizers: bytes of token ids, comparison of vocabularies and rendering of chat templates."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from eopd.stages.models.chat_templates import ChatTemplate, Conversation, check_arguments, dated, write_conversation
from eopd.storage.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


@lru_cache(maxsize=1)
def _byte_of_symbol() -> dict[str, int]:
    """Return the byte of each printable symbol of byte-level BPE (the GPT-2 table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    symbols.update({chr(256 + number): byte for number, byte in enumerate(others)})
    return symbols


def id_to_bytes(tokenizer: Tokenizer | PreTrainedTokenizerBase) -> dict[int, bytes]:
    """Return the bytes of each id. Added tokens stand for their literal text."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    described = json.loads(backend.to_str())
    byte_level = '"ByteLevel"' in json.dumps([described.get("decoder"), described.get("pre_tokenizer")])
    table = {int(number): str(token).encode() for number, token in backend.get_added_tokens_decoder().items()}
    symbols = _byte_of_symbol()
    for token, number in backend.get_vocab(with_added_tokens=False).items():
        if number in table:
            continue
        if byte_level and all(symbol in symbols for symbol in token):
            table[number] = bytes(symbols[symbol] for symbol in token)
        elif not byte_level and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            table[number] = bytes([int(token[3:5], 16)])
        else:
            table[number] = (token if byte_level else token.replace("\u2581", " ")).encode()
    return table


def check_same_vocabulary(
    teacher: Tokenizer | PreTrainedTokenizerBase, student: Tokenizer | PreTrainedTokenizerBase
) -> None:
    """Check that both vocabularies give the same bytes to every id they share; ids of only one are ignored.

    Raises:
        ValueError: naming the first differing id and what it stands for on both sides, and how many differ.
    """
    theirs, ours = id_to_bytes(teacher), id_to_bytes(student)
    differing = [number for number in sorted(theirs.keys() & ours.keys()) if theirs[number] != ours[number]]
    if differing or not theirs.keys() & ours.keys():
        first = differing[0] if differing else 0
        raise InputError(
            f"the tokenizers of teacher and student differ at {len(differing)} ids, first at id {first}: "
            f"{theirs.get(first)!r} against {ours.get(first)!r}; scores of one are meaningless for the other",
            remedy="Use a teacher of the student's own token vocabulary.",
        )


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
