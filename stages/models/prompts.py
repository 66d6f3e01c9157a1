"""Prompts: their sources, their rendering for the student, and the draw of each round.

A source is a JSONL file, a Parquet file or a folder saved with ``datasets``' ``save_to_disk``. Settings are parsed
before anything heavy is imported: this module needs neither torch nor transformers until it renders.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import numpy as np
from pydantic import model_validator

from eopd.stages.engines.sampling import derive_seed
from eopd.stages.models import prompt_sources
from eopd.stages.models.chat_templates import (
    Conversation,
    Message,
    parse_conversation,
    parse_message,
    parse_tools,
    refuse_reserved,
)
from eopd.stages.settings import COUNT, LENGTH, Settings, setting
from eopd.storage.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Value = bool | int | float | str
"""Values by which rows of a source can be selected."""
NOT_TRAINED = -100
"""The label of a token that is not trained on."""
VerifierName = Literal["countdown", "exact", "math"]


class Columns(Settings):
    """Column names of a source. Dots lead into a column of structs: ``reward_model.ground_truth``."""

    prompt: str = setting(
        "prompt", "The prompt: text (one user message), a list of {role, content} messages, or token ids"
    )
    id: str | None = setting(None, "A unique id (null: the row's number)")
    answer: str | None = setting(None, "Reference answer, for verifiers: text, or a number, which is read as it stands")
    solution: str | None = setting(
        None, "Worked solution, which `score.teacher_prompt` may show to the teacher as {{solution}}: text", keyed=False
    )
    teacher_prompt: str | None = setting(None, "The prompt as the teacher reads it, where that differs: text")
    teacher: str | None = setting(
        None, "The name of the prompt's teacher, if `teachers` names several: text", keyed=False
    )
    tools: str | None = setting(None, "Tools that the chat template may offer: a list of JSON schemas, or that as text")
    response: str | None = setting(
        None,
        "A response to the prompt, for rollout.source: data: text, token ids, or the column of `prompt` itself, whose "
        "last message it then is, or the token ids that `labels` names",
    )
    labels: str | None = setting(
        None,
        "If one column holds the token ids of `prompt` and `response`: -100 for tokens of the prompt, and the ids of "
        "the response. None: all tokens but the first are the response",
    )

    @model_validator(mode="after")
    def _labels_divide_a_sequence(self) -> Columns:
        if self.labels is not None and self.response != self.prompt:
            raise InputError(
                f"labels divides token ids into prompt and response, which are in the columns {self.prompt} and "
                f"{self.response}",
                setting="labels",
                remedy="name one column for both, or remove labels",
            )
        return self

    def semantic(self) -> dict[str, Any]:
        """Leave unset fields out that were added after the first artifacts, whose keys must stay."""
        kept = super().semantic()
        return {
            name: value
            for name, value in kept.items()
            if value is not None or name not in ("tools", "response", "labels")
        }


class PromptSettings(Settings):
    """A prompt source and how the student reads its prompts."""

    path: str = setting(
        ..., "JSONL file, Parquet file, or folder saved with datasets' save_to_disk (known by content)", keyed=False
    )
    split: str | None = setting(None, "Split of a folder that holds several")
    limit: int | None = setting(None, "Use the first rows only (null: all)", ge=1, le=COUNT)
    columns: Columns = setting(Columns, "Which column holds what")
    verifier: VerifierName | None = setting(
        None, "Who judges answers to these prompts: in the report, and for `train.select.verdict`"
    )
    template: Literal["chat", "plain"] = setting(
        "chat", "chat: the tokenizer's chat template; plain: the text and the suffix, as base models are prompted"
    )
    template_arguments: dict[str, Any] = setting({}, "Arguments of the chat template, such as enable_thinking: false")
    system: str | None = setting(None, "System message put before the prompt (chat only)")
    suffix: str = setting("", "Text put after the prompt (the last user message)")
    max_prompt_tokens: int = setting(1024, "Longest prompt as the student reads it, tokens", ge=1, le=LENGTH)
    too_long: Literal["skip", "refuse"] = setting("skip", "A longer prompt is skipped and counted, or refused")

    @model_validator(mode="after")
    def _plain_has_no_chat_arguments(self) -> PromptSettings:
        if self.template == "plain" and (self.system is not None or self.template_arguments):
            raise InputError(
                "system and template_arguments belong to template: chat",
                setting="system",
                remedy="with template: plain write what you need into the prompt or the suffix",
            )
        refuse_reserved("template_arguments", self.template_arguments)
        if self.columns.tools is not None and "tools" in self.template_arguments:
            raise InputError(
                "columns.tools and template_arguments.tools would both say which tools there are",
                setting="columns.tools",
            )
        return self


Response = str | tuple[int, ...] | Message
"""A response that comes with its prompt: text, token ids, or a message of the assistant."""


@dataclass(frozen=True)
class Prompt:
    """One row of a source."""

    index: int  # row of the source, from 0
    id: str
    conversation: Conversation
    answer: str | None
    teacher_prompt: str | None
    solution: str | None
    response: Response | None = None
    token_ids: tuple[int, ...] | None = None  # the prompt itself, if it came as token ids: there are no messages then

    def value(self, name: str) -> str | None:
        """The text of a placeholder of the prompt (``placeholders.OF_PROMPT``)."""
        return {"answer": self.answer, "solution": self.solution}[name]

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.conversation.messages

    @property
    def messages_json(self) -> str | None:
        """Return the conversation as the rollout record stores it; None if the prompt came as token ids."""
        return None if self.token_ids is not None else self.conversation.to_json()


class PromptTable:
    """All prompts of a source, in order."""

    def __init__(self, prompts: Sequence[Prompt], path: str) -> None:
        self._prompts, self._path = list(prompts), path

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self._prompts[index]

    def rows(self, indices: Sequence[int]) -> list[Prompt]:
        """Return rows by number. Raises InputError for a row that the source does not have."""
        for index in indices:
            if not 0 <= index < len(self._prompts):
                problem = f"prompt {index} is asked for, and it has {len(self._prompts)}: it changed meanwhile"
                raise InputError(problem, file=self._path, remedy="plan the run again")
        return [self._prompts[index] for index in indices]


def load_prompts(settings: PromptSettings) -> PromptTable:
    """Read and check a whole source; cached for processes that do several rounds.

    Raises:
        ValueError: no such source, no rows, a malformed line (by number), a missing or empty column (by row, with
            the columns there are), or an id that occurs twice.
    """
    return _load(settings.model_dump_json(), prompt_sources.stamp(Path(settings.path), settings.split))


@lru_cache(maxsize=4)
def _load(settings_json: str, _: prompt_sources.Stamp) -> PromptTable:
    settings = PromptSettings.model_validate_json(settings_json)
    names = [name for name in settings.columns.model_dump().values() if name is not None]
    prompts: list[Prompt] = []
    first_seen: dict[str, str] = {}
    for row in _rows(settings, names):
        prompt = _prompt(row, len(prompts), settings.columns)
        if prompt.id in first_seen:
            raise InputError(
                f"id {prompt.id!r} is already that of {first_seen[prompt.id]}; ids must be unique "
                "(columns.id: null numbers the rows)",
                prompt=prompt.id,
                **row.place,
            )
        first_seen[prompt.id] = row.where
        prompts.append(prompt)
    if not prompts:
        raise InputError("there are no prompts in it", file=settings.path)
    return PromptTable(prompts, settings.path)


def _rows(settings: PromptSettings, columns: Sequence[str]) -> Iterator[prompt_sources.Row]:
    try:
        yield from prompt_sources.read(Path(settings.path), settings.split, columns, settings.limit)
    except prompt_sources.NoColumn as error:
        raise InputError.of(error, remedy="Map them with columns.") from error


def rows_where(settings: PromptSettings, where: Mapping[str, Sequence[Value]]) -> frozenset[int]:
    """Find the rows of a source that hold one of the given values in each of the given columns.

    Raises:
        ValueError: a column that the source does not have, or that holds lists or structs; a value that no row has.
    """
    stamp = prompt_sources.stamp(Path(settings.path), settings.split)
    selected: list[frozenset[int]] = []
    for column, values in where.items():
        rows = _rows_by_value(settings.model_dump_json(), column, stamp)
        for value in values:
            if (type(value) is bool, value) not in rows:
                there = {json.dumps(known): json.dumps(known) for _, known in rows}
                near = difflib.get_close_matches(json.dumps(value), there, n=1, cutoff=0.5)
                hint = f"; the nearest value is {near[0]}" if near else ""
                problem = f"{column}: no prompt of {settings.path} has the value {json.dumps(value)}{hint}"
                raise InputError(problem, file=settings.path)
        selected.append(frozenset().union(*(rows[type(value) is bool, value] for value in values)))
    return frozenset.intersection(*selected)


def rows_by_teacher(settings: PromptSettings, names: Collection[str]) -> dict[str, frozenset[int]]:
    """Find the rows of each teacher's prompts, by the column that names it.

    Raises:
        ValueError: a prompt, by its row and id, whose teacher is none of ``names``; a teacher without prompts.
    """
    column, id_column = settings.columns.teacher, settings.columns.id
    assert column is not None, "prompts without such a column are refused"
    rows: dict[str, list[int]] = {name: [] for name in names}
    for number, row in enumerate(_rows(settings, [column, *([id_column] if id_column else [])])):
        name = row.values[column]
        if not isinstance(name, str) or name not in rows:
            prompt = str(number) if id_column is None else _text(row, id_column)
            raise InputError(
                f"it has the teacher {json.dumps(name, default=str)} (column {column!r}), and teachers names "
                f"{', '.join(rows)}",
                prompt=prompt,
                **row.place,
            )
        rows[name].append(number)
    idle = next((name for name, numbers in rows.items() if not numbers), None)
    if idle is not None:
        problem = f"no prompt of {settings.path} has the teacher {idle!r} (column {column!r})"
        raise InputError(problem, setting=f"teachers.{idle}", file=settings.path, remedy="remove it")
    return {name: frozenset(numbers) for name, numbers in rows.items()}


@lru_cache(maxsize=8)
def _rows_by_value(
    settings_json: str, column: str, _: prompt_sources.Stamp
) -> dict[tuple[bool, Value], frozenset[int]]:
    """Group the rows of a source by their value in a column. Keys tell true from 1, which are equal in Python."""
    settings = PromptSettings.model_validate_json(settings_json)
    by_value: dict[tuple[bool, Value], list[int]] = {}
    source = prompt_sources.read(Path(settings.path), settings.split, [column], settings.limit)
    for number, row in enumerate(source):
        value = row.values[column]
        if value is None:
            continue
        if not isinstance(value, (bool, int, float, str)):
            kind = type(value).__name__
            raise row.refusal(column, f"holds {kind}; rows are selected by text, numbers, or true and false")
        by_value.setdefault((type(value) is bool, value), []).append(number)
    return {key: frozenset(rows) for key, rows in by_value.items()}


def count_prompts(settings: PromptSettings) -> int:
    """Count the prompts of a source without reading them. Raises ValueError if there are none."""
    count = prompt_sources.count(Path(settings.path), settings.split)
    if count == 0:
        raise InputError("there are no prompts in it", file=settings.path)
    return min(count, settings.limit or count)


def source_files(settings: PromptSettings) -> list[Path]:
    """List the files whose content is the source's identity, in a fixed order. Raises ValueError if there are none."""
    return prompt_sources.files(Path(settings.path), settings.split)


def holds_conversations(settings: PromptSettings) -> bool:
    """True if the prompts are lists of messages, judging by the first row. Raises ValueError, as ``load_prompts``."""
    return prompt_sources.holds_conversations(Path(settings.path), settings.split, settings.columns.prompt)


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, settings: PromptSettings) -> list[int]:
    """Render a prompt to token ids as the student reads it. Its length is not checked here.

    Raises:
        ValueError: what the template cannot write, or leaves out; template chat without a chat template; token ids that
            the tokenizer does not know, or to which text is to be added; a prompt without tokens.
    """
    from eopd.stages.models.tokenizers import render_chat

    try:
        ids = given_ids(prompt, settings)
        if ids is not None:
            unknown = next((token for token in ids if not 0 <= token < len(tokenizer)), None)
            if unknown is not None:
                raise InputError(f"it holds the id {unknown}, and the student's tokenizer has {len(tokenizer)}")
            return list(ids)
        conversation = student_conversation(prompt, settings)
        if settings.template == "plain":
            rendered = [int(token) for token in tokenizer(conversation.plain_text())["input_ids"]]
        else:
            rendered = render_chat(tokenizer, conversation, settings.template_arguments)
        if not rendered:
            raise InputError("it has no tokens: nothing can follow it")
        return rendered
    except ValueError as error:
        raise InputError.of(error, prompt=prompt.id, file=settings.path) from error


def given_ids(prompt: Prompt, settings: PromptSettings) -> tuple[int, ...] | None:
    """Return the token ids that a prompt came as; None if it is text or messages.

    Raises:
        ValueError: text is to be added to token ids.
    """
    added = [name for name in ("system", "suffix", "template_arguments") if getattr(settings, name)]
    if prompt.token_ids is not None and added:
        problem = f"it is token ids, to which {' and '.join(added)} cannot be added"
        raise InputError(problem, setting=f"prompts.{added[0]}", remedy="remove the setting")
    return prompt.token_ids


def student_conversation(prompt: Prompt, settings: PromptSettings) -> Conversation:
    """Return the conversation that the student reads, before rendering. Raises ValueError, as
    ``Conversation.prepared``."""
    return prompt.conversation.prepared(settings.system, settings.suffix)


def draw_prompts(count: int, per_round: int, round_number: int, seed: int) -> list[int]:
    """Draw the prompts of one round: ``per_round`` consecutive entries of an endless shuffled deck.

    The deck is one permutation of all rows after another, each with its own shuffle, so that no prompt comes twice
    before all have come once. A round across two of them, or larger than the source, can hold a prompt twice.

    Args:
        count: prompts of the source.
        round_number: from 0.
    """
    assert count > 0, count
    assert per_round > 0, per_round
    assert round_number >= 0, round_number
    start = round_number * per_round
    drawn: list[int] = []
    for epoch in range(start // count, (start + per_round - 1) // count + 1):
        first = max(start - epoch * count, 0)
        last = min(start + per_round - epoch * count, count)
        drawn.extend(_permutation(count, derive_seed(seed, "prompts", epoch))[first:last].tolist())
    return drawn


@lru_cache(maxsize=2)  # a round lies in one epoch or two, and the next one goes on where it ended
def _permutation(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    # a bit generator's raw stream is fixed for ever; numpy's shuffles and permutations are not
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def _prompt(row: prompt_sources.Row, index: int, columns: Columns) -> Prompt:
    with row.refusing(str(columns.tools)):
        tools = () if columns.tools is None else parse_tools(row.values[columns.tools])
    value = row.values[columns.prompt]
    response: Response | None = None
    token_ids: tuple[int, ...] | None = None
    conversation = Conversation(())
    with row.refusing(columns.prompt):
        if _are_ids(value):
            token_ids = tuple(value)
            if columns.response == columns.prompt:
                token_ids, response = _split(token_ids, None if columns.labels is None else row.values[columns.labels])
        else:
            if columns.labels is not None:
                raise InputError(f"must hold token ids, which the column {columns.labels!r} divides")
            if columns.response == columns.prompt:
                value, response = _last_turn(value)
            conversation = parse_conversation(value, tools)
    if columns.response not in (None, columns.prompt):
        response = _response(row, str(columns.response))
    teacher_prompt = None if columns.teacher_prompt is None else row.values[columns.teacher_prompt]
    if columns.teacher_prompt is not None and not isinstance(teacher_prompt, str):
        raise row.refusal(columns.teacher_prompt, f"must hold text, got {repr(teacher_prompt)[:80]}")
    name = str(index) if columns.id is None else _text(row, columns.id)
    return Prompt(
        index=index,
        id=name,
        conversation=conversation,
        answer=None if columns.answer is None else _text(row, columns.answer, f", and prompt {name!r} needs an answer"),
        teacher_prompt=None if columns.teacher_prompt is None else _text(row, columns.teacher_prompt),
        solution=None if columns.solution is None else _text(row, columns.solution),
        response=response,
        token_ids=token_ids,
    )


def _are_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) > 0 and all(type(item) is int for item in value)


def _split(ids: tuple[int, ...], labels: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Divide a sequence into prompt and response.

    Raises:
        InputError: the labels are no labels of these ids, or not those of one response after a prompt.
    """
    if labels is None:
        labels = [NOT_TRAINED, *ids[1:]]
    if not _are_ids(labels) or len(labels) != len(ids):
        raise InputError(f"holds {len(ids)} token ids, and labels must hold as many ids or {NOT_TRAINED}")
    trained = [place for place, label in enumerate(labels) if label != NOT_TRAINED]
    if not trained:
        raise InputError(f"has no response: its labels are all {NOT_TRAINED}, or it is one token")
    start, stop = trained[0], trained[-1] + 1
    other = next((place for place in trained if labels[place] != ids[place]), None)
    if other is not None:
        raise InputError(f"has the id {ids[other]} as token {other}, and labels has {labels[other]}")
    if start == 0:
        raise InputError("has no prompt: its labels begin with the first token, which nothing predicts")
    if len(trained) < stop - start:
        hole = next(place for place in range(start, stop) if labels[place] == NOT_TRAINED)
        problem = f"has several responses: labels leaves out token {hole}, between tokens to train on"
        raise InputError(problem, remedy="split the row there")
    return ids[:start], ids[start:stop]


def _last_turn(value: object) -> tuple[list[object], Message]:
    """Return the messages before the last one, and the last one, which is the assistant's. Raises InputError."""
    if not isinstance(value, list) or len(value) < 2:
        raise InputError("must hold a list of messages, of which the last is the response")
    last = parse_message(value[-1], f"message {len(value)}")
    if last["role"] != "assistant":
        raise InputError(f"ends with a message of the {last['role']}, and the response must be the assistant's")
    return value[:-1], last


def _response(row: prompt_sources.Row, column: str) -> Response:
    """A response as text or token ids."""
    value = row.values[column]
    if isinstance(value, str) and value.strip():
        return _text(row, column)
    if _are_ids(value):
        return tuple(value)
    if isinstance(value, dict):
        with row.refusing(column, "holds a message: "):
            message = parse_message({"role": "assistant", **value}, "the response")
        if message["role"] == "assistant":
            return message
    kinds = "text, a list of token ids, or a message of the assistant"
    raise row.refusal(column, f"must hold a response: {kinds}; got {repr(value)[:80]}")


def _text(row: prompt_sources.Row, column: str, which: str = "") -> str:
    """Return a value that is text, or a number that reads the same. ``which`` ends the message of an empty one."""
    value = row.values[column]
    if value is None:
        raise row.refusal(column, f"is empty{which}")
    if isinstance(value, dict):
        fields = ", ".join(f"{column}.{name}" for name in value)
        raise row.refusal(column, "holds a struct", f"name one of its fields: {fields}")
    if isinstance(value, list):
        raise row.refusal(column, "holds a list, and text or a number is read", f"name an item: {column}.0")
    if isinstance(value, (float, Decimal)) and not math.isfinite(value):
        raise row.refusal(column, f"is {value}, which is no value")
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, Decimal):
        return format(value, "f")
    if not isinstance(value, str):
        raise row.refusal(column, f"must hold text or a number, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise row.refusal(column, f"is no text: {error.reason} at character {error.start}") from error
    return value
