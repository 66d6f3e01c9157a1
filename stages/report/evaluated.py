"""From an evaluation's results to what the report shows of it: figures of a round, and what must be said of them.

Results of version 1 have no intervals but those of Avg@k, Pass@k and distinct correct solutions, and no verifiers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eopd.stages.report import words
from eopd.stages.report.data import RoundData

_MEANS = ("distinct_correct", "self_bleu", "distinct_4", "token_entropy", "truncation_rate", "stop_rate")
_MOST_ROUNDS = 6
_CONFIDENCE = 0.95  # where results do not say it
_NAMED_BY_EOPD = " (eopd 0.1.0)"

Results = Mapping[str, Any]
Bounds = tuple[float, float]


def round_figures(results: Results) -> tuple[dict[str, Any], dict[str, Bounds]]:
    """Fields of ``RoundData``, means over the benchmarks, and the intervals of the single ones."""
    mean, benchmarks = results["mean"], list(results["benchmarks"].values())
    means = {name: _mean([found[name] for found in benchmarks]) for name in _MEANS}
    length = {"mean": _mean([found["response_tokens"]["mean"] for found in benchmarks])}
    whole = {
        **means,
        **mean,
        "samples": benchmarks[0]["samples"],
        "response_tokens": {**length, **mean.get("response_tokens", {})},
        "ungraded": sum(found["ungraded"] for found in benchmarks),
    }
    return _figures(whole, sum(_left_out(results)))


def by_benchmark(number: int, results: Results) -> dict[str, RoundData]:
    """The same of each benchmark, by its name, after round ``number``."""
    found = {}
    for name, values in results["benchmarks"].items():
        figures, intervals = _figures(values, sum(_left_out(results, name)))
        found[name] = RoundData(number, **figures, intervals=intervals)
    return found


def _figures(values: Mapping[str, Any], left_out: int) -> tuple[dict[str, Any], dict[str, Bounds]]:
    """Of one benchmark, or of the mean over several."""
    samples, tokens = values["samples"], values["response_tokens"]
    passed = {int(k): bounds for k, bounds in values["pass_interval"].items() if bounds is not None}
    figures = {
        "avg_at_k": {samples: values["avg_at_k"]},
        "avg_interval": {samples: tuple(values["avg_interval"])} if values["avg_interval"] else {},
        "pass_at_k": {int(k): value for k, value in values["pass_at_k"].items()},
        "pass_interval": {k: tuple(bounds) for k, bounds in passed.items()},
        "response_length": tokens["mean"],
        "ungraded": values["ungraded"],
        "left_out": left_out,
        **{name: values[name] for name in _MEANS},
    }
    bounds = {
        "response_length": tokens.get("interval"),
        **{name: values.get(f"{name}_interval") for name in _MEANS},
    }
    return figures, {name: (found[0], found[1]) for name, found in bounds.items() if found is not None}


def graders(results: Results) -> list[str]:
    """Verifiers by name and version. Plain ones were named with eopd 0.1.0 while they had no version of their own."""
    return [name.replace(_NAMED_BY_EOPD, " 1") for name in results.get("verifiers", ())]


def interval(results: Mapping[int, Results]) -> str:
    """What the intervals of a run's figures are."""
    said = sorted({confidence(found) for found in results.values()} or {_CONFIDENCE})
    return f"{' and '.join(f'{100 * each:g}' for each in said)} % bootstrap over problems"


def confidence(results: Results) -> float:
    """Of the intervals of one evaluation."""
    found: float = results.get("settings", {}).get("confidence", _CONFIDENCE)
    return found


def warnings(results: Mapping[int, Results]) -> list[str]:
    """What spoils the figures of some rounds; nothing of those that are as they should be."""
    given_up, missing, long = {}, {}, {}
    for number, found in results.items():
        benchmarks = found["benchmarks"].values()
        answers = sum(one["problems"] * one["samples"] for one in benchmarks)
        ungraded = sum(one["ungraded"] for one in benchmarks)
        set_aside, skipped = _left_out(found)
        if ungraded:
            given_up[number] = f"{ungraded} of {answers} ({words.number(ungraded / answers, 'percent')})"
        if set_aside:
            missing[number] = str(set_aside)
        if skipped:
            long[number] = str(skipped)
    said = []
    if given_up:
        said.append(f"The grader gave up on answers, which count as wrong: {_by_round(given_up)}.")
    if missing:
        said.append(f"Problems are missing, set aside after failures; figures are of the others: {_by_round(missing)}.")
    if long:
        said.append(f"Problems with too long prompts are left out: {_by_round(long)}.")
    names = sorted({tuple(graders(found)) for found in results.values()})
    if len(names) > 1:
        versions = "; ".join(words.joined(list(each)) or "not recorded" for each in names)
        said.append(f"Rounds were graded by different verifiers ({versions}): changes may be due to that alone.")
    return said


def _left_out(results: Results, benchmark: str | None = None) -> tuple[int, int]:
    """Problems of parts that were set aside, and those with too long prompts; of all benchmarks (None) or of one."""
    aside = [rows for rows in results.get("left_out", ()) if benchmark in (None, rows["benchmark"])]
    skipped = [found["skipped"] for name, found in results["benchmarks"].items() if benchmark in (None, name)]
    return sum(rows["stop"] - rows["start"] for rows in aside), sum(map(len, skipped))


def _by_round(found: Mapping[int, str]) -> str:
    said = [f"{text} in round {number}" for number, text in sorted(found.items())]
    more = len(said) - _MOST_ROUNDS
    return ", ".join(said[:_MOST_ROUNDS]) + (f" and {more} more rounds" if more > 0 else "")


def _mean(values: list[float | None]) -> float | None:
    """Of the benchmarks; None where one lacks it."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
