"""Synthetic teacher scores with the statistics of a real teacher on a student's prefixes.

    python -m benchmarks.generator        # prints the statistics beside the ones it is calibrated to

What is imitated (Qwen3-8B on Qwen3-4B-Base rollouts, 422k tokens): entropy mean 1.263, median 0.034, 31.2 % above
0.8 nats; top-16 mass 0.909, 0.71 above 0.8 nats; the sampled token outside the teacher's top-16 in 12.4 %, 37.8 %
above 0.8 nats. How:

* A token's entropy H is drawn from the quantile function ``ENTROPY_QUANTILES`` (log-linear between its points).
* Its distribution is a power law over ranks, p_r proportional to (r + SHIFT)^-a exp(NOISE n_r), n_r standard normal
  for the first ``EXPLICIT`` ranks (re-sorted) and 0 beyond; a is tabulated so that the noiseless law has entropy H.
* The sampled rank follows p^STUDENT: a student is flatter than its teacher.
* Which ids: ``uniform``, every id equally likely in every context: the worst case for a codec, as no text is; or
  ``zipf``, P(id) proportional to 1 / (id + 1): 11.9 bits an id (running text has 9 to 11), small ids being frequent
  ones as in any BPE vocabulary. Ids of neighbouring tokens are independent in both.
* Response lengths are log-normal, median 600, clipped to 64 .. 4096. Stop log-probs are normal (-22, 5).

Letters: T tokens, R explicit ranks, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from eopd.storage.teacher_record import LOGPROB_FLOOR, HeadRule, TeacherRows

VOCABULARY = 151_936
STOP_IDS = (151_643, 151_645)
EXPLICIT = 192
SHIFT = 0.5
NOISE = 0.35
STUDENT = 0.86
# (fraction of tokens at most, entropy in nats)
ENTROPY_QUANTILES = (
    (0.0, 1e-6),
    (0.25, 1.2e-3),
    (0.5, 0.032),
    (0.62, 0.3),
    (0.688, 0.8),
    (0.77, 2.7),
    (0.9, 5.35),
    (1.0, 7.0),
)

Ids = Literal["uniform", "zipf"]
Float = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """The power law by exponent: entropy of the whole, and what lies beyond the explicit ranks."""

    exponent: Float  # ascending
    entropy: Float  # descending, nats
    far_sum: Float  # sum of (r + SHIFT)^-a beyond the explicit ranks
    far_moment: Float  # sum of (r + SHIFT)^-a * a * log(r + SHIFT) there


@lru_cache(maxsize=4)
def law(vocabulary: int = VOCABULARY) -> Law:
    exponent = np.geomspace(0.7, 24.0, 400)
    logs = np.log(np.arange(1, vocabulary + 1) + SHIFT)
    entropy, far_sum, far_moment = (np.zeros(len(exponent)) for _ in range(3))
    for i, a in enumerate(exponent):
        weight = np.exp(-a * (logs - logs[0]))
        p = weight / weight.sum()
        entropy[i] = np.log(weight.sum()) + a * (p * (logs - logs[0])).sum()
        far = np.exp(-a * logs[EXPLICIT:])
        far_sum[i], far_moment[i] = far.sum(), (far * a * logs[EXPLICIT:]).sum()
    return Law(exponent, entropy, far_sum, far_moment)


def exponents(rng: np.random.Generator, tokens: int, vocabulary: int = VOCABULARY) -> Float:
    """[T] exponents of the tokens' laws."""
    table = law(vocabulary)
    at, values = (np.asarray(column) for column in zip(*ENTROPY_QUANTILES, strict=True))
    entropy = np.exp(np.interp(rng.random(tokens), at, np.log(values)))
    return np.interp(np.log(entropy), np.log(table.entropy[::-1]), table.exponent[::-1])


@dataclass(frozen=True)
class Distributions:
    """Teacher distributions of T tokens: explicit ranks, and a smooth rest."""

    exponent: Float  # [T]
    logprob: Float  # [T, R] descending
    far_mass: Float  # [T]
    entropy: Float  # [T] nats
    log_z: Float  # [T] log-probs beyond the explicit ranks are -a log(r + SHIFT) - log_z
    vocabulary: int


def distributions(rng: np.random.Generator, exponent: Float, vocabulary: int = VOCABULARY) -> Distributions:
    table = law(vocabulary)
    logs = np.log(np.arange(1, EXPLICIT + 1) + SHIFT)
    logits = -exponent[:, None] * logs + NOISE * rng.standard_normal((len(exponent), EXPLICIT))
    logits = -np.sort(-logits, axis=1)
    far_sum = np.exp(np.interp(exponent, table.exponent, np.log(np.maximum(table.far_sum, 1e-300))))
    far_moment = np.exp(np.interp(exponent, table.exponent, np.log(np.maximum(table.far_moment, 1e-300))))
    top = logits[:, :1]
    log_z = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1) + far_sum * np.exp(-top[:, 0]))
    logprob = logits - log_z[:, None]
    far_mass = far_sum * np.exp(-log_z)
    # -sum p log p beyond: p = w / Z with w = (r + SHIFT)^-a, so -p log p = p (a log(r + SHIFT) + log Z)
    entropy = -(np.exp(logprob) * logprob).sum(axis=1) + far_moment * np.exp(-log_z) + far_mass * log_z
    return Distributions(exponent, logprob, far_mass, entropy, log_z, vocabulary)


def far_ranks(exponent: Float, quantile: Float, vocabulary: int) -> NDArray[np.int64]:
    """Ranks beyond the explicit ones at a quantile of their mass: the law's integral, inverted."""
    low, high = EXPLICIT + 0.5 + SHIFT, vocabulary + 0.5 + SHIFT
    s = 1.0 - exponent
    s = np.where(np.abs(s) < 1e-6, 1e-6, s)
    ratio = np.exp(s * np.log(high / low))
    value = low * np.exp(np.log1p(quantile * (ratio - 1.0)) / s)
    return np.clip(np.rint(value - SHIFT), EXPLICIT + 1, vocabulary).astype(np.int64) - 1


def draw_ids(rng: np.random.Generator, shape: Any, ids: Ids, vocabulary: int) -> NDArray[np.int64]:
    u = rng.random(shape)
    chosen = np.exp(u * np.log(vocabulary + 1.0)) - 1.0 if ids == "zipf" else u * vocabulary
    return np.minimum(chosen.astype(np.int64), vocabulary - 1)


def distinct_ids(rng: np.random.Generator, rows: int, width: int, ids: Ids, vocabulary: int) -> NDArray[np.int64]:
    """[rows, width] ids, distinct within a row."""
    chosen = draw_ids(rng, (rows, width), ids, vocabulary)
    todo = np.arange(rows)
    while len(todo):
        order = np.argsort(chosen[todo], axis=1, kind="stable")
        ordered = np.take_along_axis(chosen[todo], order, axis=1)
        again = np.zeros(ordered.shape, bool)
        np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        bad = again.any(axis=1)
        fresh = draw_ids(rng, again.shape, ids, vocabulary)
        chosen[todo] = np.where(again, fresh, chosen[todo])
        todo = todo[bad]
    return chosen


def lengths(rng: np.random.Generator, tokens: int) -> NDArray[np.int64]:
    """Response lengths that sum to ``tokens``: log-normal, median 600, 64 .. 4096 (the last may be shorter)."""
    lengths = np.clip(600.0 * np.exp(0.75 * rng.standard_normal(tokens // 64 + 1)), 64, 4096).astype(np.int64)
    ends = np.cumsum(lengths)
    count = int(np.searchsorted(ends, tokens)) + 1
    lengths = lengths[:count]
    lengths[-1] -= ends[count - 1] - tokens
    return lengths


def generate(
    tokens: int, head: HeadRule, seed: int = 0, ids: Ids = "uniform", vocabulary: int = VOCABULARY
) -> TeacherRows:
    """Teacher rows of ``tokens`` tokens under a head rule (draws: none or beyond_head)."""
    rng = np.random.default_rng(seed)
    pieces = [_block(rng, min(16_384, tokens - low), head, ids, vocabulary) for low in range(0, tokens, 16_384)]
    joined: dict[str, Any] = {
        name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0] if not name.endswith("_counts")
    }
    for name in ("head", "draw", "extra"):
        counts = np.concatenate([piece[f"{name}_counts"] for piece in pieces])
        joined[f"{name}_offsets"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths(rng, tokens))]).astype(np.int64)
    joined["stop_logprobs"][offsets[1:] - 1] = [-0.02, -21.0]
    return TeacherRows(
        response_offsets=offsets,
        stop_ids=np.asarray(STOP_IDS, np.int32),
        extra_ids=np.zeros(0, np.int32),
        extra_logprobs=np.zeros(0, np.float32),
        **joined,
    )


def _block(rng: np.random.Generator, tokens: int, head: HeadRule, ids: Ids, vocabulary: int) -> dict[str, NDArray[Any]]:
    assert head.k_max <= EXPLICIT
    assert head.draws != "full"
    probabilities = distributions(rng, exponents(rng, tokens, vocabulary), vocabulary)
    sure = np.clip((probabilities.logprob >= np.log(head.min_prob)).sum(axis=1), 1, head.k_max)
    size = np.where(probabilities.entropy > head.full_head_above, head.k_max, sure)
    inside = np.arange(head.k_max) < size[:, None]
    top_ids = distinct_ids(rng, tokens, head.k_max, ids, vocabulary)
    p = np.exp(probabilities.logprob)
    tail = np.where(np.arange(EXPLICIT) < size[:, None], 0.0, p).sum(axis=1) + probabilities.far_mass
    rank, logprob = _sampled(rng, probabilities)
    token = np.where(
        rank < head.k_max,
        top_ids[np.arange(tokens), np.minimum(rank, head.k_max - 1)],
        draw_ids(rng, tokens, ids, vocabulary),
    )
    draws, owner = _systematic(rng, probabilities, size, tail, head) if head.draws == "beyond_head" else (None, None)
    drawn = np.zeros(0, np.int32)
    counts = np.zeros(tokens, np.int64)
    if draws is not None and owner is not None:
        beyond = draw_ids(rng, len(draws), ids, vocabulary)
        kept = top_ids[owner, np.minimum(draws, head.k_max - 1)]
        drawn = np.where(draws < head.k_max, kept, beyond).astype(np.int32)
        counts = np.bincount(owner, minlength=tokens)
    stops = np.clip(-22.0 + 5.0 * rng.standard_normal((tokens, len(STOP_IDS))), LOGPROB_FLOOR, -1.0)
    return {
        "token_ids": token.astype(np.int32),
        "entropy": probabilities.entropy.astype(np.float32),
        "sampled_logprob": np.maximum(logprob, LOGPROB_FLOOR).astype(np.float32),
        "sampled_rank": rank.astype(np.int32),
        "stop_logprobs": stops.astype(np.float32),
        "head_counts": size,
        "head_ids": top_ids[inside].astype(np.int32),
        "head_logprobs": np.maximum(probabilities.logprob[:, : head.k_max][inside], LOGPROB_FLOOR).astype(np.float32),
        "tail_logmass": np.log(np.maximum(tail, np.exp(LOGPROB_FLOOR))).astype(np.float32),
        "draw_counts": counts,
        "draw_ids": drawn,
        "extra_counts": np.zeros(tokens, np.int64),
    }


def _sampled(rng: np.random.Generator, teacher: Distributions) -> tuple[NDArray[np.int64], Float]:
    """[T] rank of the student's token and its teacher log-prob."""
    table = law(teacher.vocabulary)
    flat = np.exp(STUDENT * teacher.logprob)
    a = np.maximum(STUDENT * teacher.exponent, table.exponent[0])
    beyond = np.exp(np.interp(a, table.exponent, np.log(np.maximum(table.far_sum, 1e-300))))
    beyond *= np.exp(-STUDENT * teacher.log_z)  # far weights are (r + SHIFT)^-(STUDENT a) / Z^STUDENT
    ends = np.cumsum(flat, axis=1)
    u = rng.random(len(flat)) * (ends[:, -1] + beyond)
    rank = (ends < u[:, None]).sum(axis=1)
    far = np.flatnonzero(rank == EXPLICIT)
    logprob = teacher.logprob[np.arange(len(rank)), np.minimum(rank, EXPLICIT - 1)]
    rank[far] = far_ranks(a[far], rng.random(len(far)), teacher.vocabulary)
    logprob[far] = -teacher.exponent[far] * np.log(rank[far] + 1 + SHIFT) - teacher.log_z[far]
    return rank, logprob


def _systematic(
    rng: np.random.Generator, teacher: Distributions, size: NDArray[np.int64], tail: Float, head: HeadRule
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ranks drawn beyond the head, systematically with one uniform a token, and the token of each."""
    u = rng.random(len(size))
    counts = np.floor(tail / head.min_prob + 1.0 - u).astype(np.int64)  # points u, u + 1, ... below tail / c
    owner = np.repeat(np.arange(len(size)), counts)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    p = np.where(np.arange(EXPLICIT) < size[:, None], 0.0, np.exp(teacher.logprob))
    ends = np.cumsum(p, axis=1)
    rank = np.zeros(len(owner), np.int64)
    at = (u[owner] + nth) * head.min_prob
    for low in range(0, len(owner), 16_384):
        some = slice(low, low + 16_384)
        rank[some] = (ends[owner[some]] <= at[some, None]).sum(axis=1)
    far = np.flatnonzero(rank == EXPLICIT)
    share = np.clip((at[far] - ends[owner[far], -1]) / teacher.far_mass[owner[far]], 0.0, 1.0)
    rank[far] = far_ranks(teacher.exponent[owner[far]], share, teacher.vocabulary)
    return rank, owner


def statistics(rows: TeacherRows) -> dict[str, float]:
    """The figures that the generator is calibrated to; rows of a fixed top-16."""
    high = rows.entropy > 0.8
    mass = np.add.reduceat(np.exp(rows.head_logprobs.astype(np.float64)), rows.head_offsets[:-1])
    outside = rows.sampled_rank >= 16
    return {
        "entropy_mean": float(rows.entropy.mean()),
        "entropy_median": float(np.median(rows.entropy)),
        "above_0.4": float((rows.entropy > 0.4).mean()),
        "above_0.8": float(high.mean()),
        "top16_mass": float(mass.mean()),
        "top16_mass_high": float(mass[high].mean()),
        "outside_top16": float(outside.mean()),
        "outside_top16_high": float(outside[high].mean()),
    }


TARGETS = {
    "entropy_mean": 1.263,
    "entropy_median": 0.034,
    "above_0.8": 0.312,
    "top16_mass": 0.909,
    "top16_mass_high": 0.71,
    "outside_top16": 0.124,
    "outside_top16_high": 0.378,
}


def main() -> None:
    fixed = HeadRule(k_max=16, full_head_above=-1.0, draws="none")
    print(json.dumps({"found": statistics(generate(100_000, fixed)), "targets": TARGETS}))


if __name__ == "__main__":
    main()
