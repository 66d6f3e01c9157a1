"""The prompt as the teacher reads it: its settings, and its rendering. Read by ``score`` and by ``evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from eopd.stages.models.chat_templates import Conversation, refuse_reserved
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
        refuse_reserved("score.teacher_prompt.arguments", self.arguments)
        return self


def render_teacher_prompt(
    source: str, settings: TeacherPromptSettings, tokenizer: PreTrainedTokenizerBase, where: str
) -> list[int]:
    """Token ids of a context of kind template (``source``: a conversation as JSON) or column (``source``: text).

    Raises:
        ValueError: what the template cannot write, or leaves out; a teacher without a chat template.
    """
    from eopd.stages.models.tokenizers import render_chat

    try:
        conversation = teacher_conversation(source, settings)
        if settings.template == "plain":
            return [int(number) for number in tokenizer(conversation.plain_text())["input_ids"]]
        return render_chat(tokenizer, conversation, settings.arguments)
    except ValueError as error:
        raise ValueError(f"{where}, score.teacher_prompt: {error}") from error


def teacher_conversation(source: str, settings: TeacherPromptSettings) -> Conversation:
    """What the teacher reads, before it is rendered. Raises ValueError, as ``Conversation.prepared``."""
    text = Conversation(({"role": "user", "content": source},))
    conversation = Conversation.from_json(source) if settings.kind == "template" else text
    return conversation.prepared(settings.system, settings.suffix)
