"""Rollouts as HTML: every token on a ground that says how uncertain the teacher was there.

Written by hand rather than by the template because there may be tens of thousands of tokens; every piece of foreign
text goes through ``escape``. The whole is bounded: at most ``MOST_SHOWN`` rollouts and about ``BUDGET`` bytes of
tokens, and what is cut is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from eopd.stages.report import palette, words
from eopd.stages.report.data import RolloutView, RunData
from eopd.stages.report.scales import finite

MOST_SHOWN = 64
BUDGET = 2_400_000  # bytes of token HTML
_LONGEST_TOKEN = 80
_LONGEST_PROMPT = 3000


@dataclass(frozen=True)
class Card:
    """One rollout, ready for the template."""

    run: str
    index: int
    tone: str
    round: int | None
    verdict: str
    correct: bool | None
    facts: tuple[str, ...]
    tokens: Markup
    cut: str
    label: str


@dataclass(frozen=True)
class PromptGroup:
    """The rollouts of one prompt, which stand side by side."""

    prompt: str
    cards: tuple[Card, ...]
    right: int
    judged: int


@dataclass(frozen=True)
class Gallery:
    groups: tuple[PromptGroup, ...]
    shown: int
    total: int
    has_threshold: bool


def gallery(runs: Sequence[RunData]) -> Gallery:
    chosen = _choose(runs)
    allowance = BUDGET // max(len(chosen), 1)
    prompts: dict[str, list[Card]] = {}
    for index, rollout in chosen:
        prompts.setdefault(rollout.prompt, []).append(_card(runs[index], index, rollout, allowance))
    groups = []
    for prompt, cards in prompts.items():
        judged = [card.correct for card in cards if card.correct is not None]
        shown = words.printable(prompt, _LONGEST_PROMPT)
        groups.append(PromptGroup(shown, tuple(cards), sum(judged), len(judged)))
    total = sum(len(run.rollouts) for run in runs)
    return Gallery(tuple(groups), len(chosen), total, any(run.threshold is not None for run in runs))


def token_html(rollout: RolloutView, threshold: float | None, allowance: int) -> tuple[Markup, int]:
    """Tokens as ``<i class=h3 data-e="entropy logprob">``, and how many fitted into ``allowance`` bytes.

    The class is upper case where the entropy passes the gate (a second sign beside the colour).
    """
    parts: list[str] = []
    used = 0
    for place, token in enumerate(rollout.tokens):
        entropy = rollout.entropy[place] if rollout.entropy else None
        logprob = rollout.logprobs[place] if rollout.logprobs else None
        text = escape(_visible(token), quote=False)
        piece = f'<i class={_heat_class(entropy, threshold)} data-e="{_plain(entropy)} {_plain(logprob)}">{text}</i>'
        used += len(piece.encode())
        if used > allowance:
            return Markup("".join(parts)), place
        parts.append(piece)
    return Markup("".join(parts)), len(rollout.tokens)


def _choose(runs: Sequence[RunData]) -> list[tuple[int, RolloutView]]:
    """An equal number of each run's rollouts, from the front, up to ``MOST_SHOWN``; (run index, rollout)."""
    taken: list[tuple[int, RolloutView]] = []
    longest = max((len(run.rollouts) for run in runs), default=0)
    for place in range(longest):
        for index, run in enumerate(runs):
            if place < len(run.rollouts) and len(taken) < MOST_SHOWN:
                taken.append((index, run.rollouts[place]))
    return taken


def _card(run: RunData, index: int, rollout: RolloutView, allowance: int) -> Card:
    tokens, shown = token_html(rollout, run.threshold, allowance)
    total = len(rollout.tokens)
    cut = f"The first {shown} of {total} tokens are shown." if shown < total else ""
    verdict = words.printable(rollout.verdict, 60)
    if not verdict:
        verdict = {True: "correct", False: "wrong", None: "not judged"}[rollout.correct]
    label = f"Response of {run.name}, {verdict}, {total} tokens. Arrow keys step through the tokens."
    return Card(
        run.name,
        index,
        palette.tone(index),
        rollout.round,
        verdict,
        rollout.correct,
        _facts(rollout, run.threshold),
        tokens,
        cut,
        label,
    )


def _facts(rollout: RolloutView, threshold: float | None) -> tuple[str, ...]:
    facts = [f"{len(rollout.tokens)} tokens"]
    known = finite(rollout.entropy)
    if known:
        facts.append(f"mean teacher entropy {words.number(sum(known) / len(known))}")
        if threshold is not None:
            facts.append(f"{sum(value > threshold for value in known)} past the gate")
    return tuple(facts)


def _heat_class(entropy: float | None, threshold: float | None) -> str:
    if entropy is None or math.isnan(entropy):
        return "hn"
    letter = "H" if threshold is not None and entropy > threshold else "h"
    return f"{letter}{palette.heat(entropy)}"


def _plain(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if math.isfinite(value) else "?"


def _visible(token: str) -> str:
    """Line ends keep their effect and get a sign; an empty token (part of a character) gets one too."""
    text = words.printable(token.replace("\r\n", "\n"), _LONGEST_TOKEN)
    return text.replace("\n", "↵\n") or "·"
