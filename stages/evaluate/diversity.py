"""Diversity of the responses to one problem: self-BLEU and distinct-n over token ids.

Letters: S samples of one problem, U distinct n-grams among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
ORDER = 4


def self_bleu(samples: Sequence[Ids]) -> float:
    """Return the mean BLEU-4 of each sample against all others, in [0, 1]; 1: all equal, NaN: fewer than two samples.

    Self-BLEU as in Zhu et al. 2018 (arXiv 1802.01886) on BLEU (Papineni et al. 2002) with add-one smoothed orders
    above one (Lin and Och 2004). A sample shorter than four tokens is compared on the orders that it has; an empty
    one counts 1 if another is empty too, else 0.
    """
    count = len(samples)
    if count < 2:
        return math.nan
    lengths = np.asarray([len(sample) for sample in samples])
    logs = np.zeros(count)
    orders = np.zeros(count)
    for n in range(1, ORDER + 1):
        grams, totals = _counts(samples, n)
        clipped = np.minimum(grams, _most_elsewhere(grams)).sum(axis=1)
        smooth = 0.0 if n == 1 else 1.0
        precision = (clipped + smooth) / np.maximum(totals + smooth, 1.0)
        with np.errstate(divide="ignore"):
            logs += np.where(totals > 0, np.log(precision), 0.0)
        orders += totals > 0
    bleu = np.exp(logs / np.maximum(orders, 1.0)) * _brevity(lengths)
    empty = lengths == 0
    bleu[empty] = 1.0 if empty.sum() > 1 else 0.0
    return float(bleu.mean())


def distinct(samples: Sequence[Ids], n: int = ORDER) -> float:
    """Return distinct n-grams over all n-grams of a problem's samples, in (0, 1]; NaN if there is none.

    Li et al. 2016 (arXiv 1510.03055). Falls with the number of samples and their length: compare at equal both.
    """
    grams, totals = _counts(samples, n)
    return grams.shape[1] / int(totals.sum()) if totals.sum() else math.nan


def _counts(samples: Sequence[Ids], n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count every distinct n-gram in every sample [S, U], and n-grams per sample [S]."""
    totals = np.asarray([max(0, len(sample) - n + 1) for sample in samples], dtype=np.int64)
    if totals.sum() == 0:
        return np.zeros((len(samples), 0), dtype=np.int64), totals
    windows = [np.lib.stride_tricks.sliding_window_view(s, n) for s in samples if len(s) >= n]
    unique, inverse = np.unique(np.concatenate(windows), axis=0, return_inverse=True)
    grams = np.zeros((len(samples), len(unique)), dtype=np.int64)
    np.add.at(grams, (np.repeat(np.arange(len(samples)), totals), inverse.reshape(-1)), 1)
    return grams, totals


def _most_elsewhere(grams: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the largest count of each n-gram among the *other* samples: [S, U]."""
    if grams.shape[1] == 0:
        return grams
    top = np.sort(grams, axis=0)
    # For the (first) sample that holds the largest count, the others' largest is the second largest.
    most = np.broadcast_to(top[-1], grams.shape).copy()
    most[grams.argmax(axis=0), np.arange(grams.shape[1])] = top[-2]
    return most


def _brevity(lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the brevity penalty [S] against the reference of closest length (the shorter of two equally close)."""
    gaps = np.abs(lengths[:, None] - lengths[None, :]).astype(np.float64)
    gaps += 0.25 * (lengths[None, :] > lengths[:, None])
    np.fill_diagonal(gaps, np.inf)
    closest = lengths[gaps.argmin(axis=1)]
    penalty: NDArray[np.float64] = np.exp(np.minimum(0.0, 1.0 - closest / np.maximum(lengths, 1)))
    return penalty
