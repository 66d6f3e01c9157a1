"""The grading process of math-verify: one JSON line in, one JSON line out, until its input ends.

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

from eopd.stages.verifiers.answers import as_written, final_answer, reference_answer
from eopd.stages.verifiers.notation import tidy
from eopd.stages.verifiers.statements import equations
from eopd.stages.verifiers.verdict import UNREADABLE

MEMORY_BYTES = 4 << 30


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Whatever the libraries print must not mix with the answers.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.disable(logging.CRITICAL)
    import eopd.stages.verifiers.equality  # noqa: F401  (slow: not within the first answer's time)

    _say(out, {"ready": True, "version": version("math-verify")})
    for line in sys.stdin:
        request = json.loads(line)
        _limit_processor_time(request["seconds"])
        _say(out, grade(request["response"], request["answer"]))


def grade(response: str, answer: str) -> dict[str, Any]:
    """Grade one response. May take any time and any memory: never call it in a process that matters."""
    from eopd.stages.verifiers.equality import same_answer

    expected = reference_answer(answer)
    if not tidy(expected):
        return {"correct": False, "reason": UNREADABLE}
    given = final_answer(response)
    if given is None:
        return {"correct": False, "reason": "no answer found"}
    # ``2e-1`` is a number first, then twice Euler's number less one.
    if not any(same_answer(expected, reading) for reading in dict.fromkeys((as_written(given), given))):
        return {"correct": False, "reason": f"answered {given[:80]}"}
    form = hashlib.sha256("\n".join(equations(response)).encode()).hexdigest()[:16]
    return {"correct": True, "form": form}


def _limit_processor_time(seconds: float) -> None:
    """Limit processor time from now on; past it the kernel ends this process (SIGXCPU). The parent's limit, in wall
    time, comes first."""
    spent = time.process_time()
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(spent + seconds + 1.0)
    resource.setrlimit(resource.RLIMIT_CPU, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _say(out: Any, what: dict[str, Any]) -> None:
    out.write(json.dumps(what) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
