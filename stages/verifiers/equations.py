"""The equations of a written solution, so that rewording it makes no new one."""

from __future__ import annotations

import re

_LATEX = (  # spelling that says nothing of the mathematics
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|boxed)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])|[×·]"), "*"),
    (re.compile(r"\\div(?![A-Za-z])|÷"), "/"),
    (re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[,;:! ]"), " "),
    (re.compile(r"\\[()\[\]]|\\?\$|&"), " "),
    (re.compile("[−–]"), "-"),
)
_BULLET = re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])[ \t]+", re.MULTILINE)
_BOLD = re.compile(r"(?<!\w)\*\*|\*\*(?!\w)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_AROUND = re.compile(r" ?([=+\-*/^<>]) ?")


def equations(text: str) -> list[str]:
    """Return the distinct equations of a text, sorted: words, order, repetition and the spelling of signs do not count.

    ``Half of 48 is 48 / 2 = 24, so 48 + 24 = 72`` holds ``48+24=72`` and ``48/2=24``.
    """
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    for pattern in (_BULLET, _BOLD, _WORD):
        text = pattern.sub(" ", text)
    text = re.sub(r"[ \t]+", " ", _THOUSANDS.sub("", text))
    text = _AROUND.sub(r"\1", text)
    pieces = (piece.strip(".,;:!?=") for piece in re.split(r"[\s,;]+", text))
    return sorted({piece for piece in pieces if "=" in piece})
