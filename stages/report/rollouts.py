"""Rollouts coloured by teacher entropy, token by token: reading them, and their HTML.

There may be tens of thousands of tokens, so their HTML is written here rather than by the template; all text from a
model or a data set goes through ``escape``. At most ``MOST_SHOWN`` rollouts and about ``BUDGET`` bytes are shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from markupsafe import Markup

from eopd.stages.format import decimal, printable
from eopd.stages.report.data import RolloutView, RunData
from eopd.storage.artifacts import Artifact
from eopd.storage.records import read_rollouts
from eopd.storage.teacher_cache import JointCache

TOKENIZER = "tokenizer.json"
OF_A_ROUND = 12
MOST_SHOWN = 48
BUDGET = 1_500_000  # bytes of token HTML
HEAT_EDGES = (0.05, 0.2, 0.5, 0.8, 1.3, 2.0)  # nats; a token's heat is the number of edges at or below its entropy
_LONGEST_PROMPT = 3000
_LONGEST_TOKEN = 80

Judge = Callable[[str, Sequence[tuple[str, str]]], Sequence[bool | None]]
"""Verdicts of (response, reference answer) pairs by the verifier of a name; None if it cannot say."""


def no_verdicts(verifier: str, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    return [None] * len(pairs)


def rollout_views(
    rollouts: Artifact, scores: tuple[Artifact, ...], round_: int, tokenizer_folder: str, judge: Judge
) -> list[RolloutView]:
    """Return the first responses of a round, from its first part that has any."""
    from tokenizers import Tokenizer  # importing transformers for it would cost more than the report

    tokenizer = Tokenizer.from_file(str(Path(tokenizer_folder) / TOKENIZER))
    rows: list[dict[str, Any]] = []
    teacher = JointCache(scores)
    for part in teacher.parts():
        rows = read_rollouts(rollouts.part_folder(part)).slice(0, OF_A_ROUND).to_pylist()
        if rows:
            break
    verdicts = _verdicts(rows, judge)
    views = []
    for number, row in enumerate(rows):
        scored = teacher.read([(part, number)])
        ids = row["response_token_ids"][: scored.tokens]
        views.append(
            RolloutView(
                prompt=_user_message(row["messages"]) or tokenizer.decode(row["prompt_token_ids"], False),
                key=row["messages"] or str(row["prompt_token_ids"]),
                tokens=[str(tokenizer.decode([token], skip_special_tokens=False)) for token in ids],
                entropy=scored.entropy.tolist(),
                logprobs=list(row["logprobs"][: scored.tokens]) if row["logprobs"] else [None] * len(ids),
                correct=verdicts.get(number),
                truncated=row["finish_reason"] == "length",
                round=round_,
            )
        )
    return views


def _verdicts(rows: Sequence[dict[str, Any]], judge: Judge) -> dict[int, bool | None]:
    """Return the verdicts that rollouts carry, and those of ``judge`` on the others."""
    verdicts: dict[int, bool | None] = {n: row["correct"] for n, row in enumerate(rows) if "correct" in row}
    unjudged = {n: row for n, row in enumerate(rows) if n not in verdicts}
    for verifier in {row["verifier"] for row in unjudged.values() if row["verifier"]}:
        judged = [n for n, row in unjudged.items() if row["verifier"] == verifier and row["answer"] is not None]
        pairs = [(rows[number]["response_text"] or "", rows[number]["answer"]) for number in judged]
        verdicts.update(zip(judged, judge(verifier, pairs), strict=True))
    return verdicts


def _user_message(messages: str | None) -> str | None:
    """Return the last message of the user; None if there is none."""
    try:
        conversation = json.loads(messages or "")
        contents = [message["content"] for message in conversation if message.get("role") == "user"]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    if not contents:
        return None
    return contents[-1] if isinstance(contents[-1], str) else json.dumps(contents[-1], ensure_ascii=False)


@dataclass(frozen=True)
class Card:
    """One response, ready for the template."""

    run: int
    round: int
    verdict: str
    css: str
    facts: tuple[str, ...]
    tokens: Markup


@dataclass(frozen=True)
class Group:
    """The responses to one prompt."""

    prompt: str
    cards: tuple[Card, ...]
    right: int
    judged: int


@dataclass(frozen=True)
class Gallery:
    groups: tuple[Group, ...]
    shown: int
    total: int


def gallery(runs: Sequence[RunData]) -> Gallery:
    """Return the rollouts of all runs, the same number of each, by prompt."""
    most = max((len(run.rollouts) for run in runs), default=0)
    places = [(index, place) for place in range(most) for index, run in enumerate(runs) if place < len(run.rollouts)]
    chosen = [(index, runs[index].rollouts[place]) for index, place in places[:MOST_SHOWN]]
    prompts: dict[str, list[tuple[int, RolloutView]]] = {}
    for index, rollout in chosen:
        prompts.setdefault(rollout.key, []).append((index, rollout))
    groups = []
    for members in prompts.values():
        cards = tuple(_card(index, one, runs[index].threshold, BUDGET // len(chosen)) for index, one in members)
        verdicts = [one.correct for _, one in members if one.correct is not None]
        groups.append(Group(printable(members[0][1].prompt, _LONGEST_PROMPT), cards, sum(verdicts), len(verdicts)))
    return Gallery(tuple(groups), len(chosen), len(places))


def _card(run: int, rollout: RolloutView, threshold: float | None, allowance: int) -> Card:
    tokens, shown = token_html(rollout, threshold, allowance)
    total = len(rollout.tokens)
    facts = [f"{total} tokens"] if shown == total else [f"the first {shown} of {total} tokens"]
    known = [value for value in rollout.entropy if math.isfinite(value)]
    if known:
        facts.append(f"mean teacher entropy {decimal(sum(known) / len(known))}")
        if threshold is not None:
            facts.append(f"{sum(value > threshold for value in known)} above tau")
    if rollout.truncated:
        facts.append("cut at the length limit")
    verdict, css = {True: ("right", "good"), False: ("wrong", "bad"), None: ("not judged", "muted")}[rollout.correct]
    return Card(run, rollout.round, verdict, css, tuple(facts), tokens)


def token_html(rollout: RolloutView, threshold: float | None, allowance: int) -> tuple[Markup, int]:
    """Render tokens as ``<i class=h3 data-e="entropy logprob">``; also returns how many fit into ``allowance`` bytes.

    The class is upper case if the entropy exceeds the gate: a second sign beside the colour.
    """
    pieces: list[str] = []
    for token, entropy, logprob in zip(rollout.tokens, rollout.entropy, rollout.logprobs, strict=True):
        text = printable(token.replace("\r\n", "\n"), _LONGEST_TOKEN).replace("\n", "↵\n") or "·"
        figures = f"{decimal(entropy, '.2f')} {decimal(logprob, '.2f')}"
        piece = f'<i class={_heat(entropy, threshold)} data-e="{figures}">{escape(text, quote=False)}</i>'
        allowance -= len(piece.encode())
        if allowance < 0:
            break
        pieces.append(piece)
    return Markup("".join(pieces)), len(pieces)


def _heat(entropy: float, threshold: float | None) -> str:
    if not math.isfinite(entropy):
        return "hn"
    letter = "H" if threshold is not None and entropy > threshold else "h"
    return f"{letter}{sum(edge <= entropy for edge in HEAT_EDGES)}"
