"""EOPD with other gates, as objectives of one's own: what of the gain is the entropy's, and what is any gate's?

`random_gate` opens for as many tokens of every batch as entropy above tau would, drawn by a hash of the token.
`proxy_gate` looks at the entropy of the teacher's ``options.proxy_k`` most probable tokens, renormalised: what a
system has that stores log-probs of a few tokens and no entropy. The paper's proxy is the top 16 of 151,669 tokens,
which hold 0.91 of the mass; here (64 tokens) ``proxy_k`` 4 is the comparable choice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eopd.stages.train.objectives.base import Objective, SparseStudent, StepContext, TeacherBatch, TokenLoss
from eopd.stages.train.objectives.eopd import (
    forward_needs,
    forward_plan,
    on_policy_term,
    reverse_needs,
    round_start_fields,
)
from eopd.stages.train.objectives.layout import LOG_ZERO
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.objectives.terms import above, forward_kl
from eopd.stages.train.objectives.tropd import hashed_uniform
from eopd.storage.coverage import EntropyNeed, StopsNeed

Gate = Callable[[TeacherBatch, StepContext], Tensor]


def random_gate(settings: ObjectiveSettings) -> Objective:
    def gate(teacher: TeacherBatch, context: StepContext) -> Tensor:
        share = above(teacher.entropy, settings.tau).mean()
        key = context.require("token_key", settings.name)
        return (hashed_uniform(key, context.seed, context.epoch) < share).to(teacher.entropy.dtype)

    return _with_gate(settings, gate, frozenset({"token_key"}))


def proxy_gate(settings: ObjectiveSettings) -> Objective:
    def gate(teacher: TeacherBatch, context: StepContext) -> Tensor:
        return above(truncated_entropy(teacher, int(settings.options["proxy_k"])), settings.tau)

    return _with_gate(settings, gate, frozenset())


def truncated_entropy(teacher: TeacherBatch, k: int) -> Tensor:
    """Entropy [T] of the ``k`` most probable outcomes of the head, renormalised; nats."""
    known = torch.where(teacher.in_head, teacher.logprob, LOG_ZERO)
    top = known.topk(min(k, known.shape[1]), dim=1).values.log_softmax(dim=1)
    return -(top.exp() * top).sum(dim=1)


def _with_gate(settings: ObjectiveSettings, gate_of: Gate, per_round: frozenset[str]) -> Objective:
    """EOPD's loss with ``gate_of(teacher, context)`` in the place of its gate; full heads are needed everywhere."""

    def token_loss(student: SparseStudent, teacher: TeacherBatch, context: StepContext) -> TokenLoss:
        reverse, parts = on_policy_term(settings, student, teacher, context)
        gate = gate_of(teacher, context)
        forward = gate * forward_kl(student, teacher, settings.support)
        return TokenLoss(reverse + settings.alpha * forward, {**parts, "loss_fkl": forward, "gate": gate})

    needs = (EntropyNeed(), *forward_needs(settings), *reverse_needs(settings), StopsNeed())
    return Objective(
        settings,
        tuple(dict.fromkeys(needs)),
        forward_plan(settings),
        token_loss,
        round_start_fields(settings) | per_round,
    )
