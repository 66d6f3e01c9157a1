"""Predicted memory against measured peaks, and what the paper's runs need.

    python -m benchmarks.memory

Small models work on the CPU, each in a process of its own; a peak is that of the resident set above what it was before
the model was made. The last line is JSON: ``largest_relative_error`` over the cases, and GB by stage of the paper's
configs on a GPU of 80 GiB. ``--save`` writes it to benchmarks/results.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from eopd.pipeline.config import load_config
from eopd.pipeline.forecast import needs
from eopd.stages.engines.sampling import EngineOptions
from eopd.stages.memory import GIB, ModelSize, reading, training
from eopd.stages.stage import Models
from eopd.stages.train.settings import TrainSettings

SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 16_384,
    "tie_word_embeddings": True,
    "model_type": "qwen3",
}
ROWS, ROW, CONTEXT = 4, 320, 20
TRAIN = {"micro_batch_tokens": ROWS * ROW, "row_tokens": ROW, "head_chunk_tokens": 512}
CASES: dict[str, dict[str, Any]] = {
    "train": {},
    "train, gradient checkpointing": {"gradient_checkpointing": True},
    "train, average of the weights": {"gradient_checkpointing": True, "ema": 0.99},
    "train, lora": {"lora": {"rank": 16}},
    "score": {},
}
QWEN3 = {
    "0.6b": (1024, 3072, 28, 16, True),
    "1.7b": (2048, 6144, 28, 16, True),
    "4b": (2560, 9728, 36, 32, True),
    "8b": (4096, 12288, 36, 32, False),
}
"""Hidden and intermediate size, layers, heads, tied: as in the models' config.json."""
VARIANTS = {
    "as configured": {},
    "without gradient checkpointing": {"gradient_checkpointing": "false"},
    "fsdp over 4": {"processes": "4", "sharding": "fsdp"},
    "lora": {"lora": "{rank: 16}"},
}


def qwen3(name: str) -> ModelSize:
    hidden, intermediate, layers, heads, tied = QWEN3[name]
    return ModelSize(hidden, intermediate, layers, heads, 8, 128, 151_936, tied, norms_heads=True, dtype="bfloat16")


def paper() -> dict[str, dict[str, float]]:
    """Return GB by stage of the paper's configs; of training, by variant."""
    table: dict[str, dict[str, float]] = {}
    for student in ("0.6b", "1.7b", "4b"):
        row: dict[str, float] = {}
        for variant, changes in VARIANTS.items():
            settings = load_config(f"paper/qwen3-{student}", [f"train.{key}={value}" for key, value in changes.items()])
            for need in needs(settings, Models(qwen3(student), qwen3("8b")), 80 * GIB):
                name = f"train, {variant}" if need.stage == "train" else need.stage
                row[name] = round(need.memory.bytes / 1e9, 1)
        table[student] = row
    return table


def predicted(case: str) -> int:
    size = ModelSize.of(SMALL)
    assert size is not None
    if case == "score":
        options = EngineOptions(device="cpu")
        memory = reading(
            size, "float32", "transformers", options, tokens=ROWS * ROW, row_tokens=ROW, longest=ROW, gpu_bytes=0
        )
        return memory.bytes
    settings = TrainSettings.model_validate({**TRAIN, **CASES[case]})
    return training(size, settings, longest=ROW, gpu_bytes=0, step_tokens=2 * ROWS * ROW).bytes


def status(field: str) -> int:
    """Bytes of this process, by a field of /proc/self/status (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def measure(case: str) -> int:
    """Return the growth of this process's resident set, at most, while it works."""
    import torch

    work(case, {**SMALL, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 512})
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = status("VmRSS")
    work(case, SMALL)
    return status("VmHWM") - before


def work(case: str, shapes: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config

    from eopd.stages.models.packing import Sequence, pack

    model = AutoModelForCausalLM.from_config(Qwen3Config(**{k: v for k, v in shapes.items() if k != "model_type"}))
    length = ROW - CONTEXT + 1
    ids = np.random.default_rng(0).integers(0, shapes["vocab_size"], (ROWS, length)).tolist()
    (packed,) = pack([Sequence(range(CONTEXT), response) for response in ids], ROW, ROWS * ROW)
    if case == "score":
        score(model.eval(), packed)
    else:
        train(model, packed, TrainSettings.model_validate({**TRAIN, **CASES[case]}))


def score(model: Any, packed: Any) -> None:
    import torch

    from eopd.stages.models.lm_head import lm_head_of
    from eopd.stages.models.packing import final_hidden
    from eopd.stages.score.statistics import StatisticsHead
    from eopd.stages.score.token_statistics import TokenBatch, row_keys
    from eopd.storage.teacher_record import HeadRule

    head = StatisticsHead(lm_head_of(model), HeadRule())
    with torch.inference_mode():
        hidden = final_hidden(model, packed)
    head(hidden, TokenBatch(packed.target_ids.numpy(), row_keys(0, (1,), np.arange(packed.tokens))))


def train(model: Any, packed: Any, settings: TrainSettings) -> None:
    import torch

    from benchmarks.generator import STOP_IDS, generate
    from eopd.stages.models.packing import Packed
    from eopd.stages.train.lora import add_adapters
    from eopd.stages.train.objectives.base import StepContext, TeacherBatch
    from eopd.stages.train.objectives.registry import make_objective
    from eopd.stages.train.optimizer import Ema, gradient_norm, make_optimizer
    from eopd.stages.train.stops import StopHandling
    from eopd.stages.train.student import Student
    from eopd.storage.teacher_record import HeadRule

    assert isinstance(packed, Packed)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    if settings.lora is not None:
        model = add_adapters(model, settings.lora, 0, 0)
    objective, tokens = make_objective(settings.objective), packed.tokens
    student = Student(model, objective, settings.head_chunk_tokens)
    optimizer = make_optimizer(student, settings.optimizer)
    average = None if settings.ema is None else Ema(student, settings.ema)
    rows = generate(tokens, HeadRule(), vocabulary=max(student.vocab_size, 512))
    stops = StopHandling("class", STOP_IDS[:1], STOP_IDS[:1])
    batch = TeacherBatch.build(rows, HeadRule(), stops, objective.plan, student.vocab_size)
    context = StepContext(torch.ones(tokens), float(tokens), q_old=torch.zeros(tokens))
    for _ in range(2):  # the first step makes the moments
        optimizer.zero_grad(set_to_none=True)
        for _ in range(2):
            loss, _ = student(packed, batch, context)
            loss.backward()
        gradient_norm(student)
        optimizer.step()
        if average is not None:
            average.update()


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "--measure":
        sys.stdout.write(f"{measure(sys.argv[2])}\n")
        return
    cases: dict[str, dict[str, float]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.memory", "--measure", case]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        measured, expected = int(done.stdout.split()[-1]), predicted(case)
        error = expected / measured - 1
        cases[case] = {"measured_mb": measured // 10**6, "predicted_mb": expected // 10**6, "error": round(error, 3)}
        sys.stdout.write(f"{case}: {cases[case]}\n")
        sys.stdout.flush()
    largest = max(abs(case["error"]) for case in cases.values())
    result = {"largest_relative_error": largest, "cases": cases, "paper_gb": paper()}
    outcome = {"benchmark": "memory", "machine": machine(), **result}
    if "--save" in sys.argv:
        file = Path(__file__).parent / "results" / "memory-cpu.json"
        file.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(outcome) + "\n")


if __name__ == "__main__":
    main()
