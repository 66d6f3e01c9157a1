"""The prompt as the teacher reads it: its settings, and its rendering. Read by ``score`` and by ``evaluate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from eopd.stages.settings import Settings, setting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TeacherPromptSettings(Settings):
    """How the teacher reads a prompt. A bare word is short for ``kind``: ``teacher_prompt: same``."""

    kind: Literal["same", "template", "column"] = setting(
        "same",
        "same: the student's prompt token ids. template: the prompt's messages through a template. column: the text "
        "of the prompt source's teacher_prompt column, through a template.",
    )
    template: Literal["chat", "plain"] = setting(
        "chat", "chat: the teacher's own chat template (a column's text is one user message); plain: text as it is"
    )
    arguments: dict[str, Any] = setting({}, "Arguments of the chat template, such as enable_thinking: false")
    system: str | None = setting(None, "System message put before the prompt (chat only)")
    suffix: str = setting("", "Text put after the prompt (the last user message)")

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fields_belong_to_the_kind(self) -> TeacherPromptSettings:
        rendered = {name for name in ("arguments", "system", "suffix") if getattr(self, name)}
        if self.kind == "same" and rendered:
            raise ValueError(
                f"score.teacher_prompt: {', '.join(sorted(rendered))} has no effect with kind: same, which takes the "
                "student's token ids as they are; set kind: template"
            )
        if self.template == "plain" and rendered - {"suffix"}:
            raise ValueError("score.teacher_prompt: arguments and system belong to template: chat")
        return self


def render_teacher_prompt(
    source: str, settings: TeacherPromptSettings, tokenizer: PreTrainedTokenizerBase, where: str
) -> list[int]:
    """Token ids of a context of kind template (``source``: messages as JSON) or column (``source``: text).

    Raises:
        ValueError: several messages for template: plain; a teacher without a chat template.
    """
    from eopd.stages.models.tokenizers import render_chat

    messages: list[dict[str, str]] = [{"role": "user", "content": source}]
    if settings.kind == "template":
        messages = json.loads(source)
    if settings.template == "plain":
        return _plain(messages, settings.suffix, tokenizer, where)
    messages[-1]["content"] += settings.suffix
    if settings.system is not None:
        messages.insert(0, {"role": "system", "content": settings.system})
    return render_chat(tokenizer, messages, settings.arguments)


def _plain(
    messages: Sequence[dict[str, str]], suffix: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> list[int]:
    if len(messages) != 1:
        raise ValueError(
            f"{where} has {len(messages)} messages, which score.teacher_prompt.template: plain cannot write as one "
            "text; use template: chat"
        )
    return [int(number) for number in tokenizer(messages[0]["content"] + suffix)["input_ids"]]
