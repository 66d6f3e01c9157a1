"""Rollouts as the report shows them: the first of a round, token by token, judged where that can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from eopd.stages.report.data import RolloutView
from eopd.storage.artifacts import Artifact
from eopd.storage.rollouts import read_rollouts
from eopd.storage.sources import filled_parts
from eopd.storage.teacher_cache import TeacherCache

ROLLOUTS_SHOWN = 12
TOKENIZER = "tokenizer.json"
Judge = Callable[[str, Sequence[tuple[str, str]]], Sequence[bool | None]]
"""Verdicts of (response, reference answer) pairs by the verifier of a name; None where it cannot say."""


def nobody(verifier: str, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """A judge that never says anything."""
    return [None] * len(pairs)


def rollout_views(
    rollouts: Artifact, scores: Artifact, round_: int, tokenizer_folder: str, judge: Judge
) -> list[RolloutView]:
    """The first rollouts of a round."""
    from tokenizers import Tokenizer  # importing transformers for it would cost more than the report

    tokenizer = Tokenizer.from_file(str(Path(tokenizer_folder) / TOKENIZER))
    part = next(iter(filled_parts(scores)), None)
    if part is None:
        return []
    rows = read_rollouts(rollouts.part_folder(part)).slice(0, ROLLOUTS_SHOWN).to_pylist()
    teacher = TeacherCache(scores)
    verdicts: dict[int, bool | None] = {}
    for verifier in {row["verifier"] for row in rows if row["verifier"]}:
        asked = [number for number, row in enumerate(rows) if row["verifier"] == verifier and row["answer"] is not None]
        said = judge(verifier, [(rows[number]["response_text"] or "", rows[number]["answer"]) for number in asked])
        verdicts.update(zip(asked, said, strict=True))
    views = []
    for number, row in enumerate(rows):
        scored = teacher.read([(part, number)])
        ids = row["response_token_ids"][: scored.tokens]
        views.append(
            RolloutView(
                prompt=str(tokenizer.decode(row["prompt_token_ids"], skip_special_tokens=False)),
                tokens=[str(tokenizer.decode([token], skip_special_tokens=False)) for token in ids],
                entropy=scored.entropy.tolist(),
                logprobs=list(row["logprobs"][: scored.tokens]) if row["logprobs"] else [],
                round=round_,
                correct=verdicts.get(number),
                verdict=_word(verdicts.get(number), row["finish_reason"]),
            )
        )
    return views


def _word(correct: bool | None, finish_reason: str) -> str:
    said = {True: "correct", False: "wrong", None: "not judged"}[correct]
    return said if finish_reason == "stop" else f"{said}, cut at the length limit"
