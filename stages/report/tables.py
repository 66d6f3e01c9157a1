"""The tables of evaluations, costs and settings, as text for the template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eopd.stages.report import palette, words
from eopd.stages.report.data import CostRow, RoundData, RunData
from eopd.stages.report.figure import Rows
from eopd.stages.report.words import Form

_MOST_ROUND_ROWS = 400
_OF_EVALUATIONS: tuple[tuple[str, str, Form], ...] = (
    ("distinct correct", "distinct_correct", "number"),
    ("self-BLEU", "self_bleu", "rate"),
    ("distinct 4-grams", "distinct_4", "rate"),
    ("sampled entropy", "token_entropy", "number"),
    ("tokens", "response_length", "number"),
    ("stopped", "stop_rate", "percent"),
    ("truncated", "truncation_rate", "percent"),
    ("ungraded", "ungraded", "count"),
    ("left out", "left_out", "count"),
)
_LONGEST_VALUE = 300


@dataclass(frozen=True)
class StageCost:
    """One stage of one run over all rounds. ``share``: of the run's known time, 0 to 1."""

    stage: str
    seconds: str
    tokens: str
    speed: str
    size: str
    share: float
    shared: str


@dataclass(frozen=True)
class RunCost:
    name: str
    index: int
    tone: str
    stages: tuple[StageCost, ...]
    total: str
    own: str
    by_round: tuple[tuple[str, ...], ...]
    left_out: int


@dataclass(frozen=True)
class SettingsTable:
    """``differing``: (key, value a run) of keys whose values are not the same in all runs; ``whole``: per run."""

    names: tuple[str, ...]
    differing: tuple[tuple[str, tuple[str, ...]], ...]
    whole: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


def evaluations(runs: Sequence[RunData]) -> Rows:
    """Every figure of every evaluation, with its interval in brackets; of each benchmark, where there are several."""
    rounds = [(run, item) for run in runs for item in run.rounds if item.avg_at_k]
    found = [(run, *each) for run, item in rounds for each in _by_benchmark(item)]
    several = len({name for _, item in rounds for name in item.benchmarks}) > 1
    body = tuple(
        (run.name, str(item.round), *([name] if several else []), *_evaluation(item))
        for run, name, item in found[:_MOST_ROUND_ROWS]
    )
    benchmark = ("benchmark",) if several else ()
    head = ("run", "round", *benchmark, "Avg@k", "Pass@k", *(title for title, _, _ in _OF_EVALUATIONS))
    return Rows(head, body, len(found) - len(body))


def _by_benchmark(item: RoundData) -> list[tuple[str, RoundData]]:
    """What is measured of each benchmark, under its name, after the mean over several."""
    named = [(words.printable(name, 60), found) for name, found in item.benchmarks.items()]
    return named if len(named) == 1 else [("mean", item), *named]


def _evaluation(item: RoundData) -> list[str]:
    cells = []
    for which in ("avg", "pass"):
        k = max(getattr(item, f"{which}_at_k"), default=0)
        value, bounds = (getattr(item, f"{which}_{name}").get(k) for name in ("at_k", "interval"))
        cells.append(_with_interval(value, bounds, "rate") + (f" at {k}" if value is not None else ""))
    for _, name, form in _OF_EVALUATIONS:
        cells.append(_with_interval(getattr(item, name), item.intervals.get(name), form))
    return cells


def _with_interval(value: float | None, bounds: tuple[float, float] | None, form: Form) -> str:
    spread = words.interval(*bounds, form) if bounds else ""
    return words.number(value, form) + (f" ({spread})" if spread else "")


def costs(runs: Sequence[RunData]) -> list[RunCost]:
    return [_run_cost(run, index) for index, run in enumerate(runs) if run.cost]


def time_of(rows: Sequence[CostRow]) -> str:
    """Of these jobs together, and of how many it is not known."""
    known, unknown = _total(row.seconds for row in rows), sum(row.seconds is None for row in rows)
    if known is None or not unknown:
        return words.duration(known)
    return f"{words.duration(known)} (+ {unknown} job{'s' if unknown > 1 else ''} of unknown time)"


def whole_time(runs: Sequence[RunData]) -> str:
    """Of all runs together; what several of them read counts once. Empty where it is known of no job."""
    jobs = {
        row.key or f"{number} {place}": row for number, run in enumerate(runs) for place, row in enumerate(run.cost)
    }
    return time_of(list(jobs.values())) if any(row.seconds is not None for row in jobs.values()) else ""


def settings(runs: Sequence[RunData]) -> SettingsTable:
    flat = [flatten(run.settings) for run in runs]
    keys = list(dict.fromkeys(key for table in flat for key in table))
    differing = tuple(
        (key, tuple(table.get(key, "not set") for table in flat))
        for key in keys
        if len({table.get(key) for table in flat}) > 1
    )
    whole = tuple((run.name, tuple(table.items())) for run, table in zip(runs, flat, strict=True) if table)
    return SettingsTable(tuple(run.name for run in runs), differing, whole)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"train": {"lr": 1e-5}}`` as ``{"train.lr": "1e-05"}``; lists and the like as JSON, long values cut."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = words.printable(f"{prefix}{key}", 120)
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            flat[name] = words.printable(text, _LONGEST_VALUE)
    return flat


def _run_cost(run: RunData, index: int) -> RunCost:
    whole = _total(row.seconds for row in run.cost)
    own = _total(row.seconds for row in run.cost if not row.shared)
    names = list(dict.fromkeys(row.stage for row in run.cost))
    stages = tuple(_stage(name, [row for row in run.cost if row.stage == name], whole) for name in names)
    by_round = tuple(_round_row(row) for row in run.cost[:_MOST_ROUND_ROWS])
    shared = any(row.shared for row in run.cost)
    return RunCost(
        run.name,
        index,
        palette.tone(index),
        stages,
        time_of(run.cost),
        words.duration(own or 0.0) if shared else "",
        by_round,
        len(run.cost) - len(by_round),
    )


def _stage(name: str, rows: list[CostRow], whole: float | None) -> StageCost:
    seconds = _total(row.seconds for row in rows)
    tokens = _total(row.tokens for row in rows)
    timed = [row for row in rows if row.seconds and row.tokens is not None]
    timed_seconds = _total(row.seconds for row in timed)
    timed_tokens = _total(row.tokens for row in timed)
    speed = timed_tokens / timed_seconds if timed_tokens is not None and timed_seconds else None
    shared = sum(row.shared for row in rows)
    return StageCost(
        words.printable(name, 60),
        time_of(rows),
        words.number(tokens, "count"),
        words.number(speed, "count"),
        words.size(_total(row.bytes for row in rows)),
        seconds / whole if seconds is not None and whole else 0.0,
        "" if not shared else "shared" if shared == len(rows) else f"{shared} of {len(rows)} shared",
    )


def _round_row(row: CostRow) -> tuple[str, ...]:
    return (
        words.printable(row.stage, 60),
        "–" if row.round is None else str(row.round),
        words.duration(row.seconds),
        words.number(row.tokens, "count"),
        words.size(row.bytes),
        "shared" if row.shared else "own",
    )


def _total(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
