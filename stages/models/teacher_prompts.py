"""Settings and rendering of the prompt that the teacher reads. Used by ``score`` and ``align``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import model_validator

from eopd.stages.engines.sampling import derive_seed
from eopd.stages.models.chat_templates import Conversation, refuse_reserved
from eopd.stages.settings import Settings, setting
from eopd.storage.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# -- placeholders -----------------------------------------------------------------------------------------------------

# Placeholders such as ``{{answer}}`` in what the teacher reads. Single braces are text: prompts hold ``\boxed{}``.


OF_PROMPT = ("answer", "solution")
"""Placeholders whose text comes from a column of the prompt source."""

VERDICT = "verdict"
"""A text of the settings that says whether the response is right."""

SIBLING = "right_sibling"
"""A right response of the same round to the same prompt, never the one that is scored."""

RESPONSE = "response"
"""The response that is scored: its token ids, without the stop token at its end."""

JUDGED = (VERDICT, SIBLING)
TEXTS = (*OF_PROMPT, *JUDGED)
"""Placeholders that may stand in any text."""

KNOWN = (*TEXTS, RESPONSE)

_PLACEHOLDER = re.compile(r"\{\{\s*([^{}]*[^{}\s])\s*\}\}")


def names_in(text: str) -> list[str]:
    """Names between double braces, in order."""
    return _PLACEHOLDER.findall(text)


def check(setting: str, text: str, allowed: Sequence[str]) -> None:
    """Raises ValueError for a placeholder that does not exist or cannot stand in this setting."""
    for name in names_in(text):
        if name in allowed:
            continue
        if name in KNOWN:
            raise InputError(
                f"{setting}: {{{{{name}}}}} can stand only in score.teacher_prompt.opening, which takes token ids as "
                "they are",
                setting=setting,
            )
        near = difflib.get_close_matches(name.lower(), KNOWN, n=1, cutoff=0.5)
        hint = f"Did you mean {{{{{near[0]}}}}}?" if near else f"Known: {', '.join(f'{{{{{one}}}}}' for one in KNOWN)}."
        raise InputError(f"{setting}: there is no placeholder {{{{{name}}}}}", setting=setting, remedy=hint)


def fill(text: str, values: Mapping[str, str | None]) -> str:
    """Put values in the place of placeholders, once: a value that looks like a placeholder stays as it is.

    Raises:
        ValueError: a value is missing or blank.
    """

    def value(match: re.Match[str]) -> str:
        text = values.get(match[1])
        if text is None or not text.strip():
            raise InputError(f"the prompt has no {match[1]} for {{{{{match[1]}}}}}")
        return text

    return _PLACEHOLDER.sub(value, text)


def split_at(text: str, name: str) -> list[str]:
    """The texts before, between and after the placeholders of one name."""
    pieces, start = [], 0
    for match in _PLACEHOLDER.finditer(text):
        if match[1] == name:
            pieces.append(text[start : match.start()])
            start = match.end()
    return [*pieces, text[start:]]


def donors(prompts: Sequence[int], seed: int, *path: str | int) -> dict[int, int]:
    """Return another prompt for every prompt, drawn by seed; every prompt is drawn once.

    Raises:
        ValueError: there is no other prompt.
    """
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) == 1:
        raise InputError(
            "score.teacher_prompt.shuffled needs at least two prompts to exchange answers between",
            setting="score.teacher_prompt.shuffled",
        )
    keys = np.random.PCG64(derive_seed(seed, "shuffled", *path)).random_raw(len(distinct))
    order = [distinct[place] for place in np.argsort(keys, kind="stable")]
    return dict(zip(order, [*order[1:], *order[:1]], strict=True))


# -- the prompt as the teacher reads it -------------------------------------------------------------------------------


class VerdictTexts(Settings):
    """Texts for ``{{verdict}}``."""

    right: str = setting(..., "Text for a right response", min_length=1)
    wrong: str = setting(
        ..., "Text for a wrong response, which includes one that was cut at the length limit", min_length=1
    )


class TeacherPromptSettings(Settings):
    """Settings of the teacher's prompt. A bare word is short for ``kind``: ``teacher_prompt: same``."""

    kind: Literal["same", "template", "column"] = setting(
        "same",
        "same: the student's prompt token ids. template: the prompt's messages through a template. column: the text "
        "of the prompt source's teacher_prompt column, through a template.",
    )
    template: Literal["chat", "plain"] = setting(
        "chat", "chat: the teacher's own chat template (a column's text is one user message); plain: text as it is"
    )
    arguments: dict[str, Any] = setting({}, "Arguments of the chat template, such as enable_thinking: false")
    system: str | None = setting(
        None, "System message put before the prompt (chat only); may hold placeholders, as `suffix`"
    )
    suffix: str = setting(
        "",
        "Text put after the prompt (the last user message); may hold {{answer}}, {{solution}}, {{verdict}} and "
        "{{right_sibling}}",
    )
    opening: str = setting(
        "",
        "Text at the beginning of the assistant's turn, before the response that is scored, also with kind: same; may "
        "hold the same placeholders and {{response}}",
    )
    verdicts: VerdictTexts | None = setting(None, "Texts of {{verdict}}, which needs them")
    otherwise: Literal["same", "skip"] = setting(
        "same",
        "A response without a {{right_sibling}}: scored after the prompt as the student reads it (same), or not at all",
    )
    shuffled: bool = setting(
        False,
        "Control: each prompt gets answer, solution, verdicts and right response of another prompt of its part, drawn "
        "by `seed`",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fields_belong_to_the_kind(self) -> TeacherPromptSettings:
        rendered = {name for name in ("arguments", "system", "suffix") if getattr(self, name)}
        if self.kind == "same" and rendered:
            raise InputError(
                f"score.teacher_prompt: {', '.join(sorted(rendered))} has no effect with kind: same, which takes the "
                "student's token ids as they are",
                setting=f"score.teacher_prompt.{min(rendered)}",
                remedy="set kind: template",
            )
        if self.template == "plain" and rendered - {"suffix"}:
            raise InputError(
                "score.teacher_prompt: arguments and system belong to template: chat",
                setting="score.teacher_prompt.template",
            )
        refuse_reserved("score.teacher_prompt.arguments", self.arguments)
        return self

    @model_validator(mode="after")
    def _placeholders_are_known(self) -> TeacherPromptSettings:
        check("score.teacher_prompt.suffix", self.suffix, TEXTS)
        check("score.teacher_prompt.system", self.system or "", TEXTS)
        check("score.teacher_prompt.opening", self.opening, KNOWN)
        if self.shuffled and not set(TEXTS) & set(self.used):
            raise InputError(
                "score.teacher_prompt.shuffled has no effect: neither suffix, system nor opening holds "
                f"{' or '.join(f'{{{{{name}}}}}' for name in TEXTS)}",
                setting="score.teacher_prompt.shuffled",
            )
        return self

    @model_validator(mode="after")
    def _verdicts_are_shown(self) -> TeacherPromptSettings:
        shown = VERDICT in self.used
        if shown and self.verdicts is None:
            raise InputError(
                "score.teacher_prompt shows {{verdict}}",
                setting="score.teacher_prompt.verdicts",
                remedy="set score.teacher_prompt.verdicts {right, wrong}",
            )
        if self.verdicts is not None and not shown:
            raise InputError(
                "score.teacher_prompt.verdicts has no effect: nothing holds {{verdict}}",
                setting="score.teacher_prompt.verdicts",
            )
        for name, text in (self.verdicts.model_dump() if self.verdicts is not None else {}).items():
            if not text.strip() or names_in(text):
                raise InputError(
                    f"score.teacher_prompt.verdicts.{name} must be text without placeholders",
                    setting=f"score.teacher_prompt.verdicts.{name}",
                )
        if self.otherwise != "same" and SIBLING not in self.used:
            raise InputError(
                "score.teacher_prompt.otherwise has no effect: nothing holds {{right_sibling}}",
                setting="score.teacher_prompt.otherwise",
            )
        return self

    @property
    def used(self) -> tuple[str, ...]:
        """Names of the placeholders in these settings."""
        names = names_in(f"{self.suffix} {self.system or ''} {self.opening}")
        return tuple(name for name in KNOWN if name in names)

    @property
    def values_needed(self) -> tuple[str, ...]:
        """Names of the placeholders whose text comes from the prompt source."""
        return tuple(name for name in OF_PROMPT if name in self.used)

    @property
    def judged(self) -> tuple[str, ...]:
        """Names of the placeholders that verdicts decide."""
        return tuple(name for name in JUDGED if name in self.used)

    @property
    def copies(self) -> int:
        """Return how many responses the teacher reads before it scores one."""
        names = names_in(f"{self.suffix} {self.system or ''} {self.opening}")
        return names.count(RESPONSE) + names.count(SIBLING)

    def example(self, of_prompt: Mapping[str, str | None]) -> dict[str, str | None]:
        """Values for people before anything was sampled: a right verdict, and placeholders in place of responses."""
        verdict = {VERDICT: self.verdicts.right} if self.verdicts is not None else {}
        return {**of_prompt, **verdict, SIBLING: f"{{{{{SIBLING}}}}}"}

    def semantic(self) -> dict[str, Any]:
        """Return the keyed settings without unset ones that are newer than the first artifacts, whose keys must
        stay."""
        kept = super().semantic()
        unset = {"opening": "", "verdicts": None, "otherwise": "same", "shuffled": False}
        return {name: value for name, value in kept.items() if name not in unset or value != unset[name]}


@dataclass(frozen=True)
class Context:
    """The teacher's text before a response: token ids, with a copy of the response between each two pieces."""

    pieces: tuple[tuple[int, ...], ...]
    without_sibling: bool = False  # there was no right sibling to show, and the response is read without one
    scored: bool = True

    def length_that_fits(self, response: Sequence[int], stop_ids: Collection[int], limit: int | None) -> int:
        """Return how many of the response's first tokens the teacher can read within ``limit``, with copies cut alike.

        The last token of the response is predicted and never read, so it does not count.
        """
        if not self.scored:
            return 0
        copies, text = len(self.pieces) - 1, sum(map(len, self.pieces))
        copied = len(response) - _ends(response, stop_ids)
        if limit is None or not response or text + copies * copied + len(response) - 1 <= limit:
            return len(response)
        return max(0, min(copied, (limit + 1 - text) // (copies + 1)))

    def ids(self, response: Sequence[int], stop_ids: Collection[int]) -> list[int]:
        """The context of this response, which may be the beginning of a longer one."""
        copied = response[: len(response) - _ends(response, stop_ids)]
        ids = list(self.pieces[0])
        for piece in self.pieces[1:]:
            ids += [*copied, *piece]
        return ids


def _ends(response: Sequence[int], stop_ids: Collection[int]) -> bool:
    return len(response) > 0 and response[-1] in stop_ids


def teacher_context(
    source: str | None,
    own: Sequence[int],
    settings: TeacherPromptSettings,
    tokenizer: PreTrainedTokenizerBase,
    values: Mapping[str, str | None],
    where: str,
    sibling: Sequence[int] = (),
) -> Context:
    """The context of a response.

    Args:
        source: as for ``render_teacher_prompt``; None with kind same.
        own: the prompt as the student reads it.
        values: texts of placeholders.
        sibling: ids of the right sibling, for the opening.
    Raises:
        ValueError: as ``render_teacher_prompt``; a value that is missing or blank.
    """
    if settings.kind == "same":
        before = list(own)
    else:
        if source is None:
            raise InputError(
                f"{where} has no messages, which score.teacher_prompt.kind: {settings.kind} renders",
                setting="score.teacher_prompt.kind",
            )
        before = render_teacher_prompt(source, settings, tokenizer, where, values)
    if not settings.opening:
        return Context((tuple(before),))

    def ids(text: str) -> list[int]:
        filled = fill(text, values)
        return [int(number) for number in tokenizer(filled, add_special_tokens=False)["input_ids"]]

    pieces = []
    try:
        for text in _opening_texts(settings):
            first, *others = split_at(text, SIBLING)
            pieces.append([*ids(first), *(number for other in others for number in (*sibling, *ids(other)))])
    except ValueError as error:
        raise InputError.of(
            error, f"{where}, score.teacher_prompt.opening", setting="score.teacher_prompt.opening"
        ) from error
    pieces[0] = [*before, *pieces[0]]
    return Context(tuple(map(tuple, pieces)))


def _opening_texts(settings: TeacherPromptSettings) -> list[str]:
    return split_at(settings.opening, RESPONSE)


def opening_text(settings: TeacherPromptSettings, values: Mapping[str, str | None]) -> str:
    """The opening for people, with ``{{response}}`` where the response goes. Raises ValueError, as ``fill``."""
    response = f"{{{{{RESPONSE}}}}}"
    return response.join(fill(text, values) for text in _opening_texts(settings))


def render_teacher_prompt(
    source: str,
    settings: TeacherPromptSettings,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    values: Mapping[str, str | None],
) -> list[int]:
    """Token ids of a prompt of kind template (``source``: a conversation as JSON) or column (``source``: text).

    Raises:
        ValueError: what the template cannot write, or leaves out; a teacher without a chat template; a value that is
            missing.
    """
    from eopd.stages.models.tokenizers import render_chat

    try:
        conversation = teacher_conversation(source, settings, values)
        if settings.template == "plain":
            return [int(number) for number in tokenizer(conversation.plain_text())["input_ids"]]
        return render_chat(tokenizer, conversation, settings.arguments)
    except ValueError as error:
        raise InputError.of(error, f"{where}, score.teacher_prompt", setting="score.teacher_prompt") from error


def teacher_conversation(
    source: str, settings: TeacherPromptSettings, values: Mapping[str, str | None]
) -> Conversation:
    """Return the conversation that the teacher reads, before rendering. Raises ValueError, as ``Conversation.prepared``
    and ``fill``."""
    text = Conversation(({"role": "user", "content": source},))
    conversation = Conversation.from_json(source) if settings.kind == "template" else text
    system = None if settings.system is None else fill(settings.system, values)
    return conversation.prepared(system, fill(settings.suffix, values))
