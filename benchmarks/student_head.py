"""The student's sparse head against a dense one and against cross-entropy: correctness, memory, time.

Both sides do forward and backward of head and loss. ``dense`` is the leanest full-logits forward KL: logits, one
log-softmax, a gather at the teacher's head. ``sft`` is cross-entropy through the sparse head itself. Times are medians
over interleaved repeats, wall and processor time. Memory is the peak of a process's resident set above what it was
before the step, less the gradients that the step leaves behind.

Letters: T tokens, V vocabulary, D hidden size, K* ids evaluated of a token.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.generator import STOP_IDS, generate
from eopd.stages.models.lm_head import LMHead
from eopd.stages.train.objectives.base import StepContext, TeacherBatch
from eopd.stages.train.objectives.registry import make_objective
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.stops import StopHandling
from eopd.stages.train.student import sparse_head_loss
from eopd.storage.teacher_record import HeadRule, TeacherRows

OBJECTIVES = {
    "eopd": ObjectiveSettings(name="eopd", support="sampled"),  # with draws and stops: K* about 12
    "fkl": ObjectiveSettings(name="fkl", support="bucket"),
    "sft": ObjectiveSettings(name="sft"),
}
SIDES = (*OBJECTIVES, "dense")


@dataclass(frozen=True)
class Size:
    tokens: int = 2048
    vocab: int = 151_936
    dim: int = 1024
    repeats: int = 5


@dataclass
class Setup:
    hidden: Tensor
    weight: Tensor
    rows: TeacherRows
    rule: HeadRule
    context: StepContext

    @property
    def tokens(self) -> int:
        return len(self.hidden)


def setup(size: Size) -> Setup:
    made = torch.Generator().manual_seed(0)
    hidden = torch.randn(size.tokens, size.dim, generator=made)
    weight = torch.randn(size.vocab, size.dim, generator=made).mul_(2.0 / size.dim**0.5)
    rule = HeadRule()
    rows = generate(size.tokens, rule, vocabulary=size.vocab)
    q_old = torch.full((size.tokens,), -float(np.log(size.vocab)), dtype=torch.float64)
    context = StepContext(mask=torch.ones(size.tokens), normaliser=float(size.tokens), q_old=q_old)
    return Setup(hidden.requires_grad_(), weight.requires_grad_(), rows, rule, context)


def sparse_side(given: Setup, name: str) -> tuple[Callable[[], None], float]:
    """A step of an objective through the sparse head, and K*."""
    objective = make_objective(OBJECTIVES[name])
    stops = StopHandling("class", STOP_IDS[:1], STOP_IDS[::-1])
    vocab = len(given.weight)
    batch = TeacherBatch.build(given.rows, given.rule, stops, objective.plan, vocab)

    def step() -> None:
        head = LMHead(given.weight, None, 1.0, None, vocab)
        loss, _ = sparse_head_loss(given.hidden, head, batch, objective, given.context)
        torch.autograd.backward(loss)

    return step, (len(batch.support_ids) + len(batch.stop_columns) * given.tokens) / given.tokens


def dense_side(given: Setup) -> Callable[[], None]:
    rows = given.rows
    token = torch.from_numpy(np.repeat(np.arange(given.tokens), np.diff(rows.head_offsets)))
    ids, p = torch.from_numpy(rows.head_ids).long(), torch.from_numpy(rows.head_logprobs).exp()

    def step() -> None:
        q = torch.log_softmax(given.hidden @ given.weight.T, dim=-1)
        torch.autograd.backward(-(p * q[token, ids]).sum() / given.tokens)

    return step


def side(given: Setup, name: str) -> Callable[[], None]:
    return dense_side(given) if name == "dense" else sparse_side(given, name)[0]


def times(size: Size) -> dict[str, Any]:
    """Medians in seconds, and their ratios."""
    given = setup(size)
    steps = {name: side(given, name) for name in SIDES}
    wall: dict[str, list[float]] = {name: [] for name in SIDES}
    busy: dict[str, list[float]] = {name: [] for name in SIDES}
    for repeat in range(size.repeats + 1):
        for name, step in steps.items():
            given.hidden.grad = given.weight.grad = None
            began, began_busy = time.perf_counter(), time.process_time()
            step()
            if repeat:  # the first is warm-up
                wall[name].append(time.perf_counter() - began)
                busy[name].append(time.process_time() - began_busy)
    middle = {name: statistics.median(values) for name, values in wall.items()}
    worked = {name: statistics.median(values) for name, values in busy.items()}
    return {
        "time_ratio_vs_dense": round(middle["fkl"] / middle["dense"], 3),
        "time_ratio_vs_sft": round(middle["eopd"] / middle["sft"], 3),
        "cpu_time_ratio_vs_dense": round(worked["fkl"] / worked["dense"], 3),
        "cpu_time_ratio_vs_sft": round(worked["eopd"] / worked["sft"], 3),
        "eopd_time_ratio_vs_dense": round(middle["eopd"] / middle["dense"], 3),
        "seconds": {name: [round(value, 2) for value in values] for name, values in wall.items()},
        "support_per_token": round(sparse_side(given, "eopd")[1], 1),
    }


def peak_bytes(size: Size, name: str) -> int:
    """Peak beyond inputs, parameters and their gradients, in this process (Linux)."""
    given = setup(size)
    step = side(given, name)
    torch.mm(torch.ones(4, 8), torch.ones(8, 64))  # libraries allocate what they keep on their first product
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak to the present
    step()
    grads = sum(g.numel() * g.element_size() for g in (given.hidden.grad, given.weight.grad) if g is not None)
    return _resident("VmHWM") - before - grads


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def memory(size: Size) -> dict[str, Any]:
    """Peaks of both sides, each in a fresh process."""
    peaks = {name: _peak_in_a_process(size, name) for name in ("fkl", "eopd", "dense")}
    return {
        "peak_memory_ratio_vs_dense": round(peaks["fkl"] / peaks["dense"], 3),
        "eopd_peak_memory_ratio_vs_dense": round(peaks["eopd"] / peaks["dense"], 3),
        "peak_mib": {name: round(value / 2**20) for name, value in peaks.items()},
    }


def _peak_in_a_process(size: Size, name: str) -> int:
    code = (
        f"from benchmarks.student_head import Size, peak_bytes; print(peak_bytes(Size(**{asdict(size)!r}), {name!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def oracle() -> dict[str, Any]:
    """Largest error of value and gradients over every objective, stop handling and head trait of the tests."""
    from tests.stages import test_student_head as tests
    from tests.stages.dense_oracle import make_case

    result: dict[str, float] = {}
    for given in tests.OBJECTIVES:
        for mode in ("class", "remap"):
            stops = StopHandling(mode, (3, 7), (5, 3))
            case = make_case(1, rule=tests.rule_for(given), extra=4, stops=stops)
            settings = given if given["name"] == "sft" else {**given, "stops": mode}
            result["-".join(map(str, settings.values()))] = max(tests.measure(case, settings).values())
    for traits in tests.TRAITS:
        for support in ("renormalised", "bucket", "sampled"):
            error = max(
                tests.measure(make_case(2, **traits), {"name": "eopd", "support": support, "tau": 0.1}).values()
            )
            result[f"eopd-{support}-{traits}"] = error
    worst = max(result, key=lambda name: result[name])
    return {"oracle_max_error": result[worst], "oracle_worst_case": worst, "oracle_cases": len(result)}
