"""Training from the cache: the sparse head's errors, memory and time; the loop against TRL's, and its waits for data.

    python -m benchmarks.training                                  # everything, T = 2,048, V = 151,936, D = 1,024
    python -m benchmarks.training --parts oracle,memory --tokens 512
    python -m benchmarks.training --parts trl --steps 8            # needs TRL: .venv/bin/uv pip install -e '.[peers]'

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks import against_trl, loader, student_head
from benchmarks.machine import describe

PARTS: dict[str, Callable[[student_head.Size, argparse.Namespace], dict[str, Any]]] = {
    "oracle": lambda size, given: student_head.oracle(),
    "memory": lambda size, given: student_head.memory(size),
    "time": lambda size, given: student_head.times(size),
    "trl": lambda size, given: against_trl.measure(given.steps, given.runs),
    "loader": lambda size, given: loader.measure(given.loader_steps),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated: " + ", ".join(PARTS))
    parser.add_argument("--tokens", type=int, default=student_head.Size.tokens)
    parser.add_argument("--vocab", type=int, default=student_head.Size.vocab)
    parser.add_argument("--dim", type=int, default=student_head.Size.dim)
    parser.add_argument("--repeats", type=int, default=student_head.Size.repeats)
    parser.add_argument("--steps", type=int, default=13, help="optimiser steps of a run of the trl part")
    parser.add_argument("--runs", type=int, default=2, help="runs of each side of the trl part, in turns")
    parser.add_argument("--loader-steps", type=int, default=100, help="optimiser steps of a run of the loader part")
    given = parser.parse_args()
    parts = given.parts.split(",")
    for part in parts:
        if part not in PARTS:
            parser.error(f"--parts {part!r} is unknown; known: {', '.join(PARTS)}")
    size = student_head.Size(given.tokens, given.vocab, given.dim, given.repeats)
    document: dict[str, Any] = {
        "benchmark": "training",
        "settings": asdict(size),
        "machine": describe("trl", "accelerate"),
    }
    for part in parts:
        result = PARTS[part](size, given)
        print(part, json.dumps(result), flush=True)
        document |= result
    print(json.dumps(document))


if __name__ == "__main__":
    main()
