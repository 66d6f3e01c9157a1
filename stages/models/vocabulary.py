"""Bytes of token ids, and comparison of two vocabularies. Needs the `tokenizers` library only."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from eopd.storage.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@lru_cache(maxsize=1)
def _byte_of_symbol() -> dict[str, int]:
    """Return the byte of each printable symbol of byte-level BPE (the GPT-2 table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    symbols.update({chr(256 + number): byte for number, byte in enumerate(others)})
    return symbols


def id_to_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Return the bytes of each id. Added tokens stand for their literal text."""
    described = json.loads(tokenizer.to_str())
    byte_level = '"ByteLevel"' in json.dumps([described.get("decoder"), described.get("pre_tokenizer")])
    table = {int(number): str(token).encode() for number, token in tokenizer.get_added_tokens_decoder().items()}
    symbols = _byte_of_symbol()
    for token, number in tokenizer.get_vocab(with_added_tokens=False).items():
        if number in table:
            continue
        if byte_level and all(symbol in symbols for symbol in token):
            table[number] = bytes(symbols[symbol] for symbol in token)
        elif not byte_level and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            table[number] = bytes([int(token[3:5], 16)])
        else:
            table[number] = (token if byte_level else token.replace("\u2581", " ")).encode()
    return table


def check_same(teacher: Mapping[int, bytes], student: Mapping[int, bytes]) -> None:
    """Check that both vocabularies give the same bytes to every id they share; ids of only one are ignored.

    Raises:
        ValueError: naming the first differing id and what it stands for on both sides, and how many differ.
    """
    differing = [number for number in sorted(teacher.keys() & student.keys()) if teacher[number] != student[number]]
    if differing or not teacher.keys() & student.keys():
        first = differing[0] if differing else 0
        raise InputError(
            f"the tokenizers of teacher and student differ at {len(differing)} ids, first at id {first}: "
            f"{teacher.get(first)!r} against {student.get(first)!r}; scores of one are meaningless for the other",
            remedy="Use a teacher of the student's own token vocabulary.",
        )
