"""Statistics of a cache, as evidence for choosing k and tau. For `eopd store stats`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
from numpy.typing import NDArray

from eopd.storage.codec import Layout, raw_counts
from eopd.storage.errors import InputError, installing, is_installed
from eopd.storage.sources import filled_parts
from eopd.storage.teacher_cache import TeacherCache
from eopd.storage.teacher_record import HeadRule, TeacherRows

ENTROPY_EDGES = (0.0, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.2, 1.6, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 25.0)
KS = (1, 2, 4, 8, 12, 16, 24, 32, 50, 64, 100)
TAUS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0)
WEIGHTS = (0.05, 0.03, 0.02, 0.015, 0.01, 0.007, 0.005)  # candidates for head.min_prob
NEVER = 1000.0  # nats: no entropy exceeds it, so no token keeps a full head
GATED = 0.31
"""Share of tokens that tau 0.8 gates with a Qwen3-8B as the teacher (docs/format.md), for which it was chosen."""
_BLOCK = 16_384


@dataclass(frozen=True)
class Advice:
    """Settings for a teacher with the entropies that were counted."""

    tau: float  # nats; train.objective.tau that gates ``GATED`` of the tokens
    min_prob: float | None  # with full_head_above NEVER: the smallest that takes no more bytes; None: not known
    bytes_per_token: float | None  # about, with that rule
    bytes_per_token_at_tau: float | None  # about, with the rule that was used and full_head_above = tau


@dataclass(frozen=True)
class CacheStats:
    """Statistics of the parts that were read."""

    parts: int
    responses: int
    tokens: int
    bytes_per_token: float  # of the files, everything included
    bytes_by_field: dict[
        str, float
    ]  # bytes a token, compressed field by field; adds up to a little less; empty: no numba
    entropy_mean: float  # nats
    entropy_median: float
    entropy_counts: list[int]  # between ENTROPY_EDGES
    retained_mass: dict[int, float]  # of the k most probable entries, as far as stored: a lower bound
    retained_mass_gated: dict[int, float]  # the same where entropy > 0.8
    gate_fraction: dict[float, float]  # tokens with entropy > tau
    advice: Advice

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "entropy_edges": list(ENTROPY_EDGES)}

    def text(self, width: int = 50) -> str:
        """Format tables and a histogram for a terminal."""
        lines = [
            f"{self.tokens:,} tokens in {self.responses:,} responses of {self.parts} parts; "
            f"{self.bytes_per_token:.2f} bytes a token",
            "",
            "bytes a token by field",
            *(f"  {name:<16}{value:8.3f}" for name, value in sorted(self.bytes_by_field.items(), key=lambda x: -x[1])),
            *([] if self.bytes_by_field else [f"  not counted: needs numba. To add it, {installing('write')}"]),
            "",
            f"teacher entropy, nats (mean {self.entropy_mean:.3f}, median {self.entropy_median:.3f})",
        ]
        most = max(self.entropy_counts, default=1) or 1
        last = max((i for i, count in enumerate(self.entropy_counts) if count), default=0)
        bins = list(zip(ENTROPY_EDGES[:-1], ENTROPY_EDGES[1:], self.entropy_counts, strict=True))
        for low, high, count in bins[: last + 1]:
            share = count / max(self.tokens, 1)
            lines.append(f"  {low:5.2f} - {high:5.2f} {share:7.2%} {'#' * round(width * count / most)}")
        lines += ["", "k    mass kept    where entropy > 0.8   (of what is stored: at least)"]
        for k, mass in self.retained_mass.items():
            lines.append(f"  {k:<4} {mass:.4f}      {self.retained_mass_gated[k]:.4f}")
        lines += ["", "tau  tokens gated"]
        lines += [f"  {tau:<4} {share:.2%}" for tau, share in self.gate_fraction.items()]
        return "\n".join([*lines, "", *self._advice()])

    def _advice(self) -> list[str]:
        advice = self.advice
        lines = [
            "advice",
            f"  train.objective.tau: {advice.tau:.2g} gates {GATED:.0%} of these tokens, as 0.8 does with a Qwen3-8B",
        ]
        if advice.min_prob is not None:
            lines += [
                f"  score.head: {{full_head_above: {NEVER:g}, min_prob: {advice.min_prob:g}}}, if the objective reads",
                f"    head and draws (fkl): the best gradient, at about {advice.bytes_per_token:.1f} bytes a token",
            ]
        if advice.bytes_per_token_at_tau is not None:
            lines += [
                f"  score.head.full_head_above: {advice.tau:.2g}, if it reads full heads where entropy > tau (eopd):",
                f"    about {advice.bytes_per_token_at_tau:.1f} bytes a token",
            ]
        return lines


def stats(cache: TeacherCache, parts: Iterable[int] | None = None) -> CacheStats:
    """Read ``parts`` (all committed ones) and count. Memory: one part at a time.

    Raises:
        MissingPart, DamagedPart; ValueError: nothing is committed.
    """
    wanted = list(filled_parts(cache.artifact) if parts is None else parts)
    if not wanted:
        raise InputError(f"{cache.artifact} has no committed part to look at", artifact=str(cache.artifact))
    entropies, masses, likely, fields = [], [], [], dict[str, float]()
    can_encode = is_installed("numba")
    stored = responses = 0
    for part in wanted:
        rows = cache.read_part(part)
        stored += cache.artifact.marker(part).bytes
        responses += rows.responses
        entropies.append(rows.entropy)
        masses.append(_mass_by_k(rows))
        likely.append(_Likely.of(rows))
        for name, size in field_bytes(rows, cache.header(part).layout).items() if can_encode else ():
            fields[name] = fields.get(name, 0.0) + size
    entropy, mass = np.concatenate(entropies), np.concatenate(masses, axis=1)
    tokens = len(entropy)
    gated = entropy > 0.8
    k_max = cache.coverage.head.k_max
    shown = [k for k in KS if k <= k_max] or [1]
    by_field = {name: size / max(tokens, 1) for name, size in fields.items()}
    bytes_per_token = stored / max(tokens, 1)
    return CacheStats(
        parts=len(wanted),
        responses=responses,
        tokens=tokens,
        bytes_per_token=bytes_per_token,
        bytes_by_field=by_field,
        entropy_mean=float(entropy.mean()) if tokens else 0.0,
        entropy_median=float(np.median(entropy)) if tokens else 0.0,
        entropy_counts=np.histogram(entropy, ENTROPY_EDGES)[0].tolist(),
        retained_mass={k: _mean(mass[KS.index(k)]) for k in shown},
        retained_mass_gated={k: _mean(mass[KS.index(k)][gated]) for k in shown},
        gate_fraction={tau: _mean(entropy > tau) for tau in TAUS},
        advice=_advise(entropy, _Likely.join(likely), cache.coverage.head, bytes_per_token, by_field),
    )


@dataclass(frozen=True)
class _Likely:
    """Entries of each token that are at least as probable as each of ``WEIGHTS`` [W, T], as far as stored."""

    count: NDArray[np.float32]
    mass: NDArray[np.float32]
    heads: NDArray[np.int64]  # [T] entries that are stored
    draws: NDArray[np.int64]  # [T]

    @classmethod
    def of(cls, rows: TeacherRows) -> _Likely:
        heads, draws = np.diff(rows.head_offsets), np.diff(rows.draw_offsets)
        if not rows.tokens:
            return cls(np.zeros((len(WEIGHTS), 0), np.float32), np.zeros((len(WEIGHTS), 0), np.float32), heads, draws)
        p = np.exp(rows.head_logprobs.astype(np.float64))
        kept = [p >= weight for weight in WEIGHTS]
        starts = rows.head_offsets[:-1]
        count = np.asarray([np.add.reduceat(one.astype(np.float32), starts) for one in kept], np.float32)
        mass = np.asarray([np.add.reduceat(np.where(one, p, 0.0), starts) for one in kept], np.float32)
        return cls(count, mass, heads, draws)

    @classmethod
    def join(cls, parts: list[_Likely]) -> _Likely:
        return cls(
            np.concatenate([part.count for part in parts], axis=1),
            np.concatenate([part.mass for part in parts], axis=1),
            np.concatenate([part.heads for part in parts]),
            np.concatenate([part.draws for part in parts]),
        )


def _advise(
    entropy: NDArray[np.float32], likely: _Likely, rule: HeadRule, now: float, by_field: dict[str, float]
) -> Advice:
    """Estimate other rules' bytes from the entries that they would store.

    Draws make the gradient exact in expectation, and their weight is all that its noise depends on. So a smaller
    weight is worth its bytes, and entries below it are not (``python -m benchmarks.cache --only real``).
    """
    tau = float(np.quantile(entropy, 1.0 - GATED)) if len(entropy) else 0.8
    heads, draws = _mean(likely.heads), _mean(likely.draws)
    if rule.draws != "beyond_head" or rule.full_head_above < 0 or not heads or not draws or not by_field:
        return Advice(tau, None, None, None)
    each_head = (by_field["head_ids"] + by_field["head_logprobs"]) / heads
    each_draw = by_field["draw_ids"] / draws

    def size(weight: float, count: NDArray[Any], mass: NDArray[Any]) -> float:
        drawn = np.maximum(1.0 - mass, 0.0) / weight
        return now + each_head * (_mean(count) - heads) + each_draw * (_mean(drawn) - draws)

    sizes = {weight: size(weight, likely.count[i], likely.mass[i]) for i, weight in enumerate(WEIGHTS)}
    fitting = [weight for weight in WEIGHTS if sizes[weight] <= now] or [rule.min_prob]
    best = min(fitting)
    at_tau = None
    if rule.min_prob in WEIGHTS:
        i = WEIGHTS.index(rule.min_prob)
        full = entropy > max(tau, rule.full_head_above)
        dropped = np.where(full, 0.0, likely.heads - likely.count[i])
        freed = np.where(full, 0.0, np.maximum(1.0 - likely.mass[i], 0.0) / rule.min_prob - likely.draws)
        at_tau = now - each_head * _mean(dropped) + each_draw * _mean(freed)
    return Advice(tau, best, sizes.get(best, now), at_tau)


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _mass_by_k(rows: TeacherRows) -> NDArray[np.float32]:
    """Return the mass of each token's first k entries: [len(KS), T]."""
    if not rows.tokens:
        return np.zeros((len(KS), 0), np.float32)
    p = np.exp(rows.head_logprobs.astype(np.float64))
    sizes = np.diff(rows.head_offsets)
    place = np.arange(len(p)) - np.repeat(rows.head_offsets[:-1], sizes)
    masses = [np.add.reduceat(np.where(place < k, p, 0.0), rows.head_offsets[:-1]) for k in KS]
    return np.asarray(masses, np.float32)


def field_bytes(rows: TeacherRows, layout: Layout) -> dict[str, float]:
    """Return bytes of each field compressed separately, much as a part compresses it."""
    from eopd.storage import encode as packing
    from eopd.storage.encode import Fields  # needs numba

    out = {}
    codec = numcodecs.Blosc("zstd", 5, numcodecs.Blosc.NOSHUFFLE, blocksize=_BLOCK)
    for stream in Fields.of(rows, layout).streams:
        symbol = packing.symbols_of(stream.values, stream.extra)
        bits = raw_counts(symbol, stream.extra).sum()
        out[stream.name] = float(bits) / 8 + (len(codec.encode(symbol)) if len(symbol) else 0)
    return out


def plot(figures: CacheStats, path: Path) -> None:
    """Write the entropy histogram as an SVG image: share of tokens between ``ENTROPY_EDGES``.

    Raises:
        ValueError: ``path`` does not end in .svg.
    """
    if path.suffix != ".svg":
        raise InputError(f"the histogram is an SVG image; {path} must end in .svg", file=path)
    shares = np.asarray(figures.entropy_counts) / max(figures.tokens, 1)
    width, height, step, bottom = 40 + 40 * len(shares), 300, 40, 250
    drawn = []
    for i, share in enumerate(shares):
        tall = 220 * share / max(float(shares.max()), 1e-9)
        x = 30 + step * i
        drawn.append(f'<rect x="{x}" y="{bottom - tall:.1f}" width="36" height="{tall:.1f}" fill="#4878a8"/>')
        drawn.append(f'<text x="{x + 18}" y="{bottom - tall - 4:.1f}">{100 * share:.1f}</text>')
    for i, edge in enumerate(ENTROPY_EDGES):
        drawn.append(f'<text x="{28 + step * i}" y="{bottom + 14}">{edge:g}</text>')
    caption = f"teacher entropy (nats); % of {figures.tokens:,} tokens"
    drawn.append(f'<text x="{width / 2:.0f}" y="{bottom + 36}" font-size="13">{caption}</text>')
    style = 'font-family="sans-serif" font-size="10" text-anchor="middle"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {style}>'
    path.write_text("\n".join([head, *drawn, "</svg>"]) + "\n", encoding="utf-8")
