"""Verifiers by name: what ``verifier:`` of a benchmark may say.

A verifier judges many (response, reference answer) pairs at once, so that one that needs processes can use several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Protocol, get_args

from eopd.stages.evaluate.settings import VerifierName
from eopd.stages.evaluate.verifiers import countdown, exact
from eopd.stages.evaluate.verifiers.mathematics import MathVerifier
from eopd.stages.evaluate.verifiers.verdict import Verdict

Judge = Callable[[str, str], Verdict]


class Verifier(Protocol):
    def verify_many(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts of (response, reference answer) pairs, in order.

        Raises:
            ValueError: a reference answer that this verifier cannot read.
        """

    def check_answer(self, answer: str) -> None:
        """Raises ValueError where this verifier cannot read the reference answer: asked before anything is sampled."""

    def named(self) -> str:
        """Name and version of what judged, for the results; to be asked after ``verify_many``."""

    def close(self) -> None:
        """Free what it holds."""


class PlainVerifier:
    """A pure function of response and answer, in this process."""

    def __init__(self, name: str, judge: Judge) -> None:
        self._name = name
        self._judge = judge

    def verify_many(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        return [self._judge(response, answer) for response, answer in pairs]

    def check_answer(self, answer: str) -> None:
        self._judge("", answer)

    def named(self) -> str:
        return f"{self._name} (eopd {version('eopd')})"

    def close(self) -> None:
        pass


PLAIN: dict[str, Judge] = {"countdown": countdown.verify, "exact": exact.verify}
"""Verifiers that are a pure function. One more here, and in ``VerifierName``, is all that a new task needs."""

NAMES: tuple[str, ...] = get_args(VerifierName)


def open_verifier(name: str, *, seconds: float = 5.0, workers: int = 1) -> Verifier:
    """The verifier called ``name``.

    Args:
        seconds: limit for one answer (``math``).
        workers: grading processes (``math``).

    Raises:
        ValueError: there is none of that name.
    """
    if name == "math":
        return MathVerifier(seconds=seconds, workers=workers)
    if name not in PLAIN:
        raise ValueError(f"verifier {name!r} is unknown; there are {', '.join(sorted(NAMES))}")
    return PlainVerifier(name, PLAIN[name])
