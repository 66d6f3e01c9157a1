"""Placeholders such as ``{{answer}}`` in what the teacher reads. Single braces are text: prompts hold ``\\boxed{}``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from eopd.stages.engines.sampling import derive_seed

OF_PROMPT = ("answer", "solution")
"""Placeholders whose text comes from a column of the prompt source."""

VERDICT = "verdict"
"""A text of the settings that says whether the response is right."""

SIBLING = "right_sibling"
"""A right response of the same round to the same prompt, never the one that is scored."""

RESPONSE = "response"
"""The response that is scored: its token ids, without the stop token at its end."""

JUDGED = (VERDICT, SIBLING)
TEXTS = (*OF_PROMPT, *JUDGED)
"""Placeholders that may stand in any text."""

KNOWN = (*TEXTS, RESPONSE)

_PLACEHOLDER = re.compile(r"\{\{\s*([^{}]*[^{}\s])\s*\}\}")


def names_in(text: str) -> list[str]:
    """Names between double braces, in order."""
    return _PLACEHOLDER.findall(text)


def check(setting: str, text: str, allowed: Sequence[str]) -> None:
    """Raises ValueError for a placeholder that does not exist or cannot stand in this setting."""
    for name in names_in(text):
        if name in allowed:
            continue
        if name in KNOWN:
            raise ValueError(
                f"{setting}: {{{{{name}}}}} can stand only in score.teacher_prompt.opening, which takes token ids as "
                "they are"
            )
        near = difflib.get_close_matches(name.lower(), KNOWN, n=1, cutoff=0.5)
        hint = f"Did you mean {{{{{near[0]}}}}}?" if near else f"Known: {', '.join(f'{{{{{one}}}}}' for one in KNOWN)}."
        raise ValueError(f"{setting}: there is no placeholder {{{{{name}}}}}. {hint}")


def fill(text: str, values: Mapping[str, str | None]) -> str:
    """Put values in the place of placeholders, once: a value that looks like a placeholder stays as it is.

    Raises:
        ValueError: a value is missing or blank.
    """

    def value(match: re.Match[str]) -> str:
        text = values.get(match[1])
        if text is None or not text.strip():
            raise ValueError(f"the prompt has no {match[1]} for {{{{{match[1]}}}}}")
        return text

    return _PLACEHOLDER.sub(value, text)


def split_at(text: str, name: str) -> list[str]:
    """The texts before, between and after the placeholders of one name."""
    pieces, start = [], 0
    for match in _PLACEHOLDER.finditer(text):
        if match[1] == name:
            pieces.append(text[start : match.start()])
            start = match.end()
    return [*pieces, text[start:]]


def donors(prompts: Sequence[int], seed: int, *path: str | int) -> dict[int, int]:
    """Return another prompt for every prompt, drawn by seed; every prompt is drawn once.

    Raises:
        ValueError: there is no other prompt.
    """
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) == 1:
        raise ValueError("score.teacher_prompt.shuffled needs at least two prompts to exchange answers between")
    keys = np.random.PCG64(derive_seed(seed, "shuffled", *path)).random_raw(len(distinct))
    order = [distinct[place] for place in np.argsort(keys, kind="stable")]
    return dict(zip(order, [*order[1:], *order[:1]], strict=True))
