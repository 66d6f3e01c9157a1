"""Training from the cache: the sparse head's errors, memory and time.

    python -m benchmarks.training                                  # everything, T = 2,048, V = 151,936, D = 1,024
    python -m benchmarks.training --parts oracle,memory --tokens 512

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks import student_head
from benchmarks.machine import machine

PARTS: dict[str, Callable[[student_head.Size], dict[str, Any]]] = {
    "oracle": lambda size: student_head.oracle(),
    "memory": student_head.memory,
    "time": student_head.times,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated: " + ", ".join(PARTS))
    parser.add_argument("--tokens", type=int, default=student_head.Size.tokens)
    parser.add_argument("--vocab", type=int, default=student_head.Size.vocab)
    parser.add_argument("--dim", type=int, default=student_head.Size.dim)
    parser.add_argument("--repeats", type=int, default=student_head.Size.repeats)
    given = parser.parse_args()
    size = student_head.Size(given.tokens, given.vocab, given.dim, given.repeats)
    document: dict[str, Any] = {"benchmark": "training", "settings": asdict(size), "machine": machine()}
    for part in given.parts.split(","):
        if part not in PARTS:
            parser.error(f"--parts {part!r} is unknown; known: {', '.join(PARTS)}")
        found = PARTS[part](size)
        print(part, json.dumps(found), flush=True)
        document |= found
    print(json.dumps(document))


if __name__ == "__main__":
    main()
