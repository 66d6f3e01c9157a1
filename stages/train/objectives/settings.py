"""Settings of objectives: the loss and its constants. Imports no torch, so that a plan can be made without it.

Every objective of the family has its own defaults and uses only some of the fields (``FAMILY``). A field that the
chosen objective does not use is refused rather than ignored, and never enters an artifact key.
"""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from eopd.stages.settings import ENTRIES, FACTOR, NATS, Settings, setting
from eopd.storage.errors import InputError

Advantage = Literal["old", "current"]
Ratio = Literal["ppo", "is", "truncated", "none"]
SupportMode = Literal["renormalised", "true", "bucket", "sampled"]

_BOUNDS: dict[str, Any] = {"clip_eps": 0.2, "truncate_at": 2.0}
_POLICY: dict[str, Any] = {"advantage": "current", "ratio": "ppo", **_BOUNDS}
_REVERSE: dict[str, Any] = {"rkl": "sampled", "student_topk": 0, **_POLICY}
_FORWARD: dict[str, Any] = {"support": "bucket", "k": 16, "draws": "beyond_head", "n_draws": 50}
_STOPS: dict[str, Any] = {"stops": "class"}

FAMILY: dict[str, dict[str, Any]] = {
    "sft": {},
    "opd": {**_REVERSE, "k": 16, **_STOPS},
    # published with this advantage: not the default's to change
    "lightning_opd": {**_POLICY, "advantage": "current", "k": 16, **_STOPS},
    "fkl": {**_FORWARD, **_STOPS},
    "rkl_topk": {"k": 16, "student_topk": 0, **_STOPS},
    "jsd": {"k": 16, "beta": 0.5, **_STOPS},
    "eopd": {**_FORWARD, "support": "renormalised", **_REVERSE, "tau": 0.8, "alpha": 1.0, **_STOPS},
    "tropd": {"k": 64, "outlier": "fkl", "outlier_floor": -5.0, "prefix_beta": 0.001, **_STOPS},
    "reopold": {  # likewise
        **_POLICY,
        "advantage": "old",
        "k": 16,
        "floor_lambda": 0.2,
        "floor_form": "mixture",
        "entropy_quantile": 0.5,
        **_STOPS,
    },
    "vopd": {**_BOUNDS, "ratio": "none", "k": 16, "student_topk": 0, "baseline": "bucket", **_STOPS},
    "rs_kd": {"k": 16, "n_draws": 50, **_STOPS},
}
"""Fields used by each objective, with its own defaults."""

REFUSED = {
    "mc_opd": (
        "it needs many teacher-scored samples of the student at every position, which no stage makes; "
        "opd with rkl: topk (or rkl_topk with student_topk) is the low-variance reverse KL that a cache can serve"
    )
}
"""Objectives known by name and not offered, with the reason."""


class ObjectiveSettings(Settings):
    """One objective and its constants; entropies and log-probs in nats. A bare word is short for ``name``: ``jsd``."""

    name: str = setting(
        "eopd",
        "sft, opd, lightning_opd, fkl, rkl_topk, jsd, eopd, tropd, reopold, vopd, rs_kd; or path/to/file.py:name of a "
        "callable that takes these settings and returns an Objective.",
    )
    stops: Literal["class", "remap"] = setting(
        "class",
        "How differing stop tokens are treated: `class` merges all of them into one outcome, for teacher and student; "
        "`remap` (the paper's) swaps the first stop id of the teacher with the first of the student.",
    )
    tau: float = setting(
        0.8, "Gate of eopd: forward KL is added where the teacher's entropy exceeds it, nats.", ge=-1.0, le=NATS
    )
    alpha: float = setting(1.0, "Weight of eopd's gated forward KL.", ge=0, le=FACTOR)
    k: int = setting(
        16, "Head entries used, most probable first. `support: sampled` always uses all stored.", ge=1, le=ENTRIES
    )
    support: SupportMode = setting(
        "renormalised",
        "How forward KL treats the teacher's mass outside the head: `renormalised` (paper) and `true` leave it out, "
        "`bucket` makes it one outcome, `sampled` uses the stored draws and is unbiased.",
    )
    draws: Literal["beyond_head", "full"] = setting("beyond_head", "Draws that `support: sampled` reads.")
    n_draws: int = setting(
        50, "Draws a token that must be stored, where draws are `full`; all that are stored are used.", ge=1, le=ENTRIES
    )
    rkl: Literal["sampled", "topk"] = setting(
        "sampled",
        "Reverse KL on the sampled token as a policy gradient (paper), or `topk`: summed over the stored head and the "
        "rest as one bucket.",
    )
    student_topk: int = setting(
        0, "The student's own top ids at rollout time added to the head (0: none).", ge=0, le=ENTRIES
    )
    advantage: Advantage = setting(
        "current",
        "log p - log q with q at present (`current`, the one that bears long rounds), or at the round's start (`old`, "
        "EOPD's).",
    )
    ratio: Ratio = setting(
        "ppo", "q/q_old as factor: `ppo` clips it, `is` does not, `truncated` bounds it, `none` leaves it out."
    )
    clip_eps: float = setting(0.2, "Clip range of `ratio: ppo`.", gt=0, le=FACTOR)
    truncate_at: float = setting(2.0, "Bound of `ratio: truncated`.", gt=0, le=FACTOR)
    beta: float = setting(0.5, "Teacher's weight in the mixture of jsd, in (0, 1).", gt=0, lt=1)
    outlier: Literal["fkl", "clip", "mask", "jsd"] = setting(
        "fkl", "What tropd does on tokens outside its trust region: forward KL, floored advantage, nothing, JSD 0.5."
    )
    outlier_floor: float = setting(-5.0, "Floor of log p/q for `outlier: clip`, nats.", lt=0, ge=-NATS)
    prefix_beta: float = setting(
        0.001,
        "Weight of log(p/q) on tokens that the teacher wrote (rollout.source: prefix), whatever the objective.",
        ge=0,
        le=FACTOR,
    )
    floor_lambda: float = setting(
        0.2, "Mixture weight that sets reopold's floor of the advantage, in (0, 1).", gt=0, lt=1
    )
    floor_form: Literal["mixture", "logit"] = setting(
        "mixture", "reopold's floor: log(lambda)/(1-lambda), or log(lambda/(1-lambda)) of a second source."
    )
    entropy_quantile: float = setting(
        0.5, "reopold keeps tokens whose student entropy is above this quantile of the round.", ge=0, lt=1
    )
    baseline: Literal["bucket", "renormalised"] = setting(
        "bucket", "vopd's baseline: reverse KL over the support and the rest as one bucket, or over the support alone."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Anything an objective of your own needs.", json_schema_extra={"keyed": True}
    )

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"name": data}
        if not isinstance(data, dict):
            return data
        name = str(data.get("name", "eopd"))
        if ":" in name:
            return data
        check_name(name)
        used = FAMILY[name]
        unused = [
            field
            for field, value in data.items()
            if field in cls.model_fields
            and field not in ("name", "prefix_beta", *used)
            and value != cls.model_fields[field].get_default(call_default_factory=True)
        ]
        if unused:
            raise InputError(
                f"{name} does not use {', '.join(unused)}; its settings: {', '.join(used) or 'none'}",
                setting=f"train.objective.{unused[0]}",
                remedy=f"Remove them, or set all of the objective at once: --set 'train.objective={{name: {name}}}'",
            )
        return {**used, **data}

    @property
    def reads_teacher(self) -> bool:
        """False if the objective needs nothing of the teacher but the tokens."""
        return self.name != "sft"

    @property
    def weighs_samples(self) -> bool:
        """True if the loss of a token is an estimate that holds only where the student drew the token."""
        by_sample = self.name in ("opd", "eopd") and self.rkl == "sampled"
        return by_sample or self.name in ("lightning_opd", "tropd", "reopold", "vopd")

    @property
    def used(self) -> frozenset[str]:
        """Names of the fields that the objective reads."""
        return frozenset(FAMILY.get(self.name, type(self).model_fields)) - {"name"}

    def semantic(self) -> dict[str, Any]:
        """Return the name and the used fields; for a user's own objective also its file's content hash."""
        kept = {"name": self.name, **{k: v for k, v in super().semantic().items() if k in self.used}}
        if ":" in self.name:
            kept["source"] = own_file_hash(self.name)
        return kept


def check_name(name: str) -> None:
    """Raise ValueError for an unknown name, with the nearest objective or the reason why it is refused."""
    if name in REFUSED:
        raise InputError(f"{name!r} is refused: {REFUSED[name]}", setting="train.objective.name")
    if name not in FAMILY:
        near = difflib.get_close_matches(name, FAMILY, n=1, cutoff=0.0)
        raise InputError(
            f"{name!r} is unknown; nearest: {near[0]!r}; all: {', '.join(FAMILY)}, or FILE.py:NAME",
            setting="train.objective.name",
        )


def own_file_hash(name: str) -> str:
    """Return the SHA-256 of the file in ``path/to/file.py:name``; raises ValueError if it does not exist."""
    path = Path(name.rsplit(":", 1)[0])
    if not path.is_file():
        raise InputError(f"no such file: {path}", setting="train.objective.name", file=path)
    return hashlib.sha256(path.read_bytes()).hexdigest()
