"""Where the verifier and a plain comparison of answers differ: what to read before believing either.

The plain comparison takes the last ``\\boxed{...}`` of a response, or its last number, and calls it right when it is
the reference answer as text (LaTeX spacing aside) or as a number (``3 \\times 10^8`` and ``3e8`` are). It knows no
algebra: most disagreements are its own mistakes, and the few others are a verifier's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from eopd.stages.evaluate.verifiers.answers import as_written, last_box
from eopd.storage import evaluations
from eopd.storage.artifacts import Artifact
from eopd.storage.sources import filled_parts

COLUMNS = ["benchmark", "problem_id", "sample", "answer", "response_text", "correct", "reason"]
LONGEST = 20_000
"""Characters of a response that are read, from its end."""

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_SPACING = re.compile(r"\\[,;:! ]|\\q?quad\b|\\left\b|\\right\b|\\?\$|\s|\\\(|\\\)")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(-?\d+)\}\{(-?\d+)\}")
_SCIENTIFIC = re.compile(r"^(-?\d+(?:\.\d+)?)\\(?:times|cdot)10\^\{?(-?\d{1,3})\}?$")
_PLAIN_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:/\d+)?|-?\.\d+")


@dataclass(frozen=True)
class Disagreement:
    """``extracted``: what the plain comparison read; empty where it found nothing."""

    benchmark: str
    problem_id: str
    sample: int
    answer: str
    extracted: str
    verifier_correct: bool
    plain_correct: bool
    reason: str


def disagreements(evaluation: Artifact, benchmarks: Sequence[str]) -> Iterator[Disagreement]:
    """Of every committed sample of some benchmarks, in order.

    Args:
        benchmarks: names; those whose answers are final answers (``verifier: math``), not whole texts.
    """
    for part in filled_parts(evaluation):
        if part == evaluation.parts - 1:  # the summary
            continue
        for row in evaluations.read_samples(evaluation.part_folder(part), COLUMNS).to_pylist():
            if row["benchmark"] not in benchmarks:
                continue
            extracted = final_answer(row["response_text"])
            plain = same_answer(extracted, row["answer"])
            if plain != row["correct"]:
                yield Disagreement(
                    row["benchmark"],
                    row["problem_id"],
                    row["sample"],
                    row["answer"],
                    extracted,
                    row["correct"],
                    plain,
                    row["reason"] or "",
                )


def final_answer(response: str) -> str:
    """Content of the last complete ``\\boxed{...}``, else the last number, else nothing."""
    response = response[-LONGEST:]
    box = last_box(response)
    if box is not None:
        return box
    numbers = _NUMBER.findall(as_written(response))
    return numbers[-1] if numbers else ""


def same_answer(found: str, answer: str) -> bool:
    """Equal as text without LaTeX spacing, or as numbers."""
    one, other = _normal(found), _normal(answer)
    if not one:
        return False
    if one == other:
        return True
    values = _value(one), _value(other)
    return values[0] is not None and values[0] == values[1]


def _normal(text: str) -> str:
    text = _SPACING.sub("", text).rstrip(".")
    text = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", text)
    return _FRACTION.sub(r"\1\2/\3", as_written(_SCIENTIFIC.sub(r"\1e\2", text)))


def _value(text: str) -> Fraction | None:
    text = re.sub(r",(?=\d{3}(?!\d))", "", text)
    if not _PLAIN_NUMBER.fullmatch(text) or len(text) > 100:
        return None
    try:
        numerator, _, denominator = text.partition("/")
        return Fraction(numerator) / Fraction(denominator or 1)
    except ZeroDivisionError:
        return None
