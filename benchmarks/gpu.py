"""What can only be measured on a GPU, in parts that each take about a minute; `scripts/gpu.sh` runs it.

    python -m benchmarks.gpu                      # writes benchmarks/results/gpu.json
    python -m benchmarks.gpu --rehearse           # the same code on the CPU with tiny shapes; writes nothing by itself
    python -m benchmarks.gpu --parts head,training

Models have the shapes of Qwen3 and random weights. Needs torch and transformers, no network and no vLLM. A part that
fails says why in the document; the others go on. A part is left out if its expected time no longer fits ``--seconds``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.generator import STOP_IDS, generate
from benchmarks.machine import machine
from benchmarks.memory import QWEN3
from eopd.stages.engines.sampling import EngineOptions, SamplingParameters, SamplingRequest
from eopd.stages.engines.sampling_transformers import TransformersSamplingEngine
from eopd.stages.models.lm_head import LMHead, lm_head_of
from eopd.stages.models.packing import Packed, Sequence, final_hidden, pack
from eopd.stages.score.statistics import StatisticsHead
from eopd.stages.score.token_statistics import TokenBatch, in_response_order, row_keys
from eopd.stages.train.objectives.base import StepContext, TeacherBatch
from eopd.stages.train.objectives.registry import BUILDERS, make_objective
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.optimizer import gradient_norm, make_optimizer
from eopd.stages.train.settings import OptimizerSettings
from eopd.stages.train.stops import StopHandling
from eopd.stages.train.student import Student, sparse_head_loss
from eopd.storage.artifacts import Artifact
from eopd.storage.identity import Identity
from eopd.storage.teacher_cache import PartHeader, write_part
from eopd.storage.teacher_record import HeadRule

STOPS = StopHandling("class", STOP_IDS[:1], STOP_IDS[:1])
RULE = HeadRule()


@dataclass(frozen=True)
class Scale:
    """Shapes of a run: those of the paper, or tiny ones for a rehearsal."""

    device: str
    dtype: torch.dtype
    vocabulary: int
    models: dict[str, tuple[int, int, int, int, bool]]  # hidden, intermediate, layers, heads, tied
    tokens: int  # of a batch that a teacher reads, and of the head
    row: int
    step_tokens: int
    sampled: int
    repeats: int


FULL = Scale("cuda", torch.bfloat16, 151_936, QWEN3, 8192, 1024, 16_384, 128, 3)
TINY = Scale(
    "cpu",
    torch.float32,
    512,
    {name: (64, 96, 2, 2, tied) for name, (*_, tied) in QWEN3.items()},
    128,
    32,
    128,
    8,
    1,
)


def model_of(scale: Scale, name: str, dtype: torch.dtype | None = None) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3Config

    hidden, intermediate, layers, heads, tied = scale.models[name]
    config = Qwen3Config(
        vocab_size=scale.vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=min(8, heads),
        head_dim=min(128, hidden // heads) if scale is TINY else 128,
        tie_word_embeddings=tied,
    )
    with torch.device(scale.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype or scale.dtype).eval()


def packed_of(scale: Scale, tokens: int) -> Packed:
    """Rows of one sequence each, of which the first 20 tokens are the context."""
    rng = np.random.default_rng(0)
    responses = rng.integers(5, scale.vocabulary, (tokens // scale.row, scale.row - 19)).tolist()
    (packed,) = pack([Sequence(range(20), response) for response in responses], scale.row, tokens)
    return packed.to(scale.device)


def synchronise(scale: Scale) -> None:
    if scale.device == "cuda":
        torch.cuda.synchronize()


def seconds(scale: Scale, work: Callable[[], Any]) -> float:
    """Return the median time of ``work`` after a first, unmeasured one."""
    work()
    times = []
    for _ in range(scale.repeats):
        synchronise(scale)
        began = time.perf_counter()
        work()
        synchronise(scale)
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def peak_bytes(scale: Scale, work: Callable[[], Any]) -> int | None:
    """Return the growth of allocated GPU memory during ``work``; None on a CPU."""
    if scale.device != "cuda":
        work()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    synchronise(scale)
    return int(torch.cuda.max_memory_allocated() - before)


# -- parts ---------------------------------------------------------------------------------------------------------


def gpu_tests(scale: Scale) -> dict[str, Any]:
    """Tests that are skipped without a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/stages/test_student_head_gpu.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    summary = done.stdout.strip().splitlines()[-1:]
    passed = done.returncode == 0 and (scale.device == "cpu" or " passed" in "".join(summary))
    return {"passed": passed, "summary": summary}


def parity(scale: Scale) -> dict[str, Any]:
    """Scoring and every objective on the device against the CPU, float32 and bfloat16."""
    tokens, dim = 96, 64
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=generator)
    weight = torch.randn(4096, dim, generator=generator) / 4
    keys = row_keys(0, (1,), np.arange(tokens))
    asked = TokenBatch(np.arange(tokens), keys)
    errors: dict[str, float] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        low = (hidden.to(dtype), weight.to(dtype))
        result = [
            StatisticsHead(LMHead(low[1].to(device), None, 1.0, None, 4096), RULE)(low[0].to(device), asked)
            for device in ("cpu", scale.device)
        ]
        errors[f"scoring, {name}"] = float(np.abs(result[0].entropy - result[1].entropy).max())
        for objective_name in BUILDERS:
            results = [loss_of(objective_name, low[0], low[1], device) for device in ("cpu", scale.device)]
            errors[f"{objective_name}, {name}"] = largest_difference(*results)
    return {
        "errors": errors,
        "largest_float32": max(error for name, error in errors.items() if "float32" in name),
        "largest_bfloat16": max(error for name, error in errors.items() if "bfloat16" in name),
    }


def largest_difference(expected: Iterable[Any], values: Iterable[Any]) -> float:
    """Return the largest distance between two tensors of a pair, relative to the norm of the first."""
    pairs = [(one.cpu().double(), other.cpu().double()) for one, other in zip(expected, values, strict=True)]
    return max(float((one - other).norm() / one.norm().clamp_min(1e-6)) for one, other in pairs)


def loss_of(name: str, hidden: Tensor, weight: Tensor, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss and both gradients of an objective."""
    objective = make_objective(ObjectiveSettings(name=name))
    rows, rule = generate(len(hidden), RULE, vocabulary=len(weight)), RULE
    if objective.plan.draws == "full":  # which the generator does not make
        rule = HeadRule(draws="full", n_draws=50)
        ids = np.random.default_rng(0).integers(0, len(weight), len(hidden) * rule.n_draws).astype(np.int32)
        rows = replace(rows, draw_ids=ids, draw_offsets=np.arange(len(hidden) + 1) * rule.n_draws)
    batch = TeacherBatch.build(rows, rule, STOPS, objective.plan, len(weight), device)
    leaves = [tensor.detach().to(device).requires_grad_() for tensor in (hidden, weight)]
    head = LMHead(leaves[1], None, 1.0, None, len(weight))
    loss, _ = sparse_head_loss(leaves[0], head, batch, objective, context_of(len(hidden), device))
    loss.backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    return loss.detach(), leaves[0].grad, leaves[1].grad


def context_of(tokens: int, device: str) -> StepContext:
    zeros = torch.zeros(tokens, device=device)
    return StepContext(
        mask=torch.ones(tokens, device=device),
        normaliser=float(tokens),
        q_old=zeros,
        student_entropy_round=zeros,
        entropy_threshold=0.5,
        unsure=torch.zeros(tokens, dtype=torch.bool, device=device),
        token_key=torch.arange(tokens, device=device),
    )


@torch.inference_mode()
def scoring(scale: Scale) -> dict[str, Any]:
    """The bare forward pass of an 8B teacher, with its own logits, and the score stage to Zarr."""
    model, packed = model_of(scale, "8b"), packed_of(scale, scale.tokens)
    head = StatisticsHead(lm_head_of(model), RULE)
    sampled = packed.target_ids.cpu().numpy()

    def with_logits() -> None:
        for row in range(len(packed.input_ids)):
            model(input_ids=packed.input_ids[row : row + 1], use_cache=False)

    with tempfile.TemporaryDirectory() as folder:
        store = Artifact(Path(folder), Identity("scores", 1, 1000, {"benchmark": 1}))
        header = PartHeader(
            "teacher", "tokenizer", "none", 1.0, RULE, scale.vocabulary, "rollouts", (), "none", "0", "bfloat16", 0
        )
        part = iter(range(1000))

        def whole() -> None:
            hidden = final_hidden(model, packed)
            asked = TokenBatch(sampled, row_keys(0, (1,), np.arange(packed.tokens)))
            count = len(packed.order)
            record = in_response_order(head(hidden, asked), packed.order, packed.lengths, np.zeros(0, np.int32), count)
            with store.write_part(next(part)) as target:
                write_part(target, record, header)

        taken = {
            "forward": seconds(scale, lambda: final_hidden(model, packed)),
            "forward_with_logits": seconds(scale, with_logits),
            "score_stage": seconds(scale, whole),
        }
    asked = TokenBatch(sampled, row_keys(0, (1,), np.arange(packed.tokens)))
    hidden = torch.zeros(packed.tokens, scale.models["8b"][0], dtype=scale.dtype, device=scale.device)
    half = TokenBatch(sampled[: packed.tokens // 2], asked.keys[: packed.tokens // 2])
    return {
        **{f"{name}_tokens_per_s": scale.tokens / value for name, value in taken.items()},
        "of_the_bare_forward_pass": taken["forward"] / taken["score_stage"],
        "of_the_forward_pass_with_logits": taken["forward_with_logits"] / taken["score_stage"],
        "head_peak_bytes": peak_bytes(scale, lambda: head(hidden, asked)),
        "head_peak_bytes_at_half_the_tokens": peak_bytes(scale, lambda: head(hidden[: packed.tokens // 2], half)),
    }


def head(scale: Scale) -> dict[str, Any]:
    """Head and loss against dense torch, and against Liger's fused linear KL if it is installed."""
    tokens, dim = scale.tokens, scale.models["8b"][0]
    hidden = torch.randn(tokens, dim, device=scale.device, dtype=scale.dtype, requires_grad=True)
    weight = torch.randn(scale.vocabulary, dim, device=scale.device, dtype=scale.dtype).div_(dim**0.5)
    weight.requires_grad_()
    rows = generate(tokens, RULE, vocabulary=scale.vocabulary)
    objective = make_objective(ObjectiveSettings(name="fkl", support="bucket"))
    batch = TeacherBatch.build(rows, RULE, STOPS, objective.plan, scale.vocabulary, scale.device)
    context = context_of(tokens, scale.device)
    teacher = torch.randn(tokens, scale.vocabulary, device=scale.device, dtype=scale.dtype).softmax(1)

    def sparse(frozen: bool = False) -> Tensor:
        student = LMHead(weight.detach() if frozen else weight, None, 1.0, None, scale.vocabulary)
        return sparse_head_loss(hidden, student, batch, objective, context)[0]

    sides = {
        "sparse": sparse,
        "sparse_frozen": lambda: sparse(True),
        "dense": lambda: dense_kl(hidden, weight, teacher),
    }
    fused = fused_kl(scale)
    if fused is not None:
        sides["liger"] = lambda: fused(hidden, weight, teacher)
    figures: dict[str, Any] = {"shape": [tokens, dim, scale.vocabulary]}
    for name, side in sides.items():

        def step(side: Callable[[], Tensor] = side) -> None:
            side().backward()
            hidden.grad = weight.grad = None

        try:
            figures[f"{name}_ms"] = 1e3 * seconds(scale, step)
            figures[f"{name}_peak_bytes"] = peak_bytes(scale, step)
        except (RuntimeError, TypeError) as error:  # too little memory, or another version of Liger
            figures[f"{name}_failed"] = f"{type(error).__name__}: {error}"[:300]
    if fused is not None:
        figures["liger_version"] = version("liger-kernel")
        figures["sparse_against_liger"] = difference(scale.device, fused)
    figures["sparse_against_dense"] = difference(scale.device, dense_kl)
    return figures


def dense_kl(hidden: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
    """Forward KL [] of teacher probabilities [T, V], over whole logits."""
    return F.kl_div(F.linear(hidden, weight).float().log_softmax(1), teacher.float(), reduction="batchmean")


def fused_kl(scale: Scale) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Return Liger's fused linear KL, with the arguments of ``dense_kl``; None if it is not installed.

    It is a Triton kernel: on a CPU it needs ``TRITON_INTERPRET=1`` in the environment.
    """
    if scale.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from liger_kernel.transformers import LigerFusedLinearKLDivLoss  # type: ignore[import-not-found]
    except ImportError:
        return None
    return LigerFusedLinearKLDivLoss(reduction="batchmean")


def difference(device: str, other: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
    """Return the largest relative difference in loss and gradients from the sparse head, in float32.

    The teacher is scored with a head that covers the vocabulary, so that nothing is cut off.
    """
    tokens, dim, vocabulary = 48, 32, 160
    generator = torch.Generator().manual_seed(0)
    hidden, states = (torch.randn(tokens, dim, generator=generator).to(device) for _ in range(2))
    weight, reading = ((torch.randn(vocabulary, dim, generator=generator) / 4).to(device) for _ in range(2))
    rule = HeadRule(k_max=vocabulary, full_head_above=-1.0, draws="none")
    asked = TokenBatch(np.arange(tokens), row_keys(0, (1,), np.arange(tokens)))
    statistics = StatisticsHead(LMHead(reading, None, 1.0, None, vocabulary), rule)(states, asked)
    rows = in_response_order(statistics, (0,), (tokens,), np.zeros(0, np.int32), 1)
    objective = make_objective(ObjectiveSettings(name="fkl", support="bucket", k=vocabulary))
    batch = TeacherBatch.build(rows, rule, StopHandling(), objective.plan, vocabulary, device)

    def sparse(hidden: Tensor, weight: Tensor, _: Tensor) -> Tensor:
        student = LMHead(weight, None, 1.0, None, vocabulary)
        return sparse_head_loss(hidden, student, batch, objective, context_of(tokens, device))[0]

    results = []
    for side in (sparse, other):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weight)]
        loss = side(*leaves, F.linear(states, reading).softmax(1))
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    return largest_difference(*results)


def training(scale: Scale) -> dict[str, Any]:
    """A step of the 1.7B and 0.6B students from the cache, and with an 8B teacher that reads the same tokens."""
    teacher = model_of(scale, "8b")
    return {name: _training_of(scale, name, teacher) for name in ("1.7b", "0.6b")}


def _training_of(scale: Scale, name: str, teacher: Any) -> dict[str, Any]:
    model = model_of(scale, name, torch.float32).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective = make_objective(ObjectiveSettings(name="eopd"))
    student = Student(model, objective, None, autocast=scale.device == "cuda")
    optimizer = make_optimizer(student, OptimizerSettings())
    packed = packed_of(scale, scale.step_tokens)
    rows = generate(packed.tokens, RULE, vocabulary=scale.vocabulary)
    context = context_of(packed.tokens, scale.device)
    statistics = StatisticsHead(lm_head_of(teacher), RULE)
    asked = TokenBatch(packed.target_ids.cpu().numpy(), row_keys(0, (1,), np.arange(packed.tokens)))

    def cached() -> None:
        batch = TeacherBatch.build(rows, RULE, STOPS, objective.plan, scale.vocabulary, scale.device)
        optimizer.zero_grad(set_to_none=True)
        student(packed, batch, context)[0].backward()
        gradient_norm(student)
        optimizer.step()

    def live() -> None:
        with torch.inference_mode():
            statistics(final_hidden(teacher, packed), asked)
        cached()

    cached()  # makes the moments
    peak = peak_bytes(scale, cached)
    step, with_teacher = seconds(scale, cached), seconds(scale, live)
    return {
        "step_s": step,
        "tokens_per_s": packed.tokens / step,
        "with_a_live_teacher_s": with_teacher,
        "times_as_fast": with_teacher / step,
        "growth_during_a_step_bytes": peak,
    }


@torch.inference_mode()
def sampling(scale: Scale) -> dict[str, Any]:
    """The transformers engine on a 1.7B student."""
    engine = object.__new__(TransformersSamplingEngine)
    engine._options, engine._device = EngineOptions(device=scale.device), scale.device
    engine._model, engine._cache_name, engine._takes_padding = model_of(scale, "1.7b"), "past_key_values", True
    count = 64 if scale is FULL else 2
    requests = [SamplingRequest(list(range(5, 45)), seed) for seed in range(count)]
    parameters = SamplingParameters(max_new_tokens=scale.sampled)
    taken = seconds(replace(scale, repeats=1), lambda: engine._decode(requests, parameters, None))
    return {
        "sequences": count,
        "tokens_per_s": count * scale.sampled / taken,
        "ms_per_position": 1e3 * taken / scale.sampled,
    }


PARTS: dict[str, tuple[Callable[[Scale], dict[str, Any]], int]] = {
    "parity": (parity, 40),
    "tests": (gpu_tests, 45),
    "head": (head, 60),
    "scoring": (scoring, 100),
    "training": (training, 120),
    "sampling": (sampling, 50),
}
"""The parts in order, each with the seconds that it is expected to take on one H100."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas")
    parser.add_argument("--seconds", type=float, default=460.0, help="leave out parts that would end later")
    parser.add_argument("--out", type=Path, help="the document's file")
    options = parser.parse_args(arguments)
    scale = TINY if options.rehearse else FULL
    if scale is FULL and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --rehearse runs every part on the CPU with tiny shapes")
    out = options.out or (None if options.rehearse else Path(__file__).parent / "results" / "gpu.json")
    document: dict[str, Any] = {"benchmark": "gpu", "machine": machine(), "rehearsal": options.rehearse, "parts": {}}
    began = time.perf_counter()
    for name in options.parts.split(","):
        part, expected = PARTS[name]
        if time.perf_counter() - began + expected > options.seconds:
            document["parts"][name] = {"left_out": f"it takes about {expected} s"}
            continue
        start = time.perf_counter()
        try:
            result = part(scale)
        except Exception as error:  # the other parts are worth as much
            result = {"failed": f"{type(error).__name__}: {error}"[:500]}
        document["parts"][name] = {
            **result,
            "seconds": round(time.perf_counter() - start, 1),
            "expected_seconds": expected,
        }
        sys.stdout.write(f"{name}: {document['parts'][name]}\n")
        sys.stdout.flush()
        if out is not None:  # after every part: the machine may be taken away
            out.parent.mkdir(exist_ok=True)
            out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if scale.device == "cuda":
            torch.cuda.empty_cache()
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
