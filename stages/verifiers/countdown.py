"""Countdown: reach the target with + - *, every number used exactly once, one step ``a?b=c`` after the other.

The reference answer is ``4,7,9=24``. A response is parsed by hand, in time linear in a bounded length: nothing in
it is ever evaluated as code.
"""

from __future__ import annotations

import re
from collections import defaultdict

from eopd.stages.verifiers.verdict import Verdict
from eopd.storage.errors import InputError

VERSION = 1  # one more with every change of what ``verify`` says: stored beside the verdicts
MAX_CHARACTERS = 4096
MAX_DIGITS = 9
_NUMBER = rf"-?[0-9]{{1,{MAX_DIGITS}}}"
_STEP = re.compile(rf"\s*({_NUMBER})\s*([-+*])\s*({_NUMBER})\s*=\s*({_NUMBER})\s*")
_ANSWER = re.compile(rf"\s*({_NUMBER}(?:\s*,\s*{_NUMBER})+)\s*=\s*({_NUMBER})\s*")


def parse_answer(answer: str) -> tuple[list[int], int]:
    """Parse numbers and target of a reference answer.

    Raises:
        InputError: ``answer`` is not of the form ``4,7,9=24``.
    """
    match = _ANSWER.fullmatch(answer) if len(answer) <= MAX_CHARACTERS else None
    if match is None:
        problem = f"the reference answer {answer[:80]!r} does not read numbers=target"
        raise InputError(problem, remedy="write it as in 4,7,9=24")
    return [int(number) for number in match[1].split(",")], int(match[2])


def verify(response: str, answer: str) -> Verdict:
    """Check that the steps of ``response`` are right, use every number once and end at the target.

    Steps are separated by commas or line breaks. ``form`` is the expression the steps build, with operands of
    + and * in a fixed order: 3+4=7,7*2=14 and 4+3=7,2*7=14 are one solution.

    Raises:
        ValueError: the *reference* answer is malformed; a malformed response is merely wrong.
    """
    numbers, target = parse_answer(answer)
    if len(response) > MAX_CHARACTERS:
        return Verdict(False, reason=f"longer than {MAX_CHARACTERS} characters")
    pieces = re.split(r"[,\n]", response.strip())
    if len(pieces) != len(numbers) - 1:
        return Verdict(False, reason=f"{len(pieces)} steps for {len(numbers)} numbers")
    # Values at hand, each with the expressions that made it.
    hand: defaultdict[int, list[str]] = defaultdict(list)
    for number in numbers:
        hand[number].append(str(number))
    result, form = numbers[0], str(numbers[0])
    for piece in pieces:
        step = _STEP.fullmatch(piece)
        if step is None:
            return Verdict(False, reason=f"not a step: {piece[:40]!r}")
        a, b, result = int(step[1]), int(step[3]), int(step[4])
        if result != _apply(step[2], a, b):
            return Verdict(False, reason=f"wrong arithmetic: {piece.strip()}")
        operands = []
        for value in (a, b):
            if not hand[value]:
                return Verdict(False, reason=f"{value} is not at hand in {piece.strip()}")
            operands.append(hand[value].pop())
        if step[2] != "-":
            operands.sort()
        form = f"({operands[0]}{step[2]}{operands[1]})"
        hand[result].append(form)
    if result != target:
        return Verdict(False, reason=f"ends at {result}, not at {target}")
    return Verdict(True, form=form)


def _apply(operation: str, a: int, b: int) -> int:
    if operation == "+":
        return a + b
    return a - b if operation == "-" else a * b
