"""The loss and gradient of every objective on the golden cache, for a student given by a formula.

Teacher rows come from the committed golden part (`tests/storage/golden/version1`). The student's logits are float64 and
deterministic, so the values depend on the objectives alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from eopd.stages.train.objectives.base import StepContext, TeacherBatch
from eopd.stages.train.objectives.registry import make_objective
from eopd.stages.train.objectives.settings import FAMILY, ObjectiveSettings
from eopd.stages.train.stops import StopHandling
from eopd.storage.teacher_cache import TeacherCache
from eopd.storage.teacher_record import TeacherRows
from tests.stages.sparse_student import student_at
from tests.storage.make_golden import HEAD, VOCABULARY, artifact

STOPS = StopHandling("class", student_stop_ids=(3,), teacher_stop_ids=(7,))
VARIANTS: dict[str, tuple[str, ...]] = {
    "support": ("renormalised", "true", "bucket", "sampled"),
    "rkl": ("sampled", "topk"),
    "advantage": ("old", "current"),
    "ratio": ("ppo", "is", "truncated", "none"),
    "outlier": ("fkl", "clip", "mask", "jsd"),
    "floor_form": ("mixture", "logit"),
    "baseline": ("bucket", "renormalised"),
    "stops": ("class", "remap"),
}
FULL_DRAWS = replace(HEAD, draws="full", n_draws=50)


def golden_cases() -> list[dict[str, Any]]:
    """Settings of every objective at its defaults and with each option changed alone; k fits the golden head."""
    cases = []
    for name, used in FAMILY.items():
        base: dict[str, Any] = {"name": name, **({"k": 8} if "k" in used else {})}
        cases.append(base)
        for field, values in VARIANTS.items():
            cases += [{**base, field: value} for value in values if field in used and value != used[field]]
        if "student_topk" in used:
            cases.append({**base, "student_topk": 2, **({"rkl": "topk"} if "rkl" in used else {})})
    return cases


def loss_and_gradient(case: dict[str, Any]) -> dict[str, float]:
    """Mean loss a token (nats) and the norm of its gradient with respect to the logits."""
    objective = make_objective(ObjectiveSettings.model_validate(case))
    rows, rule = TeacherCache(artifact(1)).read_part(0), HEAD
    if objective.plan.draws == "full":  # the golden part holds draws beyond the head: make up others
        rows, rule = with_full_draws(rows), FULL_DRAWS
    stops = StopHandling(objective.settings.stops, STOPS.student_stop_ids, STOPS.teacher_stop_ids)
    batch = TeacherBatch.build(rows, rule, stops, objective.plan, VOCABULARY)
    token = torch.arange(rows.tokens, dtype=torch.float64)
    logits = 3.0 * torch.sin(token[:, None] * 1.7 + torch.arange(VOCABULARY, dtype=torch.float64) * 0.9)
    logits.requires_grad_()
    student = student_at(logits, batch)
    mask = (token % 5 != 2).double()
    context = StepContext(
        mask=mask,
        normaliser=float(mask.sum()),
        q_old=(student.sampled + 0.3 * torch.sin(token)).detach(),
        student_entropy_round=1.0 + torch.sin(token),
        entropy_threshold=0.9,
        token_key=token.long() * 2**33,
        teacher_prefix=token % 7 == 1,
        seed=11,
        epoch=2,
    )
    loss = (objective.token_loss(student, batch, context).loss * mask).sum() / context.normaliser
    (gradient,) = torch.autograd.grad(loss, logits)
    return {"loss": loss.item(), "gradient_norm": gradient.norm().item()}


def with_full_draws(rows: TeacherRows) -> TeacherRows:
    """``rows`` with ids given by a formula as draws of the full distribution."""
    token, draw = np.meshgrid(np.arange(rows.tokens), np.arange(FULL_DRAWS.n_draws), indexing="ij")
    ids = (token * 13 + draw * draw * 7) % VOCABULARY
    offsets = np.arange(rows.tokens + 1) * FULL_DRAWS.n_draws
    return replace(rows, draw_offsets=offsets, draw_ids=ids.reshape(-1).astype(np.int32))


def case_name(case: dict[str, Any]) -> str:
    return " ".join(str(case["name"]) if field == "name" else f"{field}={value}" for field, value in case.items())


def golden_losses() -> dict[str, dict[str, float]]:
    return {case_name(case): loss_and_gradient(case) for case in golden_cases()}
