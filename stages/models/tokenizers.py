"""What a tokenizer means: ids to bytes, chat template, and the three fingerprints of these.

Only the first (id -> bytes) decides whether a teacher can score a student's tokens; the other two may differ.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenizerFingerprints:
    vocabulary: str  # id -> token bytes: what teacher and student must share
    special: str  # special and stop tokens
    template: str  # chat template


@lru_cache(maxsize=1)
def _byte_of_symbol() -> dict[str, int]:
    """Byte-level BPE's printable symbol of every byte, inverted (the GPT-2 table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    symbols.update({chr(256 + number): byte for number, byte in enumerate(others)})
    return symbols


def id_to_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """The bytes each id stands for. Added tokens stand for their literal text."""
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    described = json.loads(backend.to_str())
    byte_level = '"ByteLevel"' in json.dumps([described.get("decoder"), described.get("pre_tokenizer")])
    added = {int(number): str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    table: dict[int, bytes] = {number: text.encode() for number, text in added.items()}
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
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, names: tuple[str, str] = ("teacher", "student")
) -> None:
    """Both tokenizers give the same bytes to every id they share; ids that only one has are no difference.

    Raises:
        ValueError: naming the first differing id and what it stands for on both sides, and how many differ.
    """
    ours, theirs = id_to_bytes(teacher), id_to_bytes(student)
    differing = [number for number in sorted(ours.keys() & theirs.keys()) if ours[number] != theirs[number]]
    if differing or not ours.keys() & theirs.keys():
        first = differing[0] if differing else 0
        raise ValueError(
            f"the tokenizers of {names[0]} and {names[1]} differ at {len(differing)} ids, first at id {first}: "
            f"{ours.get(first)!r} against {theirs.get(first)!r}; scores of one are meaningless for the other. "
            "Use a teacher of the student's own token vocabulary."
        )


def fingerprints(tokenizer: PreTrainedTokenizerBase, stops: Iterable[int] = ()) -> TokenizerFingerprints:
    """SHA-256 (hex) of id -> bytes, of special and stop tokens, and of the chat template."""
    vocabulary = [[number, text.hex()] for number, text in sorted(id_to_bytes(tokenizer).items())]
    special = {
        "map": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "special": sorted(number for number, token in tokenizer.added_tokens_decoder.items() if token.special),
        "stops": sorted(stops),
    }
    return TokenizerFingerprints(_digest(vocabulary), _digest(special), _digest(tokenizer.chat_template))


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], arguments: Mapping[str, Any] | None = None
) -> list[int]:
    """Ids of ``messages`` under the tokenizer's own chat template, ready for the assistant's first token.

    Args:
        arguments: template variables, such as ``enable_thinking: false``.
    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path}: this tokenizer has no chat template; choose a plain-text template, a column "
            "of the prompt source, or a tokenizer that has one"
        )
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **dict(arguments or {}))
    assert isinstance(text, str)
    # the template writes the special tokens itself: adding them again would double the first
    return [int(number) for number in tokenizer(text, add_special_tokens=False)["input_ids"]]
