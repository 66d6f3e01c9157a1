"""Benchmark figures from verified samples.

Rates and probabilities lie in [0, 1], entropies are in nats, lengths in tokens (stop token included). Intervals are
bootstrap over problems, None where the problems say nothing of the spread (``stages.intervals``). Letters: P problems,
n samples a problem, M figures, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eopd.stages.intervals import Interval, bootstrap, group_means, intervals, resampled_means
from eopd.stages.verifiers.answers import last_box
from eopd.stages.verifiers.mathematics import DIED, TIMED_OUT
from eopd.stages.verifiers.verdict import NO_ANSWER, UNREADABLE
from eopd.storage.errors import InputError

# -- passk ------------------------------------------------------------------------------------------------------------

# Avg@k and the unbiased Pass@k. Letters: P problems, n samples a problem, c correct ones among them.


Floats = NDArray[np.float64]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that ``k`` of the ``n`` samples, drawn without replacement, include one of the ``c`` correct
    ones.

    ``1 - C(n-c, k) / C(n, k)`` (Chen et al. 2021, arXiv 2107.03374), as a product, so that it neither overflows
    nor cancels: the ratio is the product over i in (n-c, n] of (1 - k/i).

    Raises:
        ValueError: not 0 <= c <= n or not 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"correct samples must be in [0, n], got c = {c}, n = {n}")
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, n], got k = {k}, n = {n}")
    if n - c < k:
        return 1.0
    if c == 0:
        return 0.0
    return -math.expm1(math.fsum(math.log1p(-k / i) for i in range(n - c + 1, n + 1)))


def pass_at_all(n: int, correct: Sequence[int]) -> Floats:
    """Return Pass@k of each problem for every k: [P, n], column k-1 is Pass@k."""
    table = {c: [pass_at_k(n, c, k) for k in range(1, n + 1)] for c in set(correct)}
    return np.asarray([table[c] for c in correct], dtype=np.float64).reshape(len(correct), n)


# -- diversity --------------------------------------------------------------------------------------------------------

# Diversity of the responses to one problem: self-BLEU and distinct-n over token ids.
#
# Letters: S samples of one problem, U distinct n-grams among them.


Ids = NDArray[np.int32]
ORDER = 4


def self_bleu(samples: Sequence[Ids]) -> float:
    """Return the mean BLEU-4 of each sample against all others, in [0, 1]; 1: all equal, NaN: fewer than two samples.

    Self-BLEU as in Zhu et al. 2018 (arXiv 1802.01886) on BLEU (Papineni et al. 2002) with add-one smoothed orders
    above one (Lin and Och 2004). A sample shorter than four tokens is compared on the orders that it has; an empty
    one counts 1 if another is empty too, else 0.
    """
    count = len(samples)
    if count < 2:
        return math.nan
    lengths = np.asarray([len(sample) for sample in samples])
    logs = np.zeros(count)
    orders = np.zeros(count)
    for n in range(1, ORDER + 1):
        grams, totals = _counts(samples, n)
        clipped = np.minimum(grams, _most_elsewhere(grams)).sum(axis=1)
        smooth = 0.0 if n == 1 else 1.0
        precision = (clipped + smooth) / np.maximum(totals + smooth, 1.0)
        with np.errstate(divide="ignore"):
            logs += np.where(totals > 0, np.log(precision), 0.0)
        orders += totals > 0
    bleu = np.exp(logs / np.maximum(orders, 1.0)) * _brevity(lengths)
    empty = lengths == 0
    bleu[empty] = 1.0 if empty.sum() > 1 else 0.0
    return float(bleu.mean())


def distinct(samples: Sequence[Ids], n: int = ORDER) -> float:
    """Return distinct n-grams over all n-grams of a problem's samples, in (0, 1]; NaN if there is none.

    Li et al. 2016 (arXiv 1510.03055). Falls with the number of samples and their length: compare at equal both.
    """
    grams, totals = _counts(samples, n)
    return grams.shape[1] / int(totals.sum()) if totals.sum() else math.nan


def _counts(samples: Sequence[Ids], n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count every distinct n-gram in every sample [S, U], and n-grams per sample [S]."""
    totals = np.asarray([max(0, len(sample) - n + 1) for sample in samples], dtype=np.int64)
    if totals.sum() == 0:
        return np.zeros((len(samples), 0), dtype=np.int64), totals
    windows = [np.lib.stride_tricks.sliding_window_view(s, n) for s in samples if len(s) >= n]
    unique, inverse = np.unique(np.concatenate(windows), axis=0, return_inverse=True)
    grams = np.zeros((len(samples), len(unique)), dtype=np.int64)
    np.add.at(grams, (np.repeat(np.arange(len(samples)), totals), inverse.reshape(-1)), 1)
    return grams, totals


def _most_elsewhere(grams: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the largest count of each n-gram among the *other* samples: [S, U]."""
    if grams.shape[1] == 0:
        return grams
    top = np.sort(grams, axis=0)
    # For the (first) sample that holds the largest count, the others' largest is the second largest.
    most = np.broadcast_to(top[-1], grams.shape).copy()
    most[grams.argmax(axis=0), np.arange(grams.shape[1])] = top[-2]
    return most


def _brevity(lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the brevity penalty [S] against the reference of closest length (the shorter of two equally close)."""
    gaps = np.abs(lengths[:, None] - lengths[None, :]).astype(np.float64)
    gaps += 0.25 * (lengths[None, :] > lengths[:, None])
    np.fill_diagonal(gaps, np.inf)
    closest = lengths[gaps.argmin(axis=1)]
    penalty: NDArray[np.float64] = np.exp(np.minimum(0.0, 1.0 - closest / np.maximum(lengths, 1)))
    return penalty


# -- summary ----------------------------------------------------------------------------------------------------------

Row = dict[str, Any]


@dataclass
class Tally:
    """Running totals of a benchmark's parts; memory stays bounded by one part."""

    problems: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    stopped: int = 0
    ungraded: int = 0
    unanswered: int = 0  # responses in which the verifier found no answer
    unboxed_correct: int = 0
    # a problem each: sum of -log-prob of its sampled tokens under the distribution sampled from (nats), and the tokens
    surprise: list[tuple[float, int]] = field(default_factory=list)
    boxes: bool = False  # whether answers belong in boxes, so that right ones without are counted

    def add(self, samples: pa.Table, skipped: Iterable[str] = ()) -> None:
        """Add one part's samples, whose rows are grouped by problem."""
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
        # samples come from the truncated distribution, if there is one
        logprobs = [row["truncated_logprobs"] or row["logprobs"] or [] for row in rows]
        self.surprise.append((-math.fsum(map(math.fsum, logprobs)), sum(map(len, logprobs))))
        for row in rows:
            reason = row["reason"] or ""
            self.ungraded += reason in (DIED, UNREADABLE) or reason.startswith(TIMED_OUT)
            self.unanswered += reason.startswith(NO_ANSWER)
            self.unboxed_correct += self.boxes and row["correct"] and last_box(row["response_text"]) is None
        self.problems.append(
            {
                "benchmark": rows[0]["benchmark"],
                "problem_id": rows[0]["problem_id"],
                "samples": len(rows),
                "correct": sum(row["correct"] for row in rows),
                "distinct_correct": len({row["form"] for row in rows if row["correct"]}),
                "self_bleu": _known(self_bleu(ids)),
                "distinct_4": _known(distinct(ids)),
                "response_tokens": float(np.mean(lengths)),
                "truncated": truncated,
            }
        )


def doubts(name: str, tally: Tally) -> list[str]:
    """List reasons to doubt a benchmark's results as a whole, which are more often due to settings than to the
    student."""
    responses = len(tally.lengths)
    if responses and tally.unanswered == responses:
        why = "no answer could be read in any"
    elif responses and tally.ungraded == responses:
        why = "the verifier could judge none"
    elif responses and not any(problem["correct"] for problem in tally.problems):
        why = "none is right"
    else:
        return []
    stopped = f"{tally.stopped / responses:.0%} of them ended by themselves"
    return [
        f"benchmark {name}: of {responses:,} responses {why} ({stopped}); compare its columns.answer and verifier with "
        "a few responses, and see whether template, suffix and max_new_tokens let the student answer"
    ]


@dataclass(frozen=True)
class Figures:
    """A benchmark's results (JSON values), and the inputs of means over several benchmarks."""

    values: Row
    by_problem: dict[str, Floats]  # [P, M], or fewer problems where the others have no such figure
    drawn_entropy: Floats  # [B]: token entropy in resamples


def figures(name: str, tally: Tally, *, resamples: int, confidence: float, seed: int) -> Figures:
    """Compute all figures of the benchmark ``name``.

    Raises:
        ValueError: no problem was evaluated.
    """
    if not tally.problems:
        raise InputError(
            f"benchmark {name}: no problem was evaluated; {len(tally.skipped)} prompts were too long (raise "
            "evaluate.max_prompt_tokens), all others are of parts that were set aside",
            setting="evaluate.max_prompt_tokens",
        )
    n = tally.problems[0]["samples"]
    lengths = np.asarray(tally.lengths)
    surprise = np.asarray([sums for sums in tally.surprise if sums[1]], dtype=np.float64)  # [P, 2], nats and tokens
    drawn = _drawn_ratios(surprise, resamples, seed) if len(surprise) else np.zeros(0)
    by_problem = _by_problem(tally.problems, n)
    results = {
        name: _means([values], bounds, resamples=resamples, confidence=confidence, seed=seed)
        for name, (values, bounds) in by_problem.items()
    }
    values = {
        "problems": len(tally.problems),
        "skipped": sorted(tally.skipped),
        "samples": n,
        **_named(results),
        "response_tokens": {
            "mean": float(lengths.mean()),
            "interval": results["response_tokens"][0][1],
            "median": float(np.median(lengths)),
            "p95": float(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
            "total": int(lengths.sum()),
        },
        "stop_rate": tally.stopped / len(lengths),
        # an unbiased estimate of the mean entropy of the distribution that was sampled from; of greedy samples it is
        # no entropy but their surprise at temperature 1
        "token_entropy": float(surprise[:, 0].sum() / surprise[:, 1].sum()) if len(drawn) else None,
        "token_entropy_interval": _of_draws(drawn, confidence),
        "ungraded": tally.ungraded,
        **({"unboxed_correct": tally.unboxed_correct} if tally.boxes else {}),
    }
    return Figures(values, {name: rows for name, (rows, _) in by_problem.items()}, drawn)


def overall(benchmarks: Mapping[str, Figures], *, resamples: int, confidence: float) -> Row:
    """Return the unweighted mean over benchmarks, as in the paper's tables; ``ungraded`` is a sum."""
    each = list(benchmarks.values())
    widths = {one.values["samples"] for one in each}
    assert len(widths) == 1, widths
    values = {
        name: _means(
            [one.by_problem[name] for one in each],
            _bounds(name, *widths),
            resamples=resamples,
            confidence=confidence,
            seed=0,
        )
        for name in each[0].by_problem
    }
    entropies = [one.values["token_entropy"] for one in each]
    measured = None not in entropies
    drawn = np.mean([one.drawn_entropy for one in each], axis=0) if measured else np.zeros(0)
    return {
        **_named(values),
        "response_tokens": dict(zip(("mean", "interval"), values["response_tokens"][0], strict=True)),
        "stop_rate": float(np.mean([one.values["stop_rate"] for one in each])),
        "token_entropy": float(np.mean(entropies)) if measured else None,
        "token_entropy_interval": _of_draws(drawn, confidence),
        "ungraded": sum(one.values["ungraded"] for one in each),
    }


def _by_problem(problems: Sequence[Row], n: int) -> dict[str, tuple[Floats, tuple[float, float] | None]]:
    """Return figures that are means over problems, with the least and largest possible value of each."""
    correct = [row["correct"] for row in problems]
    columns: dict[str, Any] = {
        "pass_at_k": pass_at_all(n, correct),
        "avg_at_k": [count / n for count in correct],
        "distinct_correct": [row["distinct_correct"] for row in problems],
        "self_bleu": [row["self_bleu"] for row in problems if row["self_bleu"] is not None],
        "distinct_4": [row["distinct_4"] for row in problems if row["distinct_4"] is not None],
        "truncation_rate": [row["truncated"] / n for row in problems],
        "response_tokens": [row["response_tokens"] for row in problems],
    }
    return {
        name: (np.asarray(values, np.float64).reshape(len(values), n if name == "pass_at_k" else 1), _bounds(name, n))
        for name, values in columns.items()
    }


def _bounds(name: str, n: int) -> tuple[float, float] | None:
    if name == "response_tokens":
        return None
    return (0.0, float(n)) if name == "distinct_correct" else (0.0, 1.0)


def _means(
    benchmarks: Sequence[Floats],
    bounds: tuple[float, float] | None,
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> list[tuple[float | None, list[float] | None]]:
    """Return each column's mean over benchmarks and its interval; None if a benchmark lacks the figure."""
    if not all(map(len, benchmarks)):
        return [(None, None)]
    values = np.concatenate(benchmarks)
    groups = [str(number) for number, rows in enumerate(benchmarks) for _ in rows]
    per_column = bootstrap(values, bounds=bounds, groups=groups, resamples=resamples, seed=seed, confidence=confidence)
    return [(float(mean), _pair(each)) for mean, each in zip(group_means(values, groups), per_column, strict=True)]


def _named(columns: Mapping[str, list[tuple[float | None, list[float] | None]]]) -> Row:
    """Return means and intervals under their names in the results."""
    avg, distinct, truncation = (columns[name][0] for name in ("avg_at_k", "distinct_correct", "truncation_rate"))
    bleu, grams = columns["self_bleu"][0], columns["distinct_4"][0]
    return {
        "avg_at_k": avg[0],
        "avg_interval": avg[1],
        "pass_at_k": {str(k): value for k, (value, _) in enumerate(columns["pass_at_k"], 1)},
        "pass_interval": {str(k): bounds for k, (_, bounds) in enumerate(columns["pass_at_k"], 1)},
        "distinct_correct": distinct[0],
        "distinct_correct_interval": distinct[1],
        "self_bleu": bleu[0],
        "self_bleu_interval": bleu[1],
        "distinct_4": grams[0],
        "distinct_4_interval": grams[1],
        "truncation_rate": truncation[0],
        "truncation_rate_interval": truncation[1],
    }


def _drawn_ratios(sums: Floats, resamples: int, seed: int) -> Floats:
    """Return first over second column of the sums [P, 2] of resampled problems: [B]."""
    drawn = resampled_means(sums, resamples=resamples, seed=seed)
    return np.asarray(drawn[:, 0] / drawn[:, 1])


def _of_draws(drawn: Floats, confidence: float) -> list[float] | None:
    """Return the interval of ``drawn``; None if the draws never differ."""
    return _pair(*intervals(drawn[:, None], confidence)) if len(drawn) and np.ptp(drawn) > 0.0 else None


def _pair(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def _without_stop(row: Row) -> list[int]:
    ids: list[int] = row["response_token_ids"]
    return ids[:-1] if row["finish_reason"] == "stop" else ids


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
