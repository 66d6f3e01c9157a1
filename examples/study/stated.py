"""What the experiments leave unsaid, said: the values that the study was made with.

A run's config states every keyed setting, so that another default of a stage or objective is another default for
everybody else and changes nothing here. A result's key is of what the experiments say (``design.Task.stated``): who
changes a value of this file makes other runs under the same keys. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BOUNDS = {"clip_eps": 0.2, "truncate_at": 2.0}
_POLICY = {"advantage": "old", "ratio": "ppo", **_BOUNDS}
_REVERSE = {"rkl": "sampled", "student_topk": 0, **_POLICY}
_FORWARD = {"k": 16, "draws": "beyond_head", "n_draws": 50}
_EOPD = {**_FORWARD, "support": "renormalised", **_REVERSE, "tau": 0.8, "alpha": 1.0, "stops": "class"}

OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "opd": {**_REVERSE, "k": 16, "stops": "class"},
    "lightning_opd": {**_POLICY, "advantage": "current", "k": 16, "stops": "class"},
    "fkl": {**_FORWARD, "support": "bucket", "stops": "class"},
    "jsd": {"k": 16, "beta": 0.5, "stops": "class"},
    "eopd": _EOPD,
    "tropd": {"k": 64, "outlier": "fkl", "outlier_floor": -5.0, "prefix_beta": 0.001, "stops": "class"},
    "gates.py": {**_EOPD, "options": {}},
}
"""By the objective's name; those of ``gates.py`` read what EOPD reads."""

_SOURCE = {"split": None, "limit": None}
_PROMPT = {"system": None, "template": "plain", "template_arguments": {}}
_MODEL = {"dtype": "auto", "trust_remote_code": False}
_COLUMNS = {"id": "id", "prompt": "problem", "answer": "answer", "teacher_prompt": None}

RUN: Mapping[str, Any] = {
    "refresh": 1,
    "lag": 0,
    "student": _MODEL,
    "teacher": {**_MODEL, "student": None, "renewed": None, "capture": None},
    "judge": {"text": "response", "seconds_per_answer": 10.0},
    "prompts": {**_SOURCE, **_PROMPT, "columns": _COLUMNS, "max_prompt_tokens": 1024, "too_long": "skip"},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    "score": {
        "teacher_prompt": {"kind": "same", "template": "chat", "arguments": {}, "system": None, "suffix": ""},
        "temperature": None,
        "dtype": "auto",
        "max_tokens": None,
        "too_long": "refuse",
        "head": {
            "k_max": 16,
            "min_prob": 0.03,
            "full_head_above": 0.4,
            "draws": "beyond_head",
            "n_draws": 0,
            "seed": 0,
        },
    },
    "train": {
        "epochs": 1,
        "lora": None,
        "ema": None,
        "staleness": None,
        "param_dtype": "float32",
        "autocast": "no",
        "optimizer": {
            "final": 0.0,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "carry_over": True,
        },
    },
    "evaluate": {
        **_PROMPT,
        "top_p": 1.0,
        "max_prompt_tokens": 2048,
        "too_long": "refuse",
        "confidence": 0.95,
        "resamples": 2000,
        "seconds_per_answer": 10.0,
    },
}
BENCHMARK: Mapping[str, Any] = {**_SOURCE, "columns": _COLUMNS}


def objective(said: Mapping[str, Any]) -> dict[str, Any]:
    """An objective with all of its constants."""
    return {**OBJECTIVES[str(said["name"]).split(":")[0]], **said}
