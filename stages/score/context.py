"""The teacher's context: a rollout's prompt as the teacher reads it. The student's response ids follow it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa

from eopd.stages.models.prompts import PromptSettings, load_prompts
from eopd.stages.models.teacher_prompts import SIBLING, VERDICT, Context, TeacherPromptSettings, donors, teacher_context
from eopd.storage.errors import InputError
from eopd.storage.files import canonical_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = (
    *("prompt_id", "prompt_index", "sample", "messages", "answer", "teacher_prompt"),
    *("prompt_token_ids", "response_token_ids"),
)
"""Columns of the rollout record that a context may be made of."""


def context_name(settings: TeacherPromptSettings) -> str:
    """Return how contexts were rendered, for the cache's header: canonical JSON."""
    used = {"placeholders": list(settings.used)} if settings.used else {}
    return canonical_json({**settings.semantic(), **used})


@dataclass(frozen=True)
class Sources:
    """Sources of the placeholders' values, besides the rollouts."""

    prompts: PromptSettings | None = None  # the prompt source, which holds the solutions
    correct: Sequence[bool] = ()  # verdicts on the rollouts
    stop_ids: Collection[int] = ()
    shuffle: tuple[int, ...] = ()  # a seed and a path below it, for ``shuffled``


@dataclass(frozen=True)
class _Shown:
    """The values that the teacher is shown of one rollout, besides its prompt."""

    values: dict[str, str | None] = field(default_factory=dict)
    sibling: tuple[int, ...] = ()
    lacks_sibling: bool = False


def render_contexts(
    rollouts: pa.Table,
    settings: TeacherPromptSettings,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    sources: Sources | None = None,
) -> list[Context]:
    """Render the context of each rollout.

    Args:
        rollouts: with the columns ``COLUMNS``.
        where: what to call the table in errors.
    Raises:
        ValueError: a prompt, by its id, that has no messages, no column, no answer or solution that the context shows,
            several messages for template: plain, or no tokens at all; a teacher without a chat template.
    """
    shown = _shown(rollouts, settings, tokenizer, where, sources or Sources())
    name = {"same": None, "template": "messages", "column": "teacher_prompt"}[settings.kind]
    texts = [None] * len(rollouts) if name is None else rollouts.column(name).to_pylist()
    ids = rollouts.column("prompt_token_ids").to_pylist()
    rendered: dict[object, Context] = {}  # the samples of one prompt often share it
    contexts = []
    for prompt_id, source, own, seen in zip(rollouts.column("prompt_id").to_pylist(), texts, ids, shown, strict=True):
        if seen.lacks_sibling:
            contexts.append(Context((tuple(own),), without_sibling=True, scored=settings.otherwise == "same"))
            continue
        if source is None and name is not None:
            missing = "messages" if name == "messages" else "text in the teacher_prompt column"
            raise InputError(
                f"{where}: prompt {prompt_id!r} has no {missing}, of which its teacher context is made",
                setting="score.teacher_prompt",
                prompt=prompt_id,
            )
        key = (source, tuple(own) if name is None else None, seen.sibling, *seen.values.values())
        if key not in rendered:
            place = f"{where}: prompt {prompt_id!r}"
            try:
                context = teacher_context(source, own, settings, tokenizer, seen.values, place, seen.sibling)
            except InputError as error:
                raise InputError.of(error, prompt=prompt_id) from error
            if not context.ids((), ()):
                raise InputError(
                    f"{where}: prompt {prompt_id!r} has an empty teacher context, so nothing predicts the first "
                    "response token",
                    setting="score.teacher_prompt",
                    prompt=prompt_id,
                    remedy="use a teacher_prompt that writes at least one token",
                )
            rendered[key] = context
        contexts.append(rendered[key])
    return contexts


def _shown(
    rollouts: pa.Table,
    settings: TeacherPromptSettings,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    sources: Sources,
) -> list[_Shown]:
    """Return the values shown with each rollout; with ``shuffled``, those of rollouts to another prompt."""
    if not {*settings.values_needed, *settings.judged} or not len(rollouts):
        return [_Shown()] * len(rollouts)
    prompts: list[int] = rollouts.column("prompt_index").to_pylist()
    try:
        whose = donors(prompts, *sources.shuffle) if settings.shuffled else {prompt: prompt for prompt in prompts}
    except ValueError as error:
        raise InputError.of(error, where, remedy="raise rollout.rows_per_part") from error
    of_prompt = _of_prompts(rollouts, settings, prompts, where, sources)
    shown = [_Shown(dict(of_prompt.get(whose[prompt], {}))) for prompt in prompts]
    if not settings.judged:
        return shown
    samples, responses = (rollouts.column(name).to_pylist() for name in ("sample", "response_token_ids"))
    rows_of: dict[int, list[int]] = defaultdict(list)  # rows of a prompt's responses, by sample
    for row in sorted(range(len(prompts)), key=lambda row: (samples[row], row)):
        rows_of[prompts[row]].append(row)
    for row, prompt in enumerate(prompts):
        others = rows_of[whose[prompt]]
        values, sibling = shown[row].values, ()
        if settings.verdicts is not None:
            judged = others[rows_of[prompt].index(row) % len(others)]
            values[VERDICT] = settings.verdicts.right if sources.correct[judged] else settings.verdicts.wrong
        if SIBLING in settings.judged:
            right = next(
                (other for other in others if sources.correct[other] and other != row and responses[other]), None
            )
            if right is None:
                shown[row] = _Shown(lacks_sibling=True)
                continue
            ids = responses[right]
            sibling = tuple(ids[:-1] if ids[-1] in sources.stop_ids else ids)
            values[SIBLING] = str(tokenizer.decode(list(sibling), skip_special_tokens=True))
        shown[row] = _Shown(values, sibling)
    return shown


def _of_prompts(
    rollouts: pa.Table, settings: TeacherPromptSettings, prompts: list[int], where: str, sources: Sources
) -> dict[int, dict[str, str | None]]:
    """Return answer and solution of every prompt, as far as they are shown."""
    by_prompt: dict[int, dict[str, str | None]] = defaultdict(dict)
    if "solution" in settings.values_needed:
        assert sources.prompts is not None, where
        for prompt in load_prompts(sources.prompts).rows(list(dict.fromkeys(prompts))):
            by_prompt[prompt.index]["solution"] = prompt.solution
    if "answer" in settings.values_needed:
        for row, answer in zip(prompts, rollouts.column("answer").to_pylist(), strict=True):
            by_prompt[row]["answer"] = answer
    return by_prompt
