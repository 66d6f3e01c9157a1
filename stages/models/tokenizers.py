"""What a tokenizer means: ids to bytes, which decide whether a teacher can score a student's tokens; chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from eopd.stages.models import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def id_to_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """The bytes each id stands for (``vocabulary.id_to_bytes``)."""
    return vocabulary.id_to_bytes(tokenizer.backend_tokenizer)  # type: ignore[attr-defined]


def check_same_vocabulary(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where they differ (``vocabulary.check_same``)."""
    vocabulary.check_same(id_to_bytes(teacher), id_to_bytes(student))


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of id -> bytes: of what teacher and student must share, and nothing else."""
    meanings = [[number, text.hex()] for number, text in sorted(id_to_bytes(tokenizer).items())]
    return hashlib.sha256(json.dumps(meanings, separators=(",", ":")).encode()).hexdigest()


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
