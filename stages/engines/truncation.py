"""Truncating a distribution: min-p, then top-k, then top-p, each on what the one before left (vLLM's order).

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def truncate(logprobs: Tensor, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> Tensor:
    """Set truncated entries to -inf; at least the most probable token stays. Not renormalised.

    Args:
        logprobs: [B, V] log-softmax at the sampling temperature, nats.
        top_p: keep the most probable tokens until their mass reaches this (1: all).
        top_k: keep this many most probable tokens, and those as probable as the last (0: all).
        min_p: keep tokens at least this probable, relative to the most probable one (0: all).
    """
    kept = logprobs
    if min_p > 0.0:
        floor = logprobs.amax(-1, keepdim=True) + math.log(min_p)
        kept = kept.masked_fill(logprobs < floor, -torch.inf)
    if 0 < top_k < logprobs.shape[-1]:
        smallest = kept.topk(top_k, dim=-1).values[:, -1:]
        kept = kept.masked_fill(kept < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, ids = kept.sort(dim=-1, descending=True, stable=True)
        probs = ordered.double().softmax(-1)
        cut = probs.cumsum(-1) - probs >= top_p  # the mass before a token is enough already
        cut[:, 0] = False
        kept = kept.masked_fill(torch.zeros_like(cut).scatter(1, ids, cut), -torch.inf)
    return kept
