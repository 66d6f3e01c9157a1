"""How final answers are written: in boxes, between dollars, as a program prints numbers. Text only, no algebra."""

from __future__ import annotations

import re
from decimal import Decimal

BOX = "\\boxed{"
MOST_BOXES = 8
"""Boxes that are looked at, from the last: a response cut at its length limit may end within one."""

_E_NUMBER = re.compile(r"(?<![\w.\\])(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d{1,3}(?!\w|\.\d)")
_DOLLAR = re.compile(r"(?<!\\)\$")
_CODE = (
    (re.compile(r"(?<=\d)\.(?=/)"), ""),
    (re.compile(r"\bnp\.(?=[a-z]+\()"), r"\\"),
)


def last_box(text: str) -> str | None:
    """Content of the last complete ``\\boxed{...}``; None where there is none."""
    end = len(text)
    for _ in range(MOST_BOXES):
        end = text.rfind(BOX, 0, end)
        if end < 0:
            return None
        content = _until_closed(text, end + len(BOX))
        if content is not None:
            return content.strip()
    return None


def as_written(text: str) -> str:
    """What a program prints, as people write it: ``1e-5`` is ``0.00001``, ``-1./3`` is ``-1/3``, ``np.sin(x)`` a sine.

    Minerva's reference answers are such; read as LaTeX, ``1e-5`` would be Euler's number less five.
    """
    text = _E_NUMBER.sub(lambda number: format(Decimal(number[0]), "f"), text)
    for pattern, latex in _CODE:
        text = pattern.sub(latex, text)
    return text


def readings_of_reference(answer: str) -> list[str]:
    """A reference answer as texts with marked mathematics, the likeliest first.

    Mathematics stands between dollars. Where the dollars make no pairs (``221,$8$``), or what they mark cannot be read
    (``a+$ $b``), the whole answer is mathematics. ``\\$`` is a currency and marks nothing.
    """
    answer = as_written(answer.strip())
    whole = f"${_DOLLAR.sub('', answer)}$"
    dollars = len(_DOLLAR.findall(answer))
    if BOX in answer or (dollars and dollars % 2 == 0):
        return [answer, whole]
    return [whole, answer]


def readings_of_response(response: str) -> list[str]:
    """A response as texts that may hold its final answer, the likeliest first.

    The last box comes alone, before all of the text: boxes that stand close together would be read as one set, which
    a set spread over several boxes is. ``2e-1`` is a number first, then twice Euler's number less one.
    """
    found = []
    for text in (as_written(response), response):
        box = last_box(text)
        found += [text] if box is None else [f"{BOX}{box}}}", text]
    return list(dict.fromkeys(found))


def _until_closed(text: str, start: int) -> str | None:
    """From ``start`` to the brace that closes the one before it; None where there is none."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "}" and depth == 0:
            return text[start:place]
        depth += {"{": 1, "}": -1}.get(text[place], 0)
    return None
