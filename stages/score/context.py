"""The teacher's context: a rollout's prompt as the teacher reads it. The response ids that follow are the student's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from eopd.stages.models.teacher_prompts import TeacherPromptSettings, render_teacher_prompt
from eopd.storage.files import canonical_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("prompt_id", "messages", "teacher_prompt", "prompt_token_ids")
"""Columns of the rollout record that a context may be made of."""


def context_name(settings: TeacherPromptSettings) -> str:
    """How contexts were rendered, for the cache's header: canonical JSON."""
    return canonical_json(settings.semantic())


def render_contexts(
    rollouts: pa.Table, settings: TeacherPromptSettings, tokenizer: PreTrainedTokenizerBase, where: str
) -> list[list[int]]:
    """Token ids of each rollout's context.

    Args:
        rollouts: with the columns ``COLUMNS``.
        where: what to call the table in errors.
    Raises:
        ValueError: a prompt, by its id, that has no messages, no column, several messages for template: plain, or
            no tokens at all; a teacher without a chat template.
    """
    if settings.kind == "same":
        contexts: list[list[int]] = rollouts.column("prompt_token_ids").to_pylist()
    else:
        sources = rollouts.column("messages" if settings.kind == "template" else "teacher_prompt").to_pylist()
        rendered: dict[str, list[int]] = {}  # the samples of one prompt share it
        contexts = []
        for prompt_id, source in zip(rollouts.column("prompt_id").to_pylist(), sources, strict=True):
            if source is None:
                missing = "messages" if settings.kind == "template" else "text in the teacher_prompt column"
                raise ValueError(
                    f"{where}: prompt {prompt_id!r} has no {missing}, of which its teacher context is made"
                )
            if source not in rendered:
                rendered[source] = render_teacher_prompt(source, settings, tokenizer, f"{where}: prompt {prompt_id!r}")
            contexts.append(rendered[source])
    for prompt_id, context in zip(rollouts.column("prompt_id").to_pylist(), contexts, strict=True):
        if not context:
            raise ValueError(
                f"{where}: prompt {prompt_id!r} has an empty teacher context, so nothing predicts the first response "
                "token; use a teacher_prompt that writes at least one token"
            )
    return contexts
