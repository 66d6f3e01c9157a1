"""The teacher's context: a rollout's prompt as the teacher reads it. The response ids that follow are the student's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from eopd.stages.models.placeholders import donors
from eopd.stages.models.prompts import PromptSettings, load_prompts
from eopd.stages.models.teacher_prompts import Context, TeacherPromptSettings, teacher_context
from eopd.storage.files import canonical_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("prompt_id", "prompt_index", "messages", "answer", "teacher_prompt", "prompt_token_ids")
"""Columns of the rollout record that a context may be made of."""


def context_name(settings: TeacherPromptSettings) -> str:
    """How contexts were rendered, for the cache's header: canonical JSON."""
    used = {"placeholders": list(settings.used)} if settings.used else {}
    return canonical_json({**settings.semantic(), **used})


def render_contexts(
    rollouts: pa.Table,
    settings: TeacherPromptSettings,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    prompts: PromptSettings | None = None,
    shuffle: tuple[int, ...] = (),
) -> list[Context]:
    """The context of each rollout.

    Args:
        rollouts: with the columns ``COLUMNS``.
        where: what to call the table in errors.
        prompts: the prompt source, which holds the solutions.
        shuffle: a seed and a path below it, for ``shuffled``.
    Raises:
        ValueError: a prompt, by its id, that has no messages, no column, no answer or solution that the context shows,
            several messages for template: plain, or no tokens at all; a teacher without a chat template.
    """
    values = _values(rollouts, settings, where, prompts, shuffle)
    name = {"same": None, "template": "messages", "column": "teacher_prompt"}[settings.kind]
    sources = [None] * len(rollouts) if name is None else rollouts.column(name).to_pylist()
    ids = rollouts.column("prompt_token_ids").to_pylist()
    rendered: dict[object, Context] = {}  # the samples of one prompt share it
    contexts = []
    for row, (prompt_id, source, own) in enumerate(
        zip(rollouts.column("prompt_id").to_pylist(), sources, ids, strict=True)
    ):
        if source is None and name is not None:
            missing = "messages" if name == "messages" else "text in the teacher_prompt column"
            raise ValueError(f"{where}: prompt {prompt_id!r} has no {missing}, of which its teacher context is made")
        shown = values[row]
        key = (source, tuple(own) if name is None else None, *shown.values())
        if key not in rendered:
            context = teacher_context(source, own, settings, tokenizer, shown, f"{where}: prompt {prompt_id!r}")
            if not context.ids((), ()):
                raise ValueError(
                    f"{where}: prompt {prompt_id!r} has an empty teacher context, so nothing predicts the first "
                    "response token; use a teacher_prompt that writes at least one token"
                )
            rendered[key] = context
        contexts.append(rendered[key])
    return contexts


def _values(
    rollouts: pa.Table,
    settings: TeacherPromptSettings,
    where: str,
    prompts: PromptSettings | None,
    shuffle: tuple[int, ...],
) -> list[dict[str, str | None]]:
    """Texts of the placeholders, of each rollout."""
    needed = settings.values_needed
    if not needed or not len(rollouts):
        return [{}] * len(rollouts)
    rows = rollouts.column("prompt_index").to_pylist()
    of_prompt: dict[int, dict[str, str | None]] = {}
    if "solution" in needed:
        assert prompts is not None, where
        found = load_prompts(prompts).rows(list(dict.fromkeys(rows)))
        of_prompt = {prompt.index: {"solution": prompt.solution} for prompt in found}
    if "answer" in needed:
        for row, answer in zip(rows, rollouts.column("answer").to_pylist(), strict=True):
            of_prompt.setdefault(row, {})["answer"] = answer
    if settings.shuffled:
        try:
            whose = donors(rows, *shuffle)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; raise rollout.rows_per_part") from error
        return [of_prompt[whose[row]] for row in rows]
    return [of_prompt[row] for row in rows]
