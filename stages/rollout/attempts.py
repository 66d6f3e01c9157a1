"""Sampling until the verifier finds a response right (`rollout.attempts`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from eopd.stages.rollout.segments import Draft, Writing, Written


def until_right(drafts: Sequence[Draft], write: Writing, most: int, seed: int) -> list[tuple[Draft, Written]]:
    """Write responses, and those that are wrong again, each at most ``most`` times. The last attempt stays.

    A first attempt is what is written without attempts. The seed of another depends on ``seed``, the prompt's id, the
    number of the sample and that of the attempt alone. What the teacher wrote whole is not written again.

    Args:
        write: gives responses with verdicts.
    """
    results = list(zip(drafts, write(drafts), strict=True))
    for attempt in range(1, most):
        wrong = [n for n, (draft, written) in enumerate(results) if not written.correct and draft.ended is None]
        if not wrong:
            break
        again = [results[number][0].again(seed, attempt) for number in wrong]
        for number, draft, written in zip(wrong, again, write(again), strict=True):
            results[number] = draft, replace(written, attempts=attempt + 1)
    return results
