"""The Countdown task: reach a target from a few numbers with + - *, one step at a time, every number used once.

A problem is the text ``4,7,9,2=24:`` and a solution ``9-7=2,2*2=4,...``, one ``a?b=c`` a step. Traces are drawn
forwards (random pair, random operation), so the traces of one problem are random among its solutions: what a
model learns from them is certain of the arithmetic and uncertain at the forks. Whether a problem is held out
is a property of the problem itself (a hash), so nothing trained by this folder has met a held-out one.

Letters: N traces drawn, n numbers of a problem, L tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

OPERATIONS = "+-*"


@dataclass(frozen=True)
class Rules:
    """Which problems are drawn: numbers in [low, high], every step's result in [1, limit]."""

    low: int = 1
    high: int = 12
    limit: int = 49
    held_out_percent: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high <= self.limit:
            raise ValueError(f"rules need 1 <= low <= high <= limit, got {self.low}, {self.high}, {self.limit}")


@dataclass(frozen=True)
class Traces:
    """Solved problems: ``numbers [N, n]`` in prompt order, ``target [N]``, ``steps [N, n-1, 4]`` as a, op, b, c."""

    numbers: Ints
    target: Ints
    steps: Ints

    def __len__(self) -> int:
        return int(self.target.shape[0])

    def take(self, rows: NDArray[np.bool_] | Ints | slice) -> Traces:
        return Traces(self.numbers[rows], self.target[rows], self.steps[rows])

    def problems(self) -> list[str]:
        return [
            problem_text(numbers, target)
            for numbers, target in zip(self.numbers.tolist(), self.target.tolist(), strict=True)
        ]

    def solutions(self) -> list[str]:
        return [",".join(f"{a}{OPERATIONS[op]}{b}={c}" for a, op, b, c in steps) for steps in self.steps.tolist()]


def problem_text(numbers: list[int], target: int) -> str:
    """The prompt of a problem, as both models read it."""
    return f"{answer_text(numbers, target)}:"


def answer_text(numbers: list[int], target: int) -> str:
    """The reference answer that the ``countdown`` verifier reads: ``numbers=target``."""
    return f"{','.join(map(str, numbers))}={target}"


def draw(rng: np.random.Generator, count: int, n: int, rules: Rules) -> Traces:
    """At most ``count`` traces of ``n`` numbers each (a draw that meets no valid operation is dropped)."""
    numbers = rng.integers(rules.low, rules.high + 1, size=(count, n))
    left = numbers.copy()
    steps = np.zeros((count, n - 1, 4), dtype=np.int64)
    alive = np.ones(count, dtype=bool)
    rows = np.arange(count)
    for step in range(n - 1):
        remaining = n - step
        i = rng.integers(0, remaining, size=count)
        j = (i + rng.integers(1, remaining, size=count)) % remaining
        a, b = left[rows, i], left[rows, j]
        results = np.stack([a + b, np.abs(a - b), a * b], axis=1)
        valid = (results >= 1) & (results <= rules.limit)
        alive &= valid.any(axis=1)
        op = np.argmax(rng.random((count, 3)) * valid, axis=1)
        c = results[rows, op]
        swap = (op == OPERATIONS.index("-")) & (a < b)  # + and * keep the random order, - has only one
        a, b = np.where(swap, b, a), np.where(swap, a, b)
        steps[:, step] = np.stack([a, op, b, c], axis=1)
        left[rows, i] = c
        left[rows, j] = left[:, remaining - 1]
    return Traces(numbers, steps[:, -1, 3], steps).take(alive)


def problem_hash(numbers: Ints, target: Ints) -> NDArray[np.uint64]:
    """A hash of each problem [N], whatever the order of its numbers [N, n]."""
    value = np.full(len(target), 1469598103934665603, dtype=np.uint64)
    for column in (*np.sort(numbers, axis=1).T, target):
        value = (value ^ column.astype(np.uint64)) * np.uint64(1099511628211)
        value ^= value >> np.uint64(29)
    return value


def is_held_out(numbers: Ints, target: Ints, rules: Rules) -> NDArray[np.bool_]:
    """[N]: whether the problem belongs to the evaluation side."""
    return problem_hash(numbers, target) % np.uint64(100) < np.uint64(rules.held_out_percent)


def draw_side(rng: np.random.Generator, count: int, n: int, rules: Rules, *, held_out: bool) -> Traces:
    """Exactly ``count`` traces of training problems, or of held-out ones."""
    collected: list[Traces] = []
    have = 0
    while have < count:
        batch = draw(rng, 2 * count + 64, n, rules)
        batch = batch.take(is_held_out(batch.numbers, batch.target, rules) == held_out)
        collected.append(batch)
        have += len(batch)
    return Traces(*(np.concatenate(parts)[:count] for parts in zip(*map(_fields, collected), strict=True)))


def distinct_problems(seed: int, count: int, n: int, rules: Rules, *, held_out: bool) -> Traces:
    """``count`` problems, no two with the same numbers and target.

    Raises:
        ValueError: the rules do not have so many problems.
    """
    rng = np.random.default_rng([seed, n, int(held_out)])
    seen: dict[int, None] = {}
    kept: list[Traces] = []
    idle = 0
    while len(seen) < count:
        batch = draw_side(rng, 4096, n, rules, held_out=held_out)
        fresh = []
        for row, key in enumerate(problem_hash(batch.numbers, batch.target).tolist()):
            if key not in seen and len(seen) < count:
                seen[key] = None
                fresh.append(row)
        idle = 0 if fresh else idle + 1
        if idle > 20:
            raise ValueError(f"asked for {count} problems of {n} numbers, but {rules} has only about {len(seen)}")
        kept.append(batch.take(np.asarray(fresh, dtype=np.int64)))
    return Traces(*(np.concatenate(parts) for parts in zip(*map(_fields, kept), strict=True)))


def _fields(traces: Traces) -> tuple[Ints, Ints, Ints]:
    return traces.numbers, traces.target, traces.steps


def all_solutions(numbers: tuple[int, ...], target: int, limit: int) -> Iterator[str]:
    """Every solution text whose results lie in [1, limit], by plain enumeration (both operand orders of + and *)."""
    if len(numbers) == 1:
        if numbers[0] == target:
            yield ""
        return
    for i, j in combinations(range(len(numbers)), 2):
        rest = tuple(value for k, value in enumerate(numbers) if k not in (i, j))
        for a, b in {(numbers[i], numbers[j]), (numbers[j], numbers[i])}:
            for symbol, c in zip(OPERATIONS, (a + b, a - b, a * b), strict=True):
                if 1 <= c <= limit:
                    for tail in all_solutions((*rest, c), target, limit):
                        yield f"{a}{symbol}{b}={c}" + (f",{tail}" if tail else "")
