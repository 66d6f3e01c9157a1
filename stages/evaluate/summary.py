"""From verified samples to the figures of a benchmark.

Rates and probabilities lie in [0, 1], entropies are in nats, lengths in tokens (stop token included). Intervals are
percentile bootstrap over problems. Letters: P problems, n samples a problem, M figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from eopd.stages.evaluate import diversity, passk
from eopd.stages.evaluate.verifiers.mathematics import DIED, TIMED_OUT
from eopd.stages.intervals import intervals, resampled_means

Row = dict[str, Any]


@dataclass
class Tally:
    """What a benchmark's parts add up to; one ``add`` a part, so that memory stays bounded by a part."""

    problems: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    stopped: int = 0
    ungraded: int = 0
    surprise: float = 0.0  # sum of -log-prob of the sampled tokens under the distribution sampled from, nats
    surprise_tokens: int = 0

    def add(self, samples: pa.Table, skipped: Iterable[str] = ()) -> None:
        """One part's samples, whose rows come problem by problem."""
        self.skipped += skipped
        rows = samples.to_pylist()
        start = 0
        while start < len(rows):
            stop = start
            while stop < len(rows) and rows[stop]["problem_id"] == rows[start]["problem_id"]:
                stop += 1
            self._add_problem(rows[start:stop])
            start = stop

    def _add_problem(self, rows: Sequence[Row]) -> None:
        ids = [np.asarray(_without_stop(row), dtype=np.int32) for row in rows]
        lengths = [len(row["response_token_ids"]) for row in rows]
        truncated = sum(row["finish_reason"] == "length" for row in rows)
        self.lengths += lengths
        self.stopped += len(rows) - truncated
        for row in rows:
            # what was sampled from is the truncated distribution, where one is
            logprobs = row["truncated_logprobs"] or row["logprobs"]
            if logprobs is not None:
                self.surprise -= math.fsum(logprobs)
                self.surprise_tokens += len(logprobs)
            reason = row["reason"] or ""
            self.ungraded += reason == DIED or reason.startswith(TIMED_OUT)
        self.problems.append(
            {
                "benchmark": rows[0]["benchmark"],
                "problem_id": rows[0]["problem_id"],
                "samples": len(rows),
                "correct": sum(row["correct"] for row in rows),
                "distinct_correct": len({row["form"] for row in rows if row["correct"]}),
                "self_bleu": _known(diversity.self_bleu(ids)),
                "distinct_4": _known(diversity.distinct(ids)),
                "response_tokens": float(np.mean(lengths)),
                "truncated": truncated,
            }
        )


@dataclass(frozen=True)
class Figures:
    """A benchmark's results (JSON values), and its resampled means for averages over benchmarks."""

    values: Row
    resampled: passk.Floats  # [B, n + 2]: Pass@1 .. Pass@n, Avg@n, distinct correct


def figures(tally: Tally, *, resamples: int, confidence: float, seed: int) -> Figures:
    """Everything that is said of one benchmark.

    Raises:
        ValueError: no problem was evaluated.
    """
    if not tally.problems:
        raise ValueError(f"no problem was evaluated; {len(tally.skipped)} prompts were too long")
    n = tally.problems[0]["samples"]
    correct = [row["correct"] for row in tally.problems]
    distinct = np.asarray([row["distinct_correct"] for row in tally.problems], dtype=np.float64)
    columns = np.column_stack([passk.pass_at_all(n, correct), np.asarray(correct) / n, distinct])
    resampled = resampled_means(columns, resamples=resamples, seed=seed)
    lengths = np.asarray(tally.lengths)
    responses = len(lengths)
    values = {
        "problems": len(tally.problems),
        "skipped": sorted(tally.skipped),
        "samples": n,
        **_headline(columns.mean(axis=0), resampled, confidence),
        "self_bleu": _mean(row["self_bleu"] for row in tally.problems),
        "distinct_4": _mean(row["distinct_4"] for row in tally.problems),
        "response_tokens": {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "p95": float(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
            "total": int(lengths.sum()),
        },
        "stop_rate": tally.stopped / responses,
        "truncation_rate": 1.0 - tally.stopped / responses,
        # an unbiased estimate of the mean entropy of the distribution that was sampled from
        "token_entropy": tally.surprise / tally.surprise_tokens if tally.surprise_tokens else None,
        "ungraded": tally.ungraded,
    }
    return Figures(values, resampled)


def overall(benchmarks: Mapping[str, Figures], confidence: float) -> Row:
    """The unweighted mean over benchmarks, as the paper's tables have it."""
    widths = {found.values["samples"] for found in benchmarks.values()}
    assert len(widths) == 1, widths
    resampled = np.mean([found.resampled for found in benchmarks.values()], axis=0)
    point = np.mean([_point(found.values) for found in benchmarks.values()], axis=0)
    return _headline(point, resampled, confidence)


def _point(values: Row) -> list[float]:
    return [*values["pass_at_k"].values(), values["avg_at_k"], values["distinct_correct"]]


def _headline(point: passk.Floats, resampled: passk.Floats, confidence: float) -> Row:
    n = len(point) - 2
    bounds = [[interval.low, interval.high] for interval in intervals(resampled, confidence)]
    return {
        "avg_at_k": float(point[n]),
        "avg_interval": bounds[n],
        "pass_at_k": {str(k): float(point[k - 1]) for k in range(1, n + 1)},
        "pass_interval": {str(k): bounds[k - 1] for k in range(1, n + 1)},
        "distinct_correct": float(point[n + 1]),
        "distinct_correct_interval": bounds[n + 1],
    }


def _without_stop(row: Row) -> list[int]:
    ids: list[int] = row["response_token_ids"]
    return ids[:-1] if row["finish_reason"] == "stop" else ids


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
