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
def generate(
    model: Any, prompts: Sequence[Sequence[int]], length: int, temperature: float = 0.0, seed: int = 0
) -> list[list[int]]:
    """Responses to all prompts in one batch, each with its end token if it ended: greedy, or sampled."""
    torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else {}
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    width = max(map(len, prompts))
    pad = min(ends)
    ids = torch.tensor([[pad] * (width - len(prompt)) + [*prompt] for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"do_sample": False, "pad_token_id": pad, **how}
    rows = model.generate(ids, attention_mask=mask, max_new_tokens=length, **settings)[:, width:].tolist()
    return [row[: next((n + 1 for n, token in enumerate(row) if token in ends), len(row))] for row in rows]


@torch.inference_mode()
def log_probs(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """[T, V] of the positions that predict the response."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    result: Tensor = logits.float().log_softmax(-1)
    return result


def texts(tokenizer: Any, teacher: Any, questions: Sequence[str], length: int) -> list[Text]:
    """Held-out questions and the teacher's answers to them, sampled at temperature 0.7."""
    prompts = [prompt_ids(tokenizer, question) for question in questions]
    return list(zip(prompts, generate(teacher, prompts, length, 0.7), strict=True))


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


def measure(
    tokenizer: Any, teacher: Any, model: Any, held_out: Sequence[Text], solutions: Sequence[Text] = ()
) -> dict[str, Any]:
    """Figures of one model; on ``solutions`` its NLL and the KL to the teacher alone."""
    tokens = list(figures(teacher, model, held_out))
    result: dict[str, Any] = {name: _mean(name, tokens) for name in ("nll", "fkl", "rkl")}
    result["perplexity"] = math.exp(result["nll"][0])
    if solutions:
        read = list(figures(teacher, model, solutions))
        result["solutions"] = {name: _mean(name, read) for name in ("nll", "fkl")}
    entropy, fkl = (torch.cat([one[name] for one in tokens]) for name in ("entropy", "fkl"))
    bins = torch.bucketize(entropy, torch.tensor(EDGES))
    result["fkl_by_entropy"] = [
        float(fkl[bins == number].mean()) if bool((bins == number).any()) else None for number in range(len(EDGES) + 1)
    ]
    result["tokens_by_entropy"] = [int((bins == number).sum()) for number in range(len(EDGES) + 1)]
    result["facts"] = [sum(right(tokenizer, model, FACTS)), len(FACTS)]
    result["text"] = dict(zip(SAMPLES, greedy(tokenizer, model, SAMPLES, 40), strict=True))
    return result


def _mean(name: str, tokens: Sequence[Mapping[str, Tensor]]) -> tuple[float, float, float]:
    return interval([(float(one[name].sum()), len(one[name])) for one in tokens])


def greedy(tokenizer: Any, model: Any, questions: Sequence[str], length: int) -> list[str]:
    """Text of the greedy answer to each question."""
    rows = generate(model, [prompt_ids(tokenizer, question) for question in questions], length)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def right(tokenizer: Any, model: Any, task: Mapping[str, str]) -> list[bool]:
    """Of each question of a task, whether the greedy answer names one of its right answers."""
    texts = greedy(tokenizer, model, list(task), 24)
    return [
        any(re.search(rf"\b{re.escape(one)}\b", text, re.IGNORECASE) for one in answers.split("|"))
        for text, answers in zip(texts, task.values(), strict=True)
    ]


@torch.inference_mode()
def chosen(tokenizer: Any, model: Any, task: Mapping[str, Sequence[str]]) -> list[bool]:
    """Of each question, whether the model finds the first answer likelier than every other one (summed log-probs)."""
    collected = []
    for question, answers in task.items():
        prompt = prompt_ids(tokenizer, question)
        ids = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
        width = max(map(len, ids))
        rows = torch.tensor([[*prompt, *row, *[0] * (width - len(row))] for row in ids])  # causal: zeros change nothing
        columns = model(rows, logits_to_keep=width + 1).logits[:, :-1].float().log_softmax(-1)
        sums = [
            float(columns[number, torch.arange(len(row)), torch.tensor(row)].sum()) for number, row in enumerate(ids)
        ]
        collected.append(all(sums[0] > other for other in sums[1:]))
    return collected


def compare(
    folders: Mapping[str, Path], questions: Sequence[str], length: int, solutions: Sequence[Mapping[str, str]] = ()
) -> dict[str, Any]:
    """Figures of every model of ``folders``, of which ``teacher`` is one."""
    tokenizer = AutoTokenizer.from_pretrained(folders["teacher"])
    teacher = load(folders["teacher"])
    held_out = texts(tokenizer, teacher, questions, length)
    read = [
        (prompt_ids(tokenizer, row["prompt"]), tokenizer(row["response"], add_special_tokens=False)["input_ids"])
        for row in solutions
    ]
    return {name: measure(tokenizer, teacher, load(folder), held_out, read) for name, folder in folders.items()}


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
    if "solutions" in results["teacher"]:
        lines += ["", "| people's solutions | perplexity | NLL | KL(teacher, model) |", "|---|---|---|---|"]
        for name, one in results.items():
            nll, fkl = one["solutions"]["nll"], one["solutions"]["fkl"]
            shown = " | ".join(f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in (nll, fkl))
            lines.append(f"| {name} | {math.exp(nll[0]):.1f} | {shown} |")
    return "\n".join(lines)


def write(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
