"""Countdown problems with a response of the user's own: one solution each, found by enumeration.

python -m examples.sources.data --out solved.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from examples.countdown.task import all_solutions

PROBLEMS = Path(__file__).parent.parent / "countdown" / "train.jsonl"
LIMIT = 200
"""Largest intermediate result of a solution."""


def solved(problems: Path, count: int | None, seed: int = 0) -> Iterator[dict[str, str]]:
    """The problems that have a solution, each with one drawn from all of its solutions; teachers take turns."""
    random = np.random.default_rng(seed)
    for number, line in enumerate(problems.read_text(encoding="utf-8").strip().split("\n")[:count]):
        row = json.loads(line)
        numbers, target = row["answer"].split("=")
        solutions = sorted(set(all_solutions(tuple(map(int, numbers.split(","))), int(target), LIMIT)))
        if solutions:
            response = solutions[random.integers(len(solutions))]
            yield {**row, "response": response, "teacher": "self" if number % 2 else "expert"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, help="first problems only (default: all)")
    given = parser.parse_args()
    rows = list(solved(PROBLEMS, given.count))
    given.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{given.out}: {len(rows):,} solved problems")


if __name__ == "__main__":
    main()
