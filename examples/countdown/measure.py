"""Plain measurements of a Countdown model, without the pipeline: what the README of this folder quotes.

Letters: B rows, P prompt tokens, R response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from eopd.examples.countdown.task import Traces, answer_text
from eopd.examples.countdown.tokenizer import END, ID, PAD, TURN_END, VOCABULARY, encode
from eopd.stages.evaluate.summary import pass_at_k
from eopd.stages.verifiers.countdown import verify

HEADER = (
    "| model | problems | Avg@8 | Pass@8 | distinct correct | response tokens | entropy (nats) | above 0.8 nats |\n"
    "|---|---|---|---|---|---|---|---|"
)
STOPS = (ID[END], ID[TURN_END])


@dataclass(frozen=True)
class Measured:
    """Of one model on one set of problems; ``gate_fraction`` is the share of response tokens above 0.8 nats."""

    problems: int
    avg_at_k: float
    pass_at_k: float
    distinct_correct: float
    response_tokens: float
    entropy: float
    gate_fraction: float


@torch.inference_mode()
def sample(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Responses [B, R] to prompts [B, P] of equal length at temperature 1, padded after the stop token."""
    cache, step, rows = None, prompt, []
    done = torch.zeros(len(prompt), dtype=torch.bool)
    for _ in range(new_tokens):
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        token = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)
        token[done] = ID[PAD]
        rows.append(token)
        done |= torch.isin(token[:, 0], torch.tensor(STOPS))
        if bool(done.all()):
            break
        step = token
    return torch.cat(rows, dim=1)


@torch.inference_mode()
def entropies(model: PreTrainedModel, prompt: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """Entropy in nats at every response token [B, R] (NaN on padding)."""
    logits = model(input_ids=torch.cat([prompt, response], dim=1), use_cache=False).logits
    logprobs = logits[:, prompt.shape[1] - 1 : -1].double().log_softmax(-1)
    entropy: torch.Tensor = -(logprobs.exp() * logprobs).sum(-1)
    return entropy.masked_fill(response == ID[PAD], float("nan"))


def texts(response: torch.Tensor) -> list[str]:
    """Responses as text, stop token and padding left out."""
    ends = {ID[PAD], *STOPS}
    return ["".join(VOCABULARY[token] for token in row if token not in ends) for row in response.tolist()]


def measure(
    model: PreTrainedModel,
    groups: Sequence[Traces],
    *,
    chat: bool,
    samples: int = 8,
    seed: int = 0,
    rows: int = 1024,
    judge: PreTrainedModel | None = None,
    new_tokens: int = 32,
) -> Measured:
    """Sample ``samples`` responses a problem and verify them; entropies are ``judge``'s (default: the model's own)."""
    generator = torch.Generator().manual_seed(seed)
    counts, distinct, spread, lengths = [], [], [], []
    for traces in groups:
        per = max(1, rows // samples)
        for start in range(0, len(traces), per):
            chunk = traces.take(slice(start, start + per))
            ids, width = encode(chunk, chat=chat)
            prompt = torch.from_numpy(ids[:, :width]).repeat_interleave(samples, dim=0)
            response = sample(model, prompt, new_tokens, generator)
            spread.append(entropies(judge or model, prompt, response).flatten())
            lengths.append((response != ID[PAD]).sum(1))
            written = texts(response)
            for row, (numbers, target) in enumerate(zip(chunk.numbers.tolist(), chunk.target.tolist(), strict=True)):
                verdicts = [verify(text, answer_text(numbers, target)) for text in written[row * samples :][:samples]]
                counts.append(sum(verdict.correct for verdict in verdicts))
                distinct.append(len({verdict.form for verdict in verdicts if verdict.correct}))
    entropy = torch.cat(spread)
    entropy = entropy[~entropy.isnan()]
    return Measured(
        problems=len(counts),
        avg_at_k=float(np.mean(counts)) / samples,
        pass_at_k=float(np.mean([pass_at_k(samples, c, samples) for c in counts])),
        distinct_correct=float(np.mean(distinct)),
        response_tokens=float(torch.cat(lengths).double().mean()),
        entropy=float(entropy.mean()),
        gate_fraction=float((entropy > 0.8).double().mean()),
    )


def as_row(name: str, measured: Measured) -> str:
    """One line of the README's table."""
    figures = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in asdict(measured).values()]
    return f"| {name} | {' | '.join(figures)} |"
