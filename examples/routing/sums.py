"""Sums of two numbers from 2 to 19, for a small language model: python -m examples.routing.sums > sums.jsonl"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator


def sums(seed: int = 0) -> Iterator[dict[str, str]]:
    """All 324 sums, shuffled."""
    pairs = [(a, b) for a in range(2, 20) for b in range(2, 20)]
    random.Random(seed).shuffle(pairs)
    for a, b in pairs:
        yield {"id": f"{a}+{b}", "problem": f"What is {a} plus {b}?", "answer": str(a + b)}


if __name__ == "__main__":
    print("\n".join(map(json.dumps, sums())))
