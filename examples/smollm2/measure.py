"""What a halved student lost and what distillation gave back, on questions and facts that were held out.

Everything is exact, from full logits: negative log-likelihood of the teacher's own answers and of plain text, forward
and reverse KL to the teacher by the teacher's entropy, and the share of facts that a greedy answer names.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2.questions import FACTS

EDGES = (0.4, 0.8, 1.6, 3.2)
"""Bins of the teacher's entropy, nats."""
SAMPLES = ("Explain rain to a child of eight.", "What is the capital of France?", "Give me three facts about bread.")
RESAMPLES = 1000
Text = tuple[list[int], list[int]]
"""Ids of a question as the chat template writes it, and of an answer."""


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@torch.inference_mode()
def answer(model: Any, ids: Sequence[int], length: int, seed: int | None = None) -> list[int]:
    """A greedy answer, or a sample at temperature 0.7."""
    if seed is not None:
        torch.manual_seed(seed)
    how = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0}
    given = torch.tensor([list(ids)])
    out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=length, **how)
    found: list[int] = out[0, len(ids) :].tolist()
    return found


@torch.inference_mode()
def log_probs(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """[T, V] of the positions that predict the response."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    found: Tensor = logits.float().log_softmax(-1)
    return found


def texts(tokenizer: Any, teacher: Any, questions: Sequence[str], length: int) -> list[Text]:
    """Held-out questions and the teacher's answers to them."""
    prompts = [prompt_ids(tokenizer, question) for question in questions]
    return [(ids, answer(teacher, ids, length, seed)) for seed, ids in enumerate(prompts)]


def figures(teacher: Any, model: Any, held_out: Sequence[Text]) -> Iterator[dict[str, Tensor]]:
    """Per text: of each token the NLL, both divergences to the teacher and the teacher's entropy, nats."""
    for prompt, response in held_out:
        p, q = log_probs(teacher, prompt, response), log_probs(model, prompt, response)
        ids = torch.tensor(response)[:, None]
        yield {
            "nll": -q.gather(1, ids)[:, 0],
            "fkl": (p.exp() * (p - q)).sum(1),
            "rkl": (q.exp() * (q - p)).sum(1),
            "entropy": -(p.exp() * p).sum(1),
        }


def interval(values: Sequence[tuple[float, int]], seed: int = 0) -> tuple[float, float, float]:
    """Mean over tokens, and its 95 % interval by a bootstrap over texts. ``values``: (sum, tokens) of each."""
    drawn = random.Random(seed)
    means = []
    for _ in range(RESAMPLES):
        chosen = [values[drawn.randrange(len(values))] for _ in values]
        means.append(sum(total for total, _ in chosen) / max(sum(count for _, count in chosen), 1))
    means.sort()
    mean = sum(total for total, _ in values) / max(sum(count for _, count in values), 1)
    return mean, means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]


def measure(tokenizer: Any, teacher: Any, model: Any, held_out: Sequence[Text]) -> dict[str, Any]:
    """Figures of one model."""
    tokens = list(figures(teacher, model, held_out))
    found: dict[str, Any] = {
        name: interval([(float(one[name].sum()), len(one[name])) for one in tokens]) for name in ("nll", "fkl", "rkl")
    }
    found["perplexity"] = math.exp(found["nll"][0])
    entropy, fkl = (torch.cat([one[name] for one in tokens]) for name in ("entropy", "fkl"))
    bins = torch.bucketize(entropy, torch.tensor(EDGES))
    found["fkl_by_entropy"] = [
        float(fkl[bins == number].mean()) if bool((bins == number).any()) else None for number in range(len(EDGES) + 1)
    ]
    found["tokens_by_entropy"] = [int((bins == number).sum()) for number in range(len(EDGES) + 1)]
    right = 0
    for question, answers in FACTS.items():
        text = tokenizer.decode(answer(model, prompt_ids(tokenizer, question), 24), skip_special_tokens=True)
        right += any(re.search(rf"\b{re.escape(one)}\b", text, re.IGNORECASE) for one in answers.split("|"))
    found["facts"] = [right, len(FACTS)]
    found["text"] = {
        question: tokenizer.decode(answer(model, prompt_ids(tokenizer, question), 40), skip_special_tokens=True)
        for question in SAMPLES
    }
    return found


def compare(folders: Mapping[str, Path], questions: Sequence[str], length: int) -> dict[str, Any]:
    """Figures of every model of ``folders``, of which ``teacher`` is one."""
    tokenizer = AutoTokenizer.from_pretrained(folders["teacher"])
    teacher = load(folders["teacher"])
    held_out = texts(tokenizer, teacher, questions, length)
    return {name: measure(tokenizer, teacher, load(folder), held_out) for name, folder in folders.items()}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as Markdown."""
    spans = [f"below {EDGES[0]}", *(f"{low} to {high}" for low, high in pairwise(EDGES)), f"above {EDGES[-1]}"]
    lines = [
        "| model | perplexity | NLL | KL(teacher, model) | KL(model, teacher) | facts |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in results.items():
        shown = [f"{one[key][0]:.3f} [{one[key][1]:.3f}, {one[key][2]:.3f}]" for key in ("nll", "fkl", "rkl")]
        lines.append(
            f"| {name} | {one['perplexity']:.1f} | {' | '.join(shown)} | {one['facts'][0]}/{one['facts'][1]} |"
        )
    lines += ["", f"| KL(teacher, model) by entropy, nats | {' | '.join(spans)} |", "|---" * (len(spans) + 1) + "|"]
    for name, one in results.items():
        values = ["·" if value is None else f"{value:.3f}" for value in one["fkl_by_entropy"]]
        lines.append(f"| {name} | {' | '.join(values)} |")
    counts = next(iter(results.values()))["tokens_by_entropy"]
    lines.append(f"| tokens | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def write(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
