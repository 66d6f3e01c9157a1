"""Teacher rows from dense float64 distributions: the oracle that stored rows are compared with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eopd.storage.artifacts import Artifact
from eopd.storage.identity import Identity
from eopd.storage.teacher_cache import PartHeader, write_part
from eopd.storage.teacher_record import LOGPROB_FLOOR, HeadRule, TeacherRows

STOPS = (3, 7)


@dataclass(frozen=True)
class Dense:
    """[T, V] float64 log-probs, and what was sampled."""

    logprobs: NDArray[np.float64]
    tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]


def dense(seed: int, lengths: list[int], vocabulary: int, sharpness: float = 4.0) -> Dense:
    rng = np.random.default_rng(seed)
    tokens = sum(lengths)
    logits = rng.standard_normal((tokens, vocabulary)) * rng.exponential(sharpness, (tokens, 1))
    logits -= logits.max(axis=1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    flat = np.exp(0.5 * logprobs)
    ends = np.cumsum(flat, axis=1)
    sampled = (ends < rng.random((tokens, 1)) * ends[:, -1:]).sum(axis=1)
    return Dense(logprobs, sampled, np.asarray(lengths, np.int64))


def rows_of(
    result: Dense, head: HeadRule, *, stops: tuple[int, ...] = STOPS, extra_k: int = 0, seed: int = 0
) -> TeacherRows:
    """What a score stage would give under ``head``, in float32."""
    rng = np.random.default_rng(seed)
    lp = result.logprobs
    tokens, vocabulary = lp.shape
    order = np.argsort(-lp, axis=1, kind="stable")
    ordered = np.take_along_axis(lp, order, axis=1)
    entropy = -(np.exp(lp) * lp).sum(axis=1)
    k = min(head.k_max, vocabulary)
    sure = np.clip((ordered >= np.log(head.min_prob)).sum(axis=1), 1, k)
    size = np.where(entropy > head.full_head_above, k, sure)
    inside = np.arange(vocabulary) < size[:, None]
    tail = np.where(inside, 0.0, np.exp(ordered)).sum(axis=1)
    draws, counts = _draws(rng, np.where(inside, 0.0, np.exp(ordered)), order, tail, head)
    extra = order[:, 1 : 1 + extra_k]
    offsets = np.arange(tokens + 1) * extra_k
    return TeacherRows(
        response_offsets=np.concatenate([[0], np.cumsum(result.lengths)]).astype(np.int64),
        token_ids=result.tokens.astype(np.int32),
        entropy=entropy.astype(np.float32),
        sampled_logprob=_floored(lp[np.arange(tokens), result.tokens]),
        sampled_rank=np.argmax(order == result.tokens[:, None], axis=1).astype(np.int32)
        if tokens
        else np.zeros(0, np.int32),
        stop_ids=np.asarray(stops, np.int32),
        stop_logprobs=_floored(lp[:, list(stops)]),
        head_offsets=np.concatenate([[0], np.cumsum(size)]).astype(np.int64),
        head_ids=order[inside].astype(np.int32),
        head_logprobs=_floored(ordered[inside]),
        tail_logmass=_floored(np.log(np.maximum(tail, 1e-300))),
        draw_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        draw_ids=draws.astype(np.int32),
        extra_offsets=offsets.astype(np.int64),
        extra_ids=extra.reshape(-1).astype(np.int32),
        extra_logprobs=_floored(np.take_along_axis(lp, extra, axis=1).reshape(-1)),
    )


def _floored(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.maximum(values, LOGPROB_FLOOR).astype(np.float32)


def _draws(
    rng: np.random.Generator,
    p: NDArray[np.float64],
    order: NDArray[np.int64],
    tail: NDArray[np.float64],
    head: HeadRule,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    tokens = len(p)
    if head.draws == "full":
        return rng.integers(0, p.shape[1], tokens * head.n_draws), np.full(tokens, head.n_draws)
    if head.draws == "none":
        return np.zeros(0, np.int64), np.zeros(tokens, np.int64)
    collected: list[NDArray[np.int64]] = []
    for row in range(tokens):
        points = np.arange(rng.random() * head.min_prob, tail[row], head.min_prob)
        collected.append(order[row, np.minimum(np.searchsorted(np.cumsum(p[row]), points, "right"), p.shape[1] - 1)])
    return np.concatenate([np.zeros(0, np.int64), *collected]), np.asarray([len(some) for some in collected], np.int64)


def header(head: HeadRule, vocabulary: int, *, stops: tuple[int, ...] = STOPS, extra_k: int = 0) -> PartHeader:
    return PartHeader(
        "teacher", "tokenizer", "chat", 1.0, head, vocabulary, "rollouts", stops, "none", "0", "float32", extra_k
    )


def scores(
    store: Path, parts: int = 2, head: HeadRule | None = None, vocabulary: int = 300, lengths: list[int] | None = None
) -> tuple[Artifact, list[TeacherRows]]:
    """A small complete artifact and the rows of its parts."""
    head = head or HeadRule()
    artifact = Artifact(store, Identity("scores", 1, parts, {"test": 1}, {}, {"head": asdict(head)}))
    written = []
    for part in range(parts):
        rows = rows_of(dense(part, lengths or [5, 40, 1, 17], vocabulary), head)
        with artifact.write_part(part, inputs={"rollouts": "rollouts"}) as folder:
            write_part(folder, rows, header(head, vocabulary))
        written.append(rows)
    return artifact, written


def other(store: Path, kind: str, inputs: dict[str, str], parts: int = 1, name: str = "x") -> Artifact:
    artifact = Artifact(store, Identity(kind, 1, parts, {"name": name}, inputs))
    for part in range(parts):
        with artifact.write_part(part) as folder:
            (folder / "data").write_text(name)
    return artifact


def capture(path: Path, shifted: bool) -> tuple[pa.Table, np.ndarray]:
    """A DistillKit-style capture at ``path``: the table, and dense log-probs [tokens, vocabulary] of what it holds."""
    exact = dense(5, [12, 7], 60)
    order = np.argsort(-exact.logprobs, axis=1)[:, :10]
    values = np.take_along_axis(exact.logprobs, order, axis=1)
    records, low = [], 0
    for length in exact.lengths:
        some = slice(low, low + length)
        ids = exact.tokens[some].tolist()
        pad = [0] * 10
        lists = (order[some][:, ::-1].tolist(), values[some][:, ::-1].tolist())  # in no order that we know of
        if shifted:
            ids, lists = [1, *ids], (lists[0] + [pad], lists[1] + [[-99.0] * 10])
        records.append({"input_ids": ids, "top_indices": lists[0], "top_values": lists[1]})
        low += length
    table = pa.Table.from_pylist(records)
    pq.write_table(table, path)
    return table, exact.logprobs
