"""How far the gradient of stored targets is from the gradient of the whole distribution.

The forward KL's gradient with respect to an LM head's weight [V, D] is sum_t (m_t q_t - target_t) (x) h_t: q the
student, m_t the mass of the target (1 unless draws make it otherwise), h_t [D] the student's hidden state. Targets:

* ``exact``: p itself.
* ``cache``: what the cache returns: heads with true log-probs after a round trip through the codec, and draws of
  weight c. Five draw seeds.
* ``top12``, ``top32``, ``top50``: p renormalised on its k most probable ids, unquantised: what peers store.
* ``sampled50``: 50 draws with replacement from p, each of weight 1/50 (sampled KD). Five seeds.

The committed student: log q = STUDENT log p + 1.5 n over the explicit ranks, n standard normal (smooth beyond): 0.32
nats from its teacher in the mean, as one is before it is distilled. The nearer a student, the smaller the gradient
and the larger every angle. Its hidden state is
h_t = 0.5 + n in D = 16 dimensions. The id of rank r of token t is (r + b_t) mod V: a rotation is a permutation that
costs nothing. b_t has P(b) proportional to 1 / (b + 1), as ids of text have: so tokens share ids and their gradients
add up, as they do in a batch. Everything in float64. ``relative_error`` is |gradient - exact| / |exact|.

Letters: T tokens, V vocabulary, D hidden size, B tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.generator import EXPLICIT, SHIFT, STUDENT, VOCABULARY, Distributions, distributions, draw_ids, exponents
from eopd.storage import codec as quantise
from eopd.storage.encode import encode_rows
from eopd.storage.teacher_record import HeadRule, offsets_of

Float = NDArray[np.float64]
HIDDEN = 16
SEEDS = 5
TOP = (12, 32, 50)
SAMPLES = 50
STUDENT_NOISE = 1.5
BLOCK = 128
KL_TOKENS = 2_048


@dataclass(frozen=True)
class Comparison:
    degrees: dict[str, float]
    relative_error: dict[str, float]
    sampled50_unique_ids: float  # a token
    student_kl: float  # nats: teacher to student, over the first tokens


@dataclass
class _Sums:
    """Gradients so far, all [V, .]"""

    p: Float  # [V, D]
    q: Float  # [V, D (1 + SEEDS)]: with weight 1, and with each seed's target mass
    targets: dict[str, Float]  # name -> [V, D]


def compare(
    tokens: int = 16_384, head: HeadRule | None = None, seed: int = 0, vocabulary: int = VOCABULARY
) -> Comparison:
    """Each target's gradient beside the exact one; means over the seeds where there are any."""
    head = head or HeadRule()
    rng = np.random.default_rng(seed)
    names = [f"cache/{i}" for i in range(SEEDS)] + [f"sampled50/{i}" for i in range(SEEDS)] + [f"top{k}" for k in TOP]
    sums = _Sums(
        np.zeros((vocabulary, HIDDEN)),
        np.zeros((vocabulary, HIDDEN * (1 + SEEDS))),
        {name: np.zeros((vocabulary, HIDDEN)) for name in names},
    )
    unique = 0.0
    divergences: list[float] = []
    for low in range(0, tokens, BLOCK):
        unique += _block(rng, min(BLOCK, tokens - low), head, sums, divergences, vocabulary)
    exact = sums.q[:, :HIDDEN] - sums.p
    result: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for name, target in sums.targets.items():
        kind, _, which = name.partition("/")
        column = 1 + int(which) if kind == "cache" else 0
        gradient = sums.q[:, column * HIDDEN : (column + 1) * HIDDEN] - target
        result.setdefault(kind, []).append(_angle(exact, gradient))
        errors.setdefault(kind, []).append(float(np.linalg.norm(gradient - exact) / np.linalg.norm(exact)))
    return Comparison(_means(result), _means(errors), unique / tokens, float(np.mean(divergences)))


def _means(values: dict[str, list[float]]) -> dict[str, float]:
    return {name: float(np.mean(some)) for name, some in values.items()}


def _angle(a: Float, b: Float) -> float:
    cosine = float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    return float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))))


def _dense(teacher: Distributions, rng: np.random.Generator) -> tuple[Float, Float, Float]:
    """Teacher and student [B, V], most probable first (for the student nearly), and the teacher's entropy [B]."""
    logs = np.log(np.arange(EXPLICIT + 1, teacher.vocabulary + 1) + SHIFT)
    p = np.empty((len(teacher.exponent), teacher.vocabulary))
    p[:, :EXPLICIT] = teacher.logprob
    p[:, EXPLICIT:] = -teacher.exponent[:, None] * logs - teacher.log_z[:, None]
    q = STUDENT * p
    q[:, :EXPLICIT] += STUDENT_NOISE * rng.standard_normal((len(p), EXPLICIT))
    np.exp(q, out=q)
    q /= q.sum(axis=1, keepdims=True)
    logs = p.copy()
    np.exp(p, out=p)
    total = p.sum(axis=1)  # 1 but for the interpolation of the law's table
    entropy = np.log(total) - np.einsum("bv,bv->b", p, logs) / total
    p /= total[:, None]
    return p, q, entropy


def _block(
    rng: np.random.Generator, tokens: int, head: HeadRule, sums: _Sums, divergences: list[float], vocabulary: int
) -> float:
    """Add a block of tokens to the gradients; returns the unique ids of the 50 draws, summed over its tokens."""
    p, q, entropy = _dense(distributions(rng, exponents(rng, tokens, vocabulary), vocabulary), rng)
    if len(divergences) < KL_TOKENS:
        divergences += (np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / q), 0.0)).sum(axis=1).tolist()
    hidden = 0.5 + rng.standard_normal((tokens, HIDDEN))
    shift = draw_ids(rng, tokens, "zipf", vocabulary)

    def add(name: str, row: NDArray[np.int64], rank: NDArray[np.int64], weight: Float) -> None:
        np.add.at(sums.targets[name], (rank + shift[row]) % vocabulary, weight[:, None] * hidden[row])

    ends = np.cumsum(p, axis=1)
    masses = [np.ones(tokens)]
    sizes, stored = _stored_heads(p, entropy, head)
    offsets = offsets_of(sizes)
    head_row = np.repeat(np.arange(tokens), sizes)
    head_rank = np.arange(offsets[-1]) - offsets[head_row]
    head_mass = np.bincount(head_row, stored, minlength=tokens)
    start = np.take_along_axis(ends, sizes[:, None] - 1, axis=1)[:, 0]
    for i in range(SEEDS):
        add(f"cache/{i}", head_row, head_rank, stored)
        row, rank = _systematic(rng, ends, start, head.min_prob)
        add(f"cache/{i}", row, rank, np.full(len(row), head.min_prob))
        masses.append(head_mass + head.min_prob * np.bincount(row, minlength=tokens))
    unique = 0.0
    for i in range(SEEDS):
        points = rng.random((tokens, SAMPLES))
        rank = np.stack([np.searchsorted(ends[t], points[t] * ends[t, -1], "right") for t in range(tokens)])
        rank = np.minimum(rank, vocabulary - 1)
        unique += sum(len(np.unique(some)) for some in rank) / SEEDS
        add(
            f"sampled50/{i}", np.repeat(np.arange(tokens), SAMPLES), rank.reshape(-1), np.full(rank.size, 1.0 / SAMPLES)
        )
    for k in TOP:
        kept = p[:, :k] / p[:, :k].sum(axis=1, keepdims=True)
        row = np.repeat(np.arange(tokens), k)
        add(f"top{k}", row, np.tile(np.arange(k), tokens), kept.reshape(-1))

    for t in range(tokens):  # ranks to ids
        p[t], q[t] = np.roll(p[t], shift[t]), np.roll(q[t], shift[t])
    sums.p += p.T @ hidden
    sums.q += q.T @ np.concatenate([mass[:, None] * hidden for mass in masses], axis=1)
    return unique


def _stored_heads(p: Float, entropy: Float, head: HeadRule) -> tuple[NDArray[np.int64], Float]:
    """Head sizes [B] and probabilities [K*] as the cache returns them, from float32 log-probs through the codec."""
    logs = np.log(np.maximum(p[:, : head.k_max], 1e-300))
    sure = np.clip((p[:, : head.k_max] >= head.min_prob).sum(axis=1), 1, head.k_max)
    sizes = np.where(entropy > head.full_head_above, head.k_max, sure).astype(np.int64)
    inside = np.arange(head.k_max) < sizes[:, None]
    # the explicit ranks are sorted, and the first far one lies below them
    values = -np.sort(-logs, axis=1)[inside].astype(np.float32)
    tail = 1.0 - np.where(inside, p[:, : head.k_max], 0.0).sum(axis=1)
    offsets = offsets_of(sizes)
    codes, tail_codes = encode_rows(values, offsets, np.log(np.maximum(tail, 1e-20)).astype(np.float32))
    decoded, _ = quantise.decode_rows(codes, offsets, tail_codes)
    return sizes, np.exp(decoded.astype(np.float64))


def _systematic(
    rng: np.random.Generator, ends: Float, start: Float, weight: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token and rank of each draw beyond the heads, one uniform a token."""
    counts = np.floor((ends[:, -1] - start) / weight + 1.0 - (u := rng.random(len(ends)))).astype(np.int64)
    row = np.repeat(np.arange(len(ends)), counts)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    points = start[row] + (u[row] + nth) * weight
    split = np.split(points, np.cumsum(counts)[:-1])
    rank = np.concatenate([np.searchsorted(ends[t], some, "right") for t, some in enumerate(split)])
    return row, np.minimum(rank, ends.shape[1] - 1)
