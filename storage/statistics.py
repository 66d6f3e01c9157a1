"""Statistics of a cache, as evidence for choosing k and tau. For `eopd store stats`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
from numpy.typing import NDArray

from eopd.storage import packing
from eopd.storage.codec import Layout
from eopd.storage.encode import Fields
from eopd.storage.sources import filled_parts
from eopd.storage.symbols import raw_counts
from eopd.storage.teacher_cache import TeacherCache
from eopd.storage.teacher_record import TeacherRows

ENTROPY_EDGES = (0.0, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.2, 1.6, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 25.0)
KS = (1, 2, 4, 8, 12, 16, 24, 32, 50, 64, 100)
TAUS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0)
_BLOCK = 16_384


@dataclass(frozen=True)
class CacheStats:
    """Statistics of the parts that were read."""

    parts: int
    responses: int
    tokens: int
    bytes_per_token: float  # of the files, everything included
    bytes_by_field: dict[str, float]  # bytes a token, compressed field by field; adds up to a little less
    entropy_mean: float  # nats
    entropy_median: float
    entropy_counts: list[int]  # between ENTROPY_EDGES
    retained_mass: dict[int, float]  # of the k most probable entries, as far as stored: a lower bound
    retained_mass_gated: dict[int, float]  # the same where entropy > 0.8
    gate_fraction: dict[float, float]  # tokens with entropy > tau

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
        return "\n".join(lines)


def stats(cache: TeacherCache, parts: Iterable[int] | None = None) -> CacheStats:
    """Read ``parts`` (all committed ones) and count. Memory: one part at a time.

    Raises:
        MissingPart, DamagedPart; ValueError: nothing is committed.
    """
    wanted = list(filled_parts(cache.artifact) if parts is None else parts)
    if not wanted:
        raise ValueError(f"{cache.artifact} has no committed part to look at")
    entropies, masses, fields = [], [], dict[str, float]()
    stored = responses = 0
    for part in wanted:
        rows = cache.read_part(part)
        stored += cache.artifact.marker(part).bytes
        responses += rows.responses
        entropies.append(rows.entropy)
        masses.append(_mass_by_k(rows))
        for name, size in field_bytes(rows, cache.header(part).layout).items():
            fields[name] = fields.get(name, 0.0) + size
    entropy, mass = np.concatenate(entropies), np.concatenate(masses, axis=1)
    tokens = len(entropy)
    gated = entropy > 0.8
    k_max = cache.coverage.head.k_max
    shown = [k for k in KS if k <= k_max] or [1]
    return CacheStats(
        parts=len(wanted),
        responses=responses,
        tokens=tokens,
        bytes_per_token=stored / max(tokens, 1),
        bytes_by_field={name: size / max(tokens, 1) for name, size in fields.items()},
        entropy_mean=float(entropy.mean()) if tokens else 0.0,
        entropy_median=float(np.median(entropy)) if tokens else 0.0,
        entropy_counts=np.histogram(entropy, ENTROPY_EDGES)[0].tolist(),
        retained_mass={k: _mean(mass[KS.index(k)]) for k in shown},
        retained_mass_gated={k: _mean(mass[KS.index(k)][gated]) for k in shown},
        gate_fraction={tau: _mean(entropy > tau) for tau in TAUS},
    )


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
        raise ValueError(f"the histogram is an SVG image; {path} must end in .svg")
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
