"""Solved Countdown problems in bins of equal size, and held-out problems by the operator that they end with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from examples.countdown.task import all_solutions
from examples.sources.data import LIMIT

PROBLEMS = Path(__file__).parent.parent / "countdown"
OPERATORS = {"+": "plus", "-": "minus", "*": "times"}
BINS = len(OPERATORS) * 2


def last_operator(solution: str) -> str:
    """Return the operator of a solution's last step, such as * of ``2+3=5,5*4=20``."""
    step = solution.rsplit(",", 1)[-1].split("=")[0]
    return next(operator for operator in OPERATORS if operator in step)


def solved(path: Path) -> Iterator[tuple[dict[str, Any], int, list[str]]]:
    """Yield every problem of a file with how many numbers it has and all its solutions, if it has one."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        left, target = row["answer"].split("=")
        numbers = tuple(map(int, left.split(",")))
        solutions = sorted(set(all_solutions(numbers, int(target), LIMIT)))
        if solutions:
            yield row, len(numbers), solutions


def documents(each: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield ``each`` problems of every bin with a solution drawn from all of theirs.

    A bin is the operator of the solution's last step and how many numbers the problem has.
    """
    random = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    for row, numbers, solutions in solved(PROBLEMS / "train.jsonl"):
        response = solutions[random.integers(len(solutions))]
        last = last_operator(response)
        name = f"{last} {numbers}"
        if counts[name] < each:
            counts[name] += 1
            yield {**row, "response": response, "last": last, "numbers": numbers, "bin": name}
        if sum(counts.values()) == each * BINS:
            return
    raise ValueError(f"{PROBLEMS / 'train.jsonl'} has no {each} problems of every bin: {dict(counts)}")


def benchmarks(most: int | None) -> dict[str, list[dict[str, Any]]]:
    """Return held-out problems by the operator that all their solutions end with, ``most`` of each."""
    result: dict[str, list[dict[str, Any]]] = {name: [] for name in OPERATORS.values()}
    for row, _, solutions in solved(PROBLEMS / "evaluate.jsonl"):
        operators = {last_operator(solution) for solution in solutions}
        if len(operators) == 1:
            result[OPERATORS[operators.pop()]].append(row)
    return {name: rows[:most] for name, rows in result.items()}


def make(out: Path, each: int, most: int | None) -> None:
    """Write ``documents.jsonl`` and a file for each benchmark to ``out``, unless they are there."""
    files = {"documents": lambda: list(documents(each))}
    if not all((out / f"{name}.jsonl").exists() for name in OPERATORS.values()):
        held_out = benchmarks(most)
        files |= {name: lambda name=name: held_out[name] for name in OPERATORS.values()}
    for name, rows in files.items():
        path = out / f"{name}.jsonl"
        if not path.exists():
            path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
