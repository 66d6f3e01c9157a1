"""Conversations as data sets hold them, and templates that take, refuse or ignore parts of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eopd.stages.models.chat_templates import ChatTemplate, Conversation, check_arguments, parse_conversation
from eopd.stages.models.prompts import PromptSettings, load_prompts, render_prompt
from eopd.stages.models.teacher_prompts import TeacherPromptSettings, render_teacher_prompt
from eopd.storage.errors import InputError
from tests.raises import raises
from tests.stages.tiny_tokenizer import tiny_tokenizer

CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
USER: dict[str, Any] = {"role": "user", "content": "1+2?"}
TOOLS = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "name": "add", "tool_call_id": "c1"},
]
PREFILL = [USER, {"role": "assistant", "content": "Let me add: "}]
SYSTEM = [{"role": "system", "content": "Be brief"}, USER]

WHOLE = (
    "{{ bos_token }}{% if tools %}[{{ tools | tojson }}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}{% if m.name and m.role == 'user' %} {{ m.name }}{% endif %}>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}"
    "</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}--{% endif %}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
KNOWN_ROLES = "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<{{ m.content }}>{% endif %}{% endfor %}"
TWO_ROLES = (
    "{% for m in messages %}<{% if m.role == 'user' %}user{% else %}assistant{% endif %}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
IF_TRUE = PLAIN.replace("{{ m.content }}", "{% if m.weight %}{{ m.weight }}{% endif %}{{ m.content }}")
TRIMS = PLAIN.replace("m.content", "m.content | trim")


def text_of(
    template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **changes: Any
) -> str:
    """What the student reads of one prompt, through a source, a tokenizer and back."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    settings = PromptSettings(path="here.jsonl", **changes)
    prompt = load_prompts_of([{"prompt": messages, "tools": tools}], columns={"tools": "tools"})
    return str(tokenizer.decode(render_prompt(tokenizer, prompt, settings)))


def load_prompts_of(rows: list[dict[str, Any]], **settings: Any) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return load_prompts(PromptSettings(path=str(path), **settings))[0]


def test_everything_that_a_template_takes_is_passed_on() -> None:
    text = text_of(WHOLE, TOOLS, [TOOL])
    assert text.startswith('<bos>[[{"type": "function"')
    assert '<assistant>[add {"a": 1, "b": 2}]</><tool>3</><assistant>' in text
    named = [{**USER, "name": "Ann"}, {"role": "assistant", "content": "3", "reasoning_content": "hm"}, USER]
    assert "<user Ann>1+2?</><assistant>(hm)3</>" in text_of(WHOLE, named)


@pytest.mark.parametrize(
    ("template", "messages", "tools", "field"),
    [
        (PLAIN, TOOLS, None, "tool_calls"),
        (PLAIN, [USER], [TOOL], "tools"),
        (PLAIN, [{**USER, "name": "Ann"}], None, "name"),
        (
            PLAIN,
            [USER, {"role": "assistant", "content": "3", "reasoning_content": "hm"}, USER],
            None,
            "reasoning_content",
        ),
        (PLAIN, [{**USER, "weight": 1}], None, "weight"),
        (KNOWN_ROLES, SYSTEM, None, r"content.*message 1 \(system"),
        (KNOWN_ROLES, [{"role": "human", "content": "1+2?"}], None, "content"),
        (NO_SYSTEM, SYSTEM, None, "System role not supported"),
        (TWO_ROLES, SYSTEM, None, "role 'system' of message 1"),
        (TWO_ROLES, [USER, {"role": "tool", "content": "3"}], None, "role 'tool' of message 2"),
        (IF_TRUE, [{**USER, "weight": 0}], None, "weight"),
        (IF_TRUE, [{**USER, "weight": False}], None, "weight"),
        (PLAIN.replace("m.content", "m.text + ''"), [USER], None, "refuses it"),
        ("{% for m in messages %", [USER], None, "no Jinja template"),
        (WHOLE, PREFILL[1:], None, None),
    ],
)
def test_what_a_template_leaves_out_or_refuses_is_named(
    template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, field: str | None
) -> None:
    if field is None:
        assert text_of(template, messages, tools)
        return
    with raises(InputError, field, file="here.jsonl", prompt="0") as caught:
        text_of(template, messages, tools)
    assert caught.value.remedy


@pytest.mark.parametrize("template", [PLAIN, WHOLE, TRIMS])
def test_an_assistant_s_last_message_is_continued_in_its_turn(template: str) -> None:
    text = text_of(template, PREFILL, suffix="!")
    assert text.endswith("<user>1+2?!</><assistant>Let me add:" + ("" if template == TRIMS else " "))
    teacher = tiny_tokenizer()
    teacher.chat_template = template
    source = Conversation(tuple(PREFILL)).to_json()
    ids = render_teacher_prompt(source, TeacherPromptSettings(kind="template", suffix="!"), teacher, "part 0", {})
    assert teacher.decode(ids) == text


def test_the_rendering_without_transformers_is_transformers_own() -> None:
    for template in (WHOLE, PLAIN, TRIMS, "{% generation %}x{% endgeneration %}" + PLAIN):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        for messages in (TOOLS, SYSTEM, [USER]):
            conversation = Conversation(tuple(messages), (TOOL,))
            own = ChatTemplate.of(tokenizer).render(conversation, {"enable_thinking": False})
            assert own == tokenizer.apply_chat_template(
                messages, tools=[TOOL], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )


@pytest.mark.parametrize("as_list", [True, False])
def test_the_template_of_a_folder_is_the_tokenizer_s(tmp_path: Path, as_list: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": PLAIN, "tool_use": WHOLE} if as_list else WHOLE
    tokenizer.save_pretrained(tmp_path)
    template = ChatTemplate.of_folder(tmp_path, tools=True)
    assert (template.source, template.special_tokens["bos_token"]) == (WHOLE, "<bos>")
    assert ChatTemplate.of(tokenizer, tools=True).source == WHOLE
    assert ChatTemplate.of_folder(tmp_path).source == (PLAIN if as_list else WHOLE)


def test_arguments_that_no_template_reads_are_refused() -> None:
    template = ChatTemplate(WHOLE, {"bos_token": "<bos>"})
    check_arguments(template, {"enable_thinking": False, "tools": []})
    with raises(InputError, "enable_thinkin; it reads: enable_thinking"):
        check_arguments(template, {"enable_thinkin": False})
    with raises(InputError, "argument thinking", setting="template_arguments", prompt="0"):
        text_of(WHOLE, [USER], template_arguments={"thinking": True})
    for name in ("add_generation_prompt", "tokenize", "messages", "continue_final_message"):
        with pytest.raises(ValueError, match=f"template_arguments: {name}"):
            PromptSettings(path="x", template_arguments={name: True})
        with pytest.raises(ValueError, match=rf"score\.teacher_prompt\.arguments: {name}"):
            TeacherPromptSettings(kind="template", arguments={name: True})


def test_a_second_system_message_is_refused() -> None:
    with pytest.raises(ValueError, match="a system message already"):
        text_of(PLAIN, SYSTEM, system="Think.")
    with pytest.raises(ValueError, match="a system message already"):
        render_teacher_prompt(
            Conversation(tuple(SYSTEM)).to_json(),
            TeacherPromptSettings(kind="template", system="Think."),
            tiny_tokenizer(),
            "part 0",
            {},
        )


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "message 1: `content` must be text"),
        ([USER, {"role": "assistant", "content": ""}], "message 2 is an empty turn.*: remove it"),
        ([USER, {"role": "assistant", "content": None}], "message 2: `content` must be text"),
        ([USER, {"role": "assistant", "tool_calls": [CALL]}], "ends with the assistant's tool calls: add"),
        ([{"content": "x"}], "message 1 must hold text as `role`"),
        ([{"role": "user", "content": "\ud800"}], "surrogates"),
        ([{"role": "user", "content": "x", "name": float("nan")}], "nan|NaN|JSON"),
        ([], "not be empty"),
        ("  ", "not be empty"),
    ],
)
def test_conversations_that_no_template_could_write(messages: Any, words: str) -> None:
    with raises(InputError, words):
        parse_conversation(messages)


def test_fields_of_other_rows_are_absent_and_not_null(tmp_path: Path) -> None:
    """A Parquet column has the same fields in each row: `tool_calls` of a user's message is null there."""
    path = tmp_path / "tools.parquet"
    pq.write_table(pa.table({"prompt": [TOOLS], "tools": [json.dumps([TOOL])]}), path)
    prompts = load_prompts(PromptSettings(path=str(path), columns={"tools": "tools"}))[0]
    assert prompts.conversation == Conversation(tuple(TOOLS), (TOOL,))
    assert Conversation.from_json(prompts.messages_json) == prompts.conversation


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_file_of_a_tokenizer_that_is_not_json_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{")
    with raises(InputError, file=tmp_path / name, remedy="save the tokenizer again"):
        ChatTemplate.of_folder(tmp_path)


def test_plain_text_is_one_user_s_message() -> None:
    assert Conversation((USER,)).plain_text() == "1+2?"
    for messages in (SYSTEM, [{**USER, "name": "Ann"}], [{"role": "system", "content": "x"}]):
        with raises(InputError, setting="template"):
            Conversation(tuple(messages)).plain_text()


LLAMA = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}[{{ date_string }}]"
    + PLAIN
)
TODAY = "{{ strftime_now('%Y') }}" + PLAIN


@pytest.mark.parametrize("template", [LLAMA, TODAY])
def test_a_template_that_writes_the_date_needs_one(tmp_path: Path, template: str) -> None:
    """Equal keys must mean equal prompts, whatever the day is."""
    with raises(InputError, setting="template_arguments", remedy="strftime_now"):
        text_of(template, [USER])
    text = text_of(template, [USER], template_arguments={"strftime_now": "2025-07-26"})
    assert ("26 Jul 2025" if template == LLAMA else "2025") in text
    with raises(InputError, "'soon'", setting="template_arguments.strftime_now"):
        text_of(template, [USER], template_arguments={"strftime_now": "soon"})
    (tmp_path / "chat_template.jinja").write_text(template)
    result = ChatTemplate.of_folder(tmp_path)
    assert result.render(Conversation((USER,)), {"strftime_now": "2025-07-26"}) == text


def test_a_template_whose_date_is_an_argument_or_never_written_is_left_alone() -> None:
    assert "[26 Jul 2024]" in text_of(LLAMA, [USER], template_arguments={"date_string": "26 Jul 2024"})
    unread = "{% if strftime_now is defined and tools %}{{ strftime_now('%Y') }}{% endif %}" + PLAIN
    assert text_of(unread, [USER]) == text_of(PLAIN, [USER])
