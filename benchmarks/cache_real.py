"""Bytes a token on real logits: the GSM8K pair's student samples, its teacher scores, through the ordinary stages.

    python -m benchmarks.cache --only real --models runs/gsm8k-pair

The pair is made where the folder has none (examples/gsm8k/pair.py: about 10 minutes on 2 cores). Its vocabulary is
small, so an id costs at most 11 bits. ``bytes_per_token_real_at_152k`` adds to every stored id what log2 of the
vocabularies differs by: what the same distributions cost when their ids are as many times harder to predict as there
are more of them.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generator import TARGETS, VOCABULARY
from eopd.pipeline.config import RunSettings, parse_settings
from eopd.pipeline.run import open_run
from eopd.pipeline.worker import execute
from eopd.storage.artifacts import Artifact
from eopd.storage.statistics import CacheStats, stats
from eopd.storage.teacher_cache import TeacherCache

K_MAX = (16, 32, 64)


def measure_real(root: Path, models: Path, data: Path, responses: int) -> dict[str, Any]:
    """Score ``responses`` samples of the student with heads of 16, 32 and 64; count what lies on the disk.

    Raises:
        ValueError: there are neither models nor the data to make them from.
    """
    made = _make_pair(models, data)
    found: dict[str, Any] = {"real_pair_made_s": made}
    by_k: dict[str, float] = {}
    for k_max in K_MAX:
        began = time.perf_counter()
        scores = _score(_settings(root, models, data, responses, k_max))
        cache = TeacherCache(scores)
        counted = stats(cache)
        by_k[str(k_max)] = round(_bytes(scores.folder) / counted.tokens, 3)
        found[f"real_seconds_k{k_max}"] = round(time.perf_counter() - began, 1)
        if k_max == K_MAX[0]:
            found |= _figures(cache, counted, by_k[str(k_max)])
    return {**found, "bytes_per_token_real_by_k_max": by_k}


def _make_pair(models: Path, data: Path) -> float:
    if all((models / name / "model.safetensors").exists() for name in ("teacher", "student")):
        return 0.0
    if not (data / "train.jsonl").exists():
        raise ValueError(
            f"there is no pair in {models} (--models) and no train.jsonl in {data} (--data) to train it on"
        )
    from eopd.examples.gsm8k import pair

    began = time.perf_counter()
    pair.main(["--data", str(data), "--out", str(models), "--only", "teacher", "--only", "student"])
    return round(time.perf_counter() - began, 1)


def _settings(root: Path, models: Path, data: Path, responses: int, k_max: int) -> RunSettings:
    """Held-out problems, one sample each, all in one part; heads as the benchmark's other figures have them."""
    raw = {
        "name": f"real{k_max}",
        "store": str(root / "real" / "store"),
        "runs": str(root / "real" / "runs"),
        "student": {"path": str(models / "student")},
        "teacher": {"path": str(models / "teacher")},
        "prompts": {
            "path": str(data / "test.jsonl"),
            "columns": {"id": "id", "prompt": "problem", "answer": "answer"},
            "template": "plain",
            "suffix": "\n",
        },
        "rollout": {"prompts_per_round": responses, "max_new_tokens": 256, "rows_per_part": responses},
        "score": {"head": {"k_max": k_max, "full_head_above": 0.4, "min_prob": 0.03}},
    }
    return parse_settings(raw, "benchmarks/cache_real.py")


def _score(settings: RunSettings) -> Artifact:
    run = open_run(settings)
    job = run.plan.job("score", 0)
    execute(run, run.plan.job("rollout", 0))
    execute(run, job)
    return run.artifact(job.output)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _figures(cache: TeacherCache, counted: CacheStats, size: float) -> dict[str, Any]:
    rows = cache.read_part(0)
    vocabulary = cache.header(0).vocab_size
    missed = rows.sampled_rank >= np.diff(rows.head_offsets)
    ids = (len(rows.head_ids) + len(rows.draw_ids) + int(missed.sum())) / rows.tokens
    wider = ids * (math.log2(VOCABULARY) - math.log2(vocabulary)) / 8
    gated = rows.entropy > 0.8
    outside = rows.sampled_rank >= 16
    found = {
        "entropy_mean": counted.entropy_mean,
        "entropy_median": counted.entropy_median,
        "above_0.8": counted.gate_fraction[0.8],
        "top16_mass": counted.retained_mass[16],
        "top16_mass_high": counted.retained_mass_gated[16],
        "outside_top16": float(outside.mean()),
        "outside_top16_high": float(outside[gated].mean()) if gated.any() else 0.0,
    }
    return {
        "bytes_per_token_real": size,
        "bytes_per_token_real_at_152k": round(size + wider, 3),
        "bytes_per_token_real_by_field": {name: round(value, 3) for name, value in counted.bytes_by_field.items()},
        "real_ids_per_token": round(ids, 3),
        "real_vocabulary": vocabulary,
        "real_tokens": counted.tokens,
        "real_statistics": {name: {"found": round(value, 4), "paper": TARGETS[name]} for name, value in found.items()},
    }
