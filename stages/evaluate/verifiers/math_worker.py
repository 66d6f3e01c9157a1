"""The process in which math-verify runs: one JSON line in, one JSON line out, until its input ends.

Answers come from a model and may be anything. This process may hang, grow or die: its parent
(``verifiers.mathematics``) kills it when an answer takes too long. It limits its own memory, and its own processor
time per answer, so that it does not burn on for ever when the parent was killed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import resource
import sys
import time
from importlib.metadata import version
from typing import Any

from eopd.stages.evaluate.verifiers.answers import readings_of_reference, readings_of_response
from eopd.stages.evaluate.verifiers.equations import equations
from eopd.stages.evaluate.verifiers.verdict import UNREADABLE

MEMORY_BYTES = 4 << 30
MAX_CHARACTERS = 20_000
"""The answer stands at the end: of a longer response only the last so many characters are read."""
SMALL = 1e-3
TOLERANCE = 1e-3
"""Of a number below ``SMALL``, relative: at ``SMALL`` it is what six decimals allow."""
ZERO = 1e-90
"""What an expression that is zero may be evaluated to; only such equal a reference answer of zero."""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Whatever the libraries print must not mix with the answers.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401  (slow: not within the first answer's time)

    _say(out, {"ready": True, "version": version("math-verify")})
    for line in sys.stdin:
        asked = json.loads(line)
        _limit_processor_time(asked["seconds"])
        _say(out, grade(asked["response"], asked["answer"]))


def grade(response: str, answer: str) -> dict[str, Any]:
    """Verdict of one response. Takes any time and any memory: never call it in a process that matters."""
    gold = _read_reference(answer)
    if not gold:
        return {"correct": False, "reason": UNREADABLE}
    read = None
    for text in readings_of_response(response[-MAX_CHARACTERS:]):
        found = _parse(text)
        if found and _equal(gold, found):
            form = hashlib.sha256("\n".join(equations(response)).encode()).hexdigest()[:16]
            return {"correct": True, "form": form}
        read = read or (found and str(found[-1]))
    return {"correct": False, "reason": f"answered {read[:80]}" if read else "no answer found"}


def _read_reference(answer: str) -> list[Any]:
    """Expression and text of a reference answer; the text alone of LaTeX that math-verify cannot parse."""
    readings = (_parse(text, numbers="\\" not in text) for text in readings_of_reference(answer))
    return next((found for found in readings if found), [])


def _parse(text: str, *, numbers: bool = True) -> list[Any]:
    """What math-verify reads: an expression, if it can be parsed, and its text; nothing where there is neither.

    Args:
        numbers: whether the last plain number may stand for mathematics that cannot be parsed.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    kinds = [LatexExtractionConfig(), *([ExprExtractionConfig()] if numbers else [])]
    found: list[Any] = parse(text, extraction_config=kinds, parsing_timeout=None)
    return found


def _equal(gold: list[Any], found: list[Any]) -> bool:
    """As math-verify has it, but that numbers below ``SMALL`` agree in their digits: it rounds all to six decimals."""
    from math_verify import verify

    if not verify(gold, found, timeout_seconds=None):
        return False
    expected = _number(gold[0])
    if expected is None or abs(expected) >= SMALL:
        return True
    number = _number(found[0])
    return number is None or abs(number - expected) <= max(TOLERANCE * abs(expected), ZERO)


def _number(read: Any) -> Any:
    """The real number that an expression is, or that stands right of its last equals sign; else None."""
    from math_verify.grader import is_equation, take_last_relation

    value = take_last_relation(read).rhs if is_equation(read) else read
    if not getattr(value, "is_number", False):  # a matrix or a text is not asked
        return None
    value = value.evalf()
    return value if value.is_Number and value.is_finite else None


def _limit_processor_time(seconds: float) -> None:
    """From now on; past it the kernel ends this process (SIGXCPU). The parent's limit, in wall time, comes first."""
    spent = time.process_time()
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(spent + seconds + 1.0)
    resource.setrlimit(resource.RLIMIT_CPU, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _say(out: Any, what: dict[str, Any]) -> None:
    out.write(json.dumps(what) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
