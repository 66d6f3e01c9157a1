"""Conversations, and rendering them through chat templates.

A template may ignore what it does not know: a role, `tool_calls`, `reasoning_content`, a `name`, an argument. Ignored
fields would silently be missing from the prompt, so each field is checked to change the text, and one that does not is
refused; so is a role that is written as the assistant's. ``ChatTemplate`` renders with Jinja alone, so that a plan can
check templates without importing transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eopd.stages.format import error_line
from eopd.storage.errors import InputError

if TYPE_CHECKING:
    import jinja2

Message = dict[str, Any]
Render = Callable[["Conversation"], str]
"""Text of a conversation, ready for the assistant's next token."""

RESERVED = frozenset(
    {
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages"),
        *("padding", "processor_kwargs", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize"),
        *("tokenizer_kwargs", "truncation"),
    }
)
"""Arguments of ``apply_chat_template`` that eopd sets itself, or that would change its result."""

LINKS = frozenset({"id", "tool_call_id", "type"})
"""Fields that join a tool's answer to its call and say nothing else: many templates rightly leave them out."""

NOTHING: tuple[object, ...] = (None, "", [], {})
"""Values that say nothing, so that leaving them out is no loss. Zero and false say something."""

CLOCK = "strftime_now"
"""The function with which templates write today's date; as an argument, a date in ISO format that stands for it."""
SYSTEM = ("system", "developer")
PROBE = "eopd-probe"
PREFIX_END = "eopd-end-of-prefix"
LATER: tuple[Message, ...] = ({"role": "assistant", "content": PROBE}, {"role": "user", "content": PROBE})
"""Messages that may follow any other."""


@dataclass(frozen=True)
class Conversation:
    """Messages and the tools that they may call."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    @classmethod
    def from_json(cls, text: str) -> Conversation:
        """Invert ``to_json``."""
        value = json.loads(text)
        if isinstance(value, dict):
            return cls(tuple(value["messages"]), tuple(value["tools"]))
        return cls(tuple(value))

    def to_json(self) -> str:
        """Return a list of messages; with tools, an object of both."""
        messages = list(self.messages)
        return json.dumps({"messages": messages, "tools": self.tools} if self.tools else messages, ensure_ascii=False)

    @property
    def is_prefilled(self) -> bool:
        """True if the last message is the beginning of the assistant's answer."""
        return self.messages[-1]["role"] == "assistant"

    def shape(self) -> tuple[object, ...]:
        """Return a value that is equal for conversations that a template treats alike: same roles, fields and presence
        of tools."""
        return (bool(self.tools), *((message["role"], *sorted(message)) for message in self.messages))

    def prepared(self, system: str | None, suffix: str) -> Conversation:
        """Return the conversation with a system message before it and a suffix after the last user message.

        Raises:
            ValueError: there is a system message already; there is no user message for the suffix.
        """
        messages = [dict(message) for message in self.messages]
        if suffix:
            users = [message for message in messages if message["role"] == "user"]
            if not users:
                raise InputError("suffix is text after the last user message, and there is none", setting="suffix")
            users[-1]["content"] += suffix
        if system is not None:
            if any(message["role"] in SYSTEM for message in messages):
                raise InputError(
                    "there is a system message already, and `system` would add a second",
                    setting="system",
                    remedy="keep one of them",
                )
            messages.insert(0, {"role": "system", "content": system})
        return Conversation(tuple(messages), self.tools)

    def plain_text(self) -> str:
        """Return the text of a conversation that is one user message.

        Raises:
            ValueError: it is more than that.
        """
        count = len(self.messages)
        if count > 1:
            raise InputError(
                f"it has {count} messages, which template: plain cannot write",
                setting="template",
                remedy="use template: chat",
            )
        beyond = [
            *(name for name in self.messages[0] if name not in ("role", "content")),
            *(["tools"] * bool(self.tools)),
        ]
        if self.messages[0]["role"] != "user" or beyond:
            what = ", ".join(beyond) or f"the role {self.messages[0]['role']!r}"
            raise InputError(f"template: plain cannot write {what}", setting="template", remedy="use template: chat")
        return str(self.messages[0]["content"])


def parse_conversation(value: object, tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    """Parse a conversation as data sets hold it: text (one user message) or a list of messages.

    Fields that are null are absent: a column of a Parquet file has the same fields in every row.

    Raises:
        ValueError: it is neither, or a message that no template could write; says which.
    """
    if isinstance(value, str) and value.strip():
        messages: tuple[Message, ...] = ({"role": "user", "content": value},)
    elif isinstance(value, list) and value:
        messages = tuple(parse_message(item, f"message {number}") for number, item in enumerate(value, start=1))
    else:
        raise InputError(
            f"must hold text or a list of {{role, content}} messages, and not be empty; got {_short(value)}"
        )
    conversation = Conversation(messages, tools)
    try:
        json.dumps([messages, conversation.tools], ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"must hold text and JSON values only: {error}") from error
    if conversation.is_prefilled and messages[-1].get("tool_calls"):
        raise InputError("ends with the assistant's tool calls", remedy="add the tool's answer or a user's message")
    return conversation


def parse_message(item: object, where: str) -> Message:
    """Return a message of a conversation without null fields. Raises InputError, naming ``where``."""
    if not isinstance(item, Mapping) or not isinstance(item.get("role"), str):
        raise InputError(f"{where} must hold text as `role` and `content`, got {_short(item)}")
    message = _without_nulls({"role": item["role"], "content": None, **item})
    if message.get("tool_calls"):
        message.setdefault("content", "")
    content = message.get("content")
    if not isinstance(content, str):
        raise InputError(f"{where}: `content` must be text, got {_short(content)}")
    says_something = content or message.get("tool_calls") or message.get("reasoning_content")
    if message["role"] == "assistant" and not says_something:
        raise InputError(f"{where} is an empty turn of the assistant", remedy="remove it")
    return message


def parse_tools(value: object) -> tuple[dict[str, Any], ...]:
    """Return tools that a value holds as a list of JSON schemas or as the JSON of one. Raises InputError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"is not JSON: {error_line(error)}") from error
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InputError(f"must hold a list of JSON schemas, got {_short(value)}")
    return tuple(_without_nulls(tool) for tool in value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def write_conversation(conversation: Conversation, render: Render) -> str:
    """Render a conversation once it is certain that the template omits nothing.

    Raises:
        ValueError: the template refuses the conversation, or ignores a message, a field, a role or the tools; says
            which.
    """
    text = _rendered(conversation, render)
    for field, changed in _probes(conversation, text):
        if _or_refused(changed, render) == text:
            raise InputError(
                f"the chat template leaves out {field}", remedy="remove it, or use a model whose template writes it"
            )
    for number, message in enumerate(conversation.messages):
        if message["role"] not in ("user", "assistant") and _as_the_assistant_s(conversation, number, render):
            raise InputError(
                f"the chat template leaves out the role {message['role']!r} of message {number + 1}, whose turn it "
                "writes as the assistant's",
                remedy="remove it, or use a model whose template writes it",
            )
    return text


def _or_refused(conversation: Conversation, render: Render) -> str | None:
    """Return the text of a modified conversation, or None if the template refuses it.

    Other errors (of memory, of the code around the template) say nothing about the template, and are raised.
    """
    from jinja2 import TemplateError

    try:
        return render(conversation)
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
        return None


def _as_the_assistant_s(conversation: Conversation, number: int, render: Render) -> bool:
    """True if the template writes a message exactly as it would if the assistant had written it."""
    messages = conversation.messages
    # an assistant's last message would be left open, which changes the text whatever the role is
    after = LATER if number + 1 == len(messages) else ()
    changed = {**messages[number], "role": "assistant"}
    own = _or_refused(Conversation((*messages, *after), conversation.tools), render)
    other = Conversation((*messages[:number], changed, *messages[number + 1 :], *after), conversation.tools)
    return own is not None and own == _or_refused(other, render)


def _rendered(conversation: Conversation, render: Render) -> str:
    try:
        return render(conversation)
    except Exception as error:  # errors of Jinja, or of any expression in a template
        roles = ", ".join(message["role"] for message in conversation.messages)
        raise InputError(
            f"the chat template refuses it ({roles}): {error_line(error)}",
            remedy="change it, or use a model whose template writes it",
        ) from error


def _probes(conversation: Conversation, text: str) -> Iterator[tuple[str, Conversation]]:
    """Yield (field, the conversation without it or with another value), for every field that carries content."""
    messages = conversation.messages
    alone = len(messages) == 1
    for number, message in enumerate(messages):
        where = "" if alone else f" of message {number + 1} ({message['role']})"
        for name, value in message.items():
            if (
                name == "role"
                or name in LINKS
                or value in NOTHING
                or (name == "name" and message["role"] in ("tool", "function"))
            ):
                continue
            if name == "content":
                if alone and value.strip() in text:
                    continue
                changed = {**message, "content": f"{value} {PROBE}"}
            else:
                changed = {field: other for field, other in message.items() if field != name}
            changed_messages = (*messages[:number], changed, *messages[number + 1 :])
            yield f"`{name}`{where}", Conversation(changed_messages, conversation.tools)
    if conversation.tools:
        yield "the tools", Conversation(messages)


def check_arguments(template: ChatTemplate, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument that the template never reads, or that would be given twice."""
    unknown = sorted(set(arguments) - template.variables)
    if unknown:
        near = ", ".join(sorted(template.variables - RESERVED - template.special_tokens.keys())) or "none"
        raise InputError(
            f"the chat template reads no argument {', '.join(unknown)}; it reads: {near}", setting="template_arguments"
        )
    if CLOCK in template.variables and CLOCK not in arguments and _reads_the_clock(template, arguments):
        raise InputError(
            "the chat template writes today's date, so prompts under one artifact key would differ from day to day",
            setting="template_arguments",
            remedy=f'set the date as an argument of the template: {CLOCK}: "2025-07-26"',
        )
    dated(arguments)


def dated(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with the date of ``strftime_now`` as the function that templates call.

    Raises:
        ValueError: it is no date in ISO format.
    """
    if CLOCK not in arguments:
        return dict(arguments)
    try:
        date = datetime.fromisoformat(str(arguments[CLOCK]))
    except ValueError as error:
        raise InputError(
            f'{CLOCK} is {arguments[CLOCK]!r}, and must be a date such as "2025-07-26"',
            setting=f"template_arguments.{CLOCK}",
        ) from error
    return {**arguments, CLOCK: date.strftime}


def _reads_the_clock(template: ChatTemplate, arguments: Mapping[str, Any]) -> bool:
    """True if a message is written differently at two dates."""
    conversation = Conversation(({"role": "user", "content": PROBE},))

    def at(date: str) -> str | None:
        return _or_refused(conversation, lambda what: template.render(what, {**arguments, CLOCK: date}))

    return at("1999-03-04") != at("2031-11-25")


def refuse_reserved(setting: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments of a chat template that users cannot set."""
    reserved = sorted(RESERVED & arguments.keys())
    if reserved:
        raise InputError(
            f"{setting}: {', '.join(reserved)} is set by eopd itself; only variables of the template may stand here",
            setting=setting,
        )


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the special tokens that it may write."""

    source: str
    special_tokens: Mapping[str, str]

    @classmethod
    def of_folder(cls, folder: Path, *, tools: bool = False) -> ChatTemplate:
        """Load the template of a tokenizer's folder, as transformers would choose it.

        Raises:
            ValueError: there is none, or a file of the folder cannot be read.
        """
        config = _read_object(folder / "tokenizer_config.json")
        legacy = _read_object(folder / "special_tokens_map.json")
        tokens = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in {**legacy, **config}.items()
            if name.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))
        }
        templates: dict[str, str] = {}
        stated = config.get("chat_template")
        if isinstance(stated, list):
            templates = {item["name"]: item["template"] for item in stated if isinstance(item, dict)}
        elif isinstance(stated, str):
            templates = {"default": stated}
        files = [*folder.glob("additional_chat_templates/*.jinja"), *folder.glob("chat_template.jinja")]
        for file in files:
            templates["default" if file.name == "chat_template.jinja" else file.stem] = file.read_text(encoding="utf-8")
        source = templates.get("tool_use") if tools else None
        return cls(source or templates.get("default") or _no_template(str(folder)), tokens)

    @classmethod
    def of(cls, tokenizer: Any, *, tools: bool = False) -> ChatTemplate:
        """Return the template of a loaded tokenizer. Raises ValueError if there is none."""
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = (tools and template.get("tool_use")) or template.get("default")
        tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        return cls(template or _no_template(tokenizer.name_or_path), tokens)

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not define."""
        return _variables(self.source)

    def render(self, conversation: Conversation, arguments: Mapping[str, Any]) -> str:
        """Render like ``apply_chat_template`` with a generation prompt, or with the assistant's last message left
        open."""
        messages = deepcopy(list(conversation.messages))
        if conversation.is_prefilled:
            messages[-1]["content"] += PREFIX_END
        text = _compiled(self.source).render(
            messages=messages,
            tools=list(conversation.tools) or None,
            documents=None,
            add_generation_prompt=not conversation.is_prefilled,
            **self.special_tokens,
            **dated(arguments),
        )
        if not conversation.is_prefilled:
            return text
        if PREFIX_END not in text:
            raise ValueError("it does not write the end of the assistant's message, so that cannot be continued")
        return text[: text.rindex(PREFIX_END)]


def _no_template(whose: str) -> str:
    raise InputError(
        f"{whose}: this tokenizer has no chat template",
        setting="template",
        remedy="choose a plain-text template, a column of the prompt source, or a tokenizer that has one",
    )


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag `{% generation %}`, which marks the assistant's text and changes none."""

        tags = {"generation"}  # noqa: RUF012  (as the base class has it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@lru_cache(maxsize=8)
def _variables(source: str) -> frozenset[str]:
    from jinja2 import TemplateSyntaxError, meta

    try:
        names = meta.find_undeclared_variables(_environment().parse(source))
        return frozenset(names) | ({CLOCK} if CLOCK in source else set())  # a global is not among them
    except TemplateSyntaxError as error:
        problem = f"the chat template is no Jinja template (line {error.lineno}): {error.message}"
        raise InputError(problem, setting="template", remedy="mend it in the tokenizer's folder") from error


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        problem = f"{path} is not JSON: {error_line(error)}"
        raise InputError(problem, file=path, remedy="save the tokenizer again") from error
    return value if isinstance(value, dict) else {}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
