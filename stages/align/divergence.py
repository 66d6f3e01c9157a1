"""Exact divergences, entropies and agreement of teacher and student on the same tokens, over the full vocabulary.

Nothing of size [T, V] is ever held: both heads are applied to a few rows at a time. Logits and log-probs are float32,
sums over the vocabulary are accumulated in float64.
Letters: T tokens, D hidden size (of each model its own), V vocabulary (of each model its own), C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eopd.stages.models.lm_head import LMHead

Floats = NDArray[np.float64]
CHUNK_VALUES = 2**24
"""Logits of one model in a chunk, about: 64 MiB, of which about six are alive at once."""
BLANK = -1e30
"""Logit of an outcome that was merged into another: its probability is 0, and 0 * log 0 stays 0."""


@dataclass(frozen=True)
class TokenFigures:
    """Per token [T]. Divergences and entropies in nats, the others are probabilities or 0/1."""

    fkl: Floats  # KL(teacher || student)
    rkl: Floats  # KL(student || teacher)
    teacher_entropy: Floats
    student_entropy: Floats
    agreement: Floats  # 1 where both models' most probable token is the same
    teacher_outside: Floats  # probability on ids that the student's vocabulary lacks
    student_outside: Floats  # the same of the student

    @property
    def tokens(self) -> int:
        return len(self.fkl)

    def part(self, start: int, stop: int) -> TokenFigures:
        return TokenFigures(**{item.name: getattr(self, item.name)[start:stop] for item in fields(self)})


def compare(
    teacher: tuple[Tensor, LMHead],
    student: tuple[Tensor, LMHead],
    *,
    temperature: float = 1.0,
    merged: Sequence[int] = (),
    chunk_rows: int | None = None,
) -> TokenFigures:
    """Compute figures of T tokens from both models' hidden states [T, D] and heads.

    Ids are shared, vocabularies need not be of equal size (padding differs). Entropies and the most probable token are
    over each model's own V rows. Divergences are between the two distributions given an id that both have: finite
    whatever the padding is worth, and the exact divergence where the sizes are equal or the padding has no mass
    (``teacher_outside`` and ``student_outside`` say how much it has).

    Args:
        temperature: both models' logits are divided by it.
        merged: ids that are one outcome in both distributions, such as the stop ids; fewer than two change nothing.
        chunk_rows: rows compared at a time (default: so that a chunk's logits take about 64 MiB).

    Raises:
        ValueError: the two do not hold as many tokens; logits that are not finite.
    """
    hidden = teacher[0], student[0]
    if len(hidden[0]) != len(hidden[1]):
        raise ValueError(
            f"the teacher's hidden states are of {len(hidden[0])} tokens, the student's of {len(hidden[1])}"
        )
    heads = teacher[1].float(), student[1].float()
    rows = chunk_rows or max(1, CHUNK_VALUES // max(head.vocab_size for head in heads))
    chunks: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(hidden[0]), rows):
            logits = [
                _merge(head.logits(states[start : start + rows].to(head.weight.device)) / temperature, merged)
                for states, head in zip(hidden, heads, strict=True)
            ]
            chunks.append(_chunk(logits[0], logits[1].to(logits[0].device)).cpu())
    values = torch.cat(chunks, dim=1).numpy() if chunks else np.zeros((len(fields(TokenFigures)), 0))
    return TokenFigures(*values)


def known_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Return the distinct ``ids`` that lie in the vocabulary, in order."""
    return sorted({number for number in ids if number < vocab_size})


def _merge(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Merge ``ids`` in ``logits`` [C, V] into one outcome at the first of them."""
    known = known_ids(ids, logits.shape[1])
    if len(known) < 2:
        return logits
    total = logits[:, known].logsumexp(1)
    logits[:, known] = BLANK
    logits[:, known[0]] = total
    return logits


def _chunk(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the fields of ``TokenFigures`` in order, [7, C] float64, from logits [C, V] of each model."""
    log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
    if not (log_p.isfinite().all() and log_q.isfinite().all()):
        who = "student" if log_p.isfinite().all() else "teacher"
        raise ValueError(f"the {who}'s logits are not finite: check its weights, or read it in a wider dtype")
    agreement = teacher.argmax(1) == student.argmax(1)
    entropies = [-(log.exp() * log).sum(1, dtype=torch.float64) for log in (log_p, log_q)]
    log_p, outside_p = _given_shared(log_p, student.shape[1])
    log_q, outside_q = _given_shared(log_q, teacher.shape[1])
    difference = log_p - log_q
    fkl = (log_p.exp() * difference).sum(1, dtype=torch.float64)
    rkl = -(log_q.exp() * difference).sum(1, dtype=torch.float64)
    return torch.stack([fkl, rkl, *entropies, agreement.double(), outside_p, outside_q])


def _given_shared(logprobs: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Return log-probs of the first ``shared`` ids, given that one of them occurs, and the mass [C] of all others."""
    if shared >= logprobs.shape[1]:
        return logprobs, torch.zeros(len(logprobs), dtype=torch.float64, device=logprobs.device)
    outside = logprobs[:, shared:].exp().sum(1, dtype=torch.float64)
    inside = logprobs[:, :shared]
    return inside - inside.logsumexp(1, keepdim=True), outside
