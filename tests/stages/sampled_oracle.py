"""What a sample's log-probs must be: one plain forward of the model over prompt and response, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Tokens = Sequence[int] | NDArray[np.int32]


@torch.inference_mode()
def tempered(model: Any, prompt: Sequence[int], response: Tokens, temperature: float) -> Float64:
    """[T, V] log-softmax at ``temperature`` of the positions that predict each response token."""
    ids = torch.tensor([[*prompt, *[int(token) for token in response]]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() / temperature
    result: Float64 = logits.log_softmax(-1).numpy()
    return result


def at(logprobs: Float64, response: Tokens) -> Float64:
    """[T] of the response's own tokens."""
    result: Float64 = logprobs[np.arange(len(response)), np.asarray(response)]
    return result


def truncated(logprobs: Float64, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> Float64:
    """[T, V] the same after min-p, top-k and top-p, one row and one token at a time; renormalised."""
    out = np.full_like(logprobs, -np.inf)
    for row, line in enumerate(logprobs):
        probs = np.exp(line)
        kept = [v for v in np.argsort(-probs, kind="stable") if probs[v] >= min_p * probs.max()]
        if top_k:
            kept = kept[:top_k]
        total, mass = sum(probs[v] for v in kept), 0.0
        nucleus: list[int] = []
        for v in kept:
            if nucleus and mass >= top_p:
                break
            nucleus.append(v)
            mass += probs[v] / total
        out[row, nucleus] = np.log(probs[nucleus] / probs[nucleus].sum())
    return out
